"""Rows as integers and a scale: ties, ends of the range, rows without a scale, one set of bits, what is refused."""

import math

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.quantize_tokens import SPEC, quantize_tokens
from vivace.kernels.quantize_tokens.cases import cases

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_fast_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.impls]
)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def run(x, backend):
    q, scale = quantize_tokens(x.to(device_of(backend)), backend=backend)
    return q.cpu(), scale.cpu()


@on_fast_backends
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_integers_and_scales_have_the_bits_of_the_definition(backend, case):
    for dtype in case.dtypes:
        (x,) = case.make(dtype, "cpu").args
        for ours, want in zip(run(x, backend), run(x, "reference"), strict=True):
            assert ours.dtype == want.dtype and torch.equal(ours.nan_to_num(), want.nan_to_num())
            assert torch.equal(ours.isnan(), want.isnan())


@on_every_backend
def test_ties_go_to_even_and_the_largest_number_to_127(backend):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, -127.0, 0.0]])
    q, scale = run(x, backend)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, -127, 0]]
    q, scale = run(-3.0 * x, backend)
    assert scale.tolist() == [3.0] and q.tolist() == [[-127, 0, -2, -2, 0, 2, 2, -126, 126, 127, 0]]


@on_every_backend
def test_what_has_no_scale(backend):
    least = 2.0**-149
    rows = [[0.0, -0.0], [least, -least], [math.nan, 5.0], [math.inf, 1.0], [1.0, -math.inf]]
    q, scale = run(torch.tensor(rows), backend)
    assert q.tolist() == [[0, 0]] * 5
    assert scale[:2].tolist() == [1.0, 1.0] and scale[2:].isnan().all()


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_come_back_within_half_a_step(backend, dtype):
    x = (3.0 * torch.randn(4, 50, 200, generator=torch.Generator().manual_seed(3))).to(dtype)
    q, scale = run(x, backend)
    assert (q * scale[..., None] - x.float()).abs().le(0.5001 * scale[..., None]).all()
    assert q.abs().amax(-1).eq(127).all()  # every row uses the whole range


@pytest.mark.backend("triton")
def test_half_precision_runs_on_triton(backend="triton"):
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(4)).half()
    for ours, want in zip(run(x, backend), run(x, "reference"), strict=True):
        assert torch.equal(ours, want)


REFUSED = [
    (torch.zeros(2, 3, dtype=torch.int8), DtypeError, "x is int8"),
    (torch.zeros(()), ShapeError, r"x has shape \(\)"),
    (torch.zeros(2, 0), ShapeError, r"x has shape \(2, 0\)"),
    (torch.zeros(6, 2).T, ShapeError, "x has stride 2"),
]


@pytest.mark.parametrize(("x", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(x, error, words):
    with pytest.raises(error, match=f"quantize_tokens: .*{words}"):
        quantize_tokens(x)
    with pytest.raises(ArgumentError, match="is no backend"):
        quantize_tokens(torch.zeros(1, 1), backend="gpu")
