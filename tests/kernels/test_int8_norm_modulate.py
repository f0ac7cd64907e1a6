"""Integers behind a norm: those of the two ops one after another, scales given, ranks, threads, what is refused."""

import math

import pytest
import torch

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.int8_norm_modulate import SPEC, int8_norm_modulate
from vivace.kernels.int8_norm_modulate.cases import cases
from vivace.kernels.norm_modulate import norm_modulate
from vivace.kernels.norm_modulate.cases import Draw
from vivace.kernels.quantize_tokens import quantize_tokens

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
SHAPE = (2, 3, 200)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def wide(tensor):
    return None if tensor is None else tensor.float()


def equal(found, wanted):
    """Integers and scales bit for bit; NaN is NaN."""
    (q, scale), (other, steps) = found, wanted
    return torch.equal(q, other) and torch.equal(scale.nan_to_num(-1.0), steps.nan_to_num(-1.0))


@on_every_backend
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_it_is_the_two_ops_in_float32_bit_for_bit(backend, case):
    for dtype in case.dtypes:
        call = case.make(dtype, device_of(backend))
        found = int8_norm_modulate(*call.args, **call.kwargs, backend=backend)
        options = dict(call.kwargs)
        smooth, x_scale = options.pop("smooth", None), options.pop("x_scale", None)
        options |= {name: wide(options[name]) for name in ("weight", "bias") if name in options}
        y = norm_modulate(*map(wide, call.args), **options, backend=backend)
        assert equal(found, quantize_tokens(y, smooth=smooth, scale=x_scale, backend=backend))


@on_every_backend
def test_a_row_without_deviation_has_the_integers_of_the_shift(backend):
    hidden = torch.full(SHAPE, 0.7, device=device_of(backend))
    shift = Draw("float32", device_of(backend)).vector(200)
    q, scale = int8_norm_modulate(hidden, None, shift, kind="rms", eps=1e30, backend=backend)
    exact = shift.abs().max() / 127.0
    assert torch.allclose(scale, exact.expand(SHAPE[:2])) and torch.equal(q[0, 0], (shift / exact).round().to(q.dtype))
    q, scale = int8_norm_modulate(torch.zeros_like(hidden), backend=backend)
    assert not q.any() and bool((scale == 1.0).all())


@on_every_backend
@pytest.mark.parametrize("shape", [(200,), (2, 200), (2, 3, 4, 200)])
def test_other_ranks_are_samples_tokens_and_elements(backend, shape):
    hidden = Draw("float32", device_of(backend)).hidden((2, 12, 200)).flatten()[: math.prod(shape)].reshape(shape)
    batch = shape[0] if len(shape) > 1 else 1
    x_scale = torch.linspace(0.01, 0.02, batch, device=hidden.device)
    flat = hidden.reshape(batch, -1, 200)
    q, scale = int8_norm_modulate(hidden, x_scale=x_scale, backend=backend)
    assert q.shape == hidden.shape and scale.shape == hidden.shape[:-1]
    wanted = int8_norm_modulate(flat, x_scale=x_scale, backend=backend)
    assert equal((q.view(flat.shape), scale.view(flat.shape[:-1])), wanted)
    assert torch.equal(wanted[1], x_scale[:, None].expand(flat.shape[:-1]))


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x_scale", [None, 0.02])
def test_bits_do_not_depend_on_the_threads(dtype, x_scale):
    hidden, smooth = Draw(dtype, "cpu").hidden((3, 700, 2050)), torch.linspace(0.1, 3.0, 2050)
    options = {"smooth": smooth, "x_scale": x_scale if x_scale is None else torch.tensor(x_scale), "backend": "cpu"}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(int8_norm_modulate(hidden, **options))
    finally:
        torch.set_num_threads(threads)
    assert equal(*found)


REFUSED = {
    r"hidden is float16, needs float32": {"hidden": torch.zeros(SHAPE, dtype=torch.float16)},
    r"hidden has shape \(2, 3, 0\), needs D of 1": {"hidden": torch.zeros(2, 3, 0)},
    r"scale has shape \(3, 200\), needs \[200\]": {"scale": torch.zeros(3, 200)},
    r"weight has shape \(1, 200\)": {"weight": torch.zeros(1, 200)},
    r"smooth has shape \(100,\), needs \[200\]": {"smooth": torch.ones(100)},
    r"smooth is bfloat16, needs float32": {"smooth": torch.ones(200, dtype=torch.bfloat16)},
    r"smooth has stride 2": {"smooth": torch.ones(400)[::2]},
    r"smooth is on meta, x on cpu": {"smooth": torch.ones(200, device="meta")},
    r"x_scale has shape \(3,\), needs \[\], \[2\] or \[2, 1, \.\.\.\]": {"x_scale": torch.ones(3)},
    r"x_scale has shape \(2, 3\)": {"x_scale": torch.ones(2, 3)},
    r"x_scale is float64, needs float32": {"x_scale": torch.ones(2, dtype=torch.float64)},
    r"kind is 'batch'": {"kind": "batch"},
    r"eps is -1.0": {"eps": -1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_illegal_calls_are_refused(message):
    arguments = {"hidden": torch.zeros(SHAPE)} | REFUSED[message]
    with pytest.raises((ShapeError, DtypeError, ArgumentError), match="^int8_norm_modulate: .*" + message):
        int8_norm_modulate(arguments.pop("hidden"), **arguments)


@pytest.mark.backend("cpu")
def test_float64_is_for_the_reference_alone():
    hidden = torch.ones(SHAPE, dtype=torch.float64)
    assert int8_norm_modulate(hidden)[1].dtype == torch.float64
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        int8_norm_modulate(hidden, backend="cpu")
