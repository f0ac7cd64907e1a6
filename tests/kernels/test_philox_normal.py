"""Counter-based noise: known words, the same bits as the definition, moments, and what a picture's noise depends on."""

import math

import numpy as np
import pytest
import torch

from vivace.engine.noise import philox_words
from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.philox_normal import NORMAL_TOLERANCE, SPEC, philox_normal

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
KNOWN = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # all-zero key and counter


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def normals(*args, backend):
    return philox_normal(*args, device=device_of(backend), backend=backend).cpu()


def philox(counter, key):
    """Philox4x32-10 written down once more, in Python integers."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def box_muller(words):
    """Four normals in float64."""
    u = [word * 2.0**-32 + 2.0**-33 for word in words]
    turns = [(math.sqrt(-2.0 * math.log(u[i])), 2.0 * math.pi * u[i + 1]) for i in (0, 2)]
    return [f(r, a) for r, a in turns for f in (lambda r, a: r * math.cos(a), lambda r, a: r * math.sin(a))]


def test_words_of_the_known_answer():
    assert tuple(philox_words(0, 0, 0, 4).tolist()) == KNOWN == philox((0, 0, 0, 0), (0, 0))


@on_every_backend
@pytest.mark.parametrize(
    ("seed", "picture", "draw"), [(0, 0, 0), ((1 << 64) - 1, 3, 1), (0x123456789ABCDEF0, (1 << 32) - 1, (1 << 32) - 1)]
)
def test_normals_are_box_muller_of_the_exact_words(backend, seed, picture, draw):
    got = normals((3, 7), [seed], [picture], draw, backend=backend).flatten()
    key = (seed & 0xFFFFFFFF, seed >> 32)
    want = [n for quad in range(6) for n in box_muller(philox((quad, 0, picture, draw), key))][:21]
    assert (got.double() - torch.tensor(want, dtype=torch.float64)).abs().max() < NORMAL_TOLERANCE


@pytest.mark.parametrize("case", SPEC.cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("backend", [pytest.param(b, marks=pytest.mark.backend(b)) for b in ("cpu", "triton")])
def test_backends_stay_with_the_definition(backend, case):
    call = case.make("float32", device_of(backend))
    got = philox_normal(*call.args, **call.kwargs, backend=backend).cpu()
    want = philox_normal(*call.args, backend="reference")
    if device_of(backend) == "cpu":
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))
    else:
        assert torch.allclose(got, want, rtol=0.0, atol=NORMAL_TOLERANCE)


@pytest.mark.backend("reference")
def test_moments_are_those_of_a_unit_normal():
    n = normals((1 << 19,), [2024], [0], 0, backend="reference")[0].double()
    count = n.numel()
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((n**power).mean().item() - mean) < 4.0 * math.sqrt(variance / count), f"moment {power}"
    for lag in (1, 2, 3, 4):
        assert abs((n[lag:] * n[:-lag]).mean().item()) < 4.0 / math.sqrt(count), f"lag {lag}"
    assert abs((n.abs() < 1.0).double().mean().item() - 0.6826894921) < 4.0 * math.sqrt(0.2166 / count)


@on_every_backend
def test_picture_j_of_a_request_is_the_single_picture_with_index_j(backend):
    whole = normals((5, 6), [9] * 4, range(4), 2, backend=backend)
    for j in range(4):
        assert torch.equal(whole[j], normals((5, 6), [9], [j], 2, backend=backend)[0])


@on_every_backend
def test_noise_does_not_depend_on_how_a_sample_is_shaped(backend):
    flat = normals((60,), [1], [0], 0, backend=backend)
    assert torch.equal(flat, normals((3, 4, 5), [1], [0], 0, backend=backend).reshape(1, 60))
    assert torch.equal(flat[:, :41], normals((41,), [1], [0], 0, backend=backend))


def test_seed_picture_and_draw_each_give_other_noise():
    first = philox_normal((64,), [1], [0], 0)
    others = (([1 + (1 << 32)], [0], 0), ([2], [0], 0), ([1], [1], 0), ([1], [0], 1), ([0], [1], 0))
    for seeds, pictures, draw in others:
        assert (philox_normal((64,), seeds, pictures, draw) != first).all()


def test_seeds_come_as_integers_arrays_or_tensors_with_the_same_bits():
    seed = (1 << 64) - 5
    want = philox_normal((9,), [seed], [1])
    for seeds in ([-5], np.array([seed], np.uint64), torch.tensor([-5])):
        assert torch.equal(philox_normal((9,), seeds, np.array([1], np.int32)), want)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((4,), [1, 2], [0]), ShapeError, "2 seeds, 1 pictures"),
        (((-1,), [1], [0]), ShapeError, "sizes of 0 or more"),
        (((4,), torch.zeros(1), [0]), DtypeError, "seeds is float32"),
        (((4,), [1], torch.zeros(1, 1, dtype=torch.int64)), ShapeError, r"pictures has shape \(1, 1\)"),
        (((4,), [1], [0], -1), ArgumentError, "draw is -1"),
        (((4,), [1], [0], 1 << 32), ArgumentError, "needs 0 <= draw < 2\\^32"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        philox_normal(*arguments)
