"""Normalisation and modulation: torch's own norms, awkward rows, layouts, ranks, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.norm_modulate import SPEC, norm_modulate
from vivace.kernels.norm_modulate.cases import Draw

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
SHAPE = (2, 3, 200)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def call(dtype="float32", device="cpu", shape=SHAPE):
    """hidden, scale and shift."""
    draw = Draw(dtype, device)
    return draw.hidden(shape), draw.vector(shape[0], shape[-1]), draw.vector(shape[0], shape[-1])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_definition_is_the_norm_of_torch(kind):
    hidden, scale, shift = (tensor.double() for tensor in call())
    weight, bias = torch.randn(2, SHAPE[-1], dtype=torch.float64)
    if kind == "layer":
        normed = F.layer_norm(hidden, SHAPE[-1:], weight, bias, 1e-5)
    else:
        normed = F.rms_norm(hidden, SHAPE[-1:], weight, 1e-5) + bias
    found = norm_modulate(hidden, scale, shift, weight=weight, bias=bias, kind=kind, eps=1e-5)
    torch.testing.assert_close(found, normed * (1 + scale[:, None]) + shift[:, None], rtol=1e-12, atol=1e-12)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_the_error_is_no_larger_than_that_of_torch_however_large_the_mean(mean):
    hidden = call()[0] + mean
    exact = F.layer_norm(hidden.double(), SHAPE[-1:], eps=1e-6)
    ours, theirs = norm_modulate(hidden, backend="cpu"), F.layer_norm(hidden, SHAPE[-1:], eps=1e-6)
    assert spec.error_of(ours, exact) <= 2 * spec.error_of(theirs, exact) + 2.0**-24


@on_every_backend
@every_dtype
def test_a_result_may_take_the_place_of_its_input(backend, dtype):
    hidden, scale, shift = call(dtype, device_of(backend))
    apart = norm_modulate(hidden, scale, shift, backend=backend)
    into = torch.zeros_like(hidden)
    assert norm_modulate(hidden, scale, shift, out=into, backend=backend) is into
    assert norm_modulate(hidden, scale, shift, out=hidden, backend=backend) is hidden
    assert torch.equal(apart, into) and torch.equal(apart, hidden)


@on_every_backend
@every_dtype
@pytest.mark.parametrize("layout", ["gaps", "swapped"])
def test_bits_do_not_depend_on_where_rows_lie(backend, dtype, layout):
    device = device_of(backend)
    draw, same = Draw(dtype, device), Draw(dtype, device)
    hidden, plain = draw.hidden(SHAPE, layout), same.hidden(SHAPE)
    scale, shift = draw.chunks(6, SHAPE[0], SHAPE[-1])[:2]
    found = norm_modulate(hidden, scale, shift, backend=backend)
    expected = norm_modulate(plain, scale[:, 0].contiguous(), shift.contiguous(), backend=backend)
    assert torch.equal(found, expected)
    room = torch.zeros(2, 4, 210, dtype=plain.dtype, device=device)
    assert torch.equal(norm_modulate(plain, scale, shift, out=room[:, 1:, 5:205], backend=backend), expected)
    assert not room[:, 0].any() and not room[..., :5].any() and not room[..., 205:].any()


@on_every_backend
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_narrow_result_is_the_wide_one_rounded(backend, kind):
    hidden, scale, shift = call(device=device_of(backend))
    narrow = torch.zeros(SHAPE, dtype=torch.bfloat16, device=hidden.device)
    assert norm_modulate(hidden, scale, shift, kind=kind, out=narrow, backend=backend) is narrow
    wide = norm_modulate(hidden, scale, shift, kind=kind, backend=backend)
    if backend == "triton" and spec.interpreted():  # which cuts off instead of rounding
        assert bool(((narrow.float() - wide).abs() <= 2**-7 * wide.abs()).all())
    else:
        assert torch.equal(narrow, wide.to(torch.bfloat16))


@pytest.mark.backend("cpu")
@every_dtype
def test_bits_do_not_depend_on_the_threads(dtype):
    hidden, scale, shift = call(dtype, shape=(3, 700, 2050))  # enough work for several
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = norm_modulate(hidden, scale, shift, backend="cpu")
        torch.set_num_threads(4)
        together = norm_modulate(hidden, scale, shift, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@on_every_backend
def test_a_constant_row_is_the_shift(backend):
    hidden, scale, shift = call(device=device_of(backend))
    hidden.fill_(0.7)
    found = norm_modulate(hidden, scale, shift, backend=backend)
    torch.testing.assert_close(found, shift[:, None].expand(SHAPE), rtol=0, atol=1e-3)
    nothing = norm_modulate(torch.zeros_like(hidden), shift=shift, kind="rms", backend=backend)
    assert torch.equal(nothing, shift[:, None].expand(SHAPE))


@on_every_backend
@pytest.mark.parametrize("shape", [(200,), (2, 200), (2, 3, 1, 200), (2, 3, 4, 200)])
def test_other_ranks_are_samples_tokens_and_elements(backend, shape):
    hidden = Draw("float32", device_of(backend)).hidden((2, 12, 200)).flatten()[: torch.Size(shape).numel()]
    hidden = hidden.reshape(shape)
    scale = Draw("float32", device_of(backend)).vector(shape[0] if len(shape) > 1 else 1, 200)
    flat = hidden.reshape(len(scale), -1, 200)
    found = norm_modulate(hidden, scale, backend=backend)
    assert found.shape == hidden.shape
    assert torch.equal(found.view(flat.shape), norm_modulate(flat, scale, backend=backend))
    assert torch.equal(norm_modulate(hidden, scale, out=hidden, backend=backend), found) and torch.equal(hidden, found)


def test_a_vector_of_the_rank_of_hidden_follows_its_axes():
    hidden = torch.randn(2, 3, 4, 8)
    shared, by_frame = torch.randn(2, 1, 1, 8), torch.randn(2, 3, 1, 8)
    for scale in (shared, by_frame):
        expected = F.layer_norm(hidden, (8,), eps=1e-6) * (1 + scale)
        torch.testing.assert_close(norm_modulate(hidden, scale), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_none():
    hidden, scale, shift = call()
    assert not norm_modulate(hidden.requires_grad_(), scale, shift, backend="cpu").requires_grad


REFUSED = {
    r"scale has shape \(3, 200\), needs \[200\], \[2, 200\] or \[2, 3, 200\]": {"scale": torch.zeros(3, 200)},
    r"shift has shape \(2, 2, 200\)": {"shift": torch.zeros(2, 2, 200)},
    r"shift has shape \(\)": {"shift": torch.zeros(())},
    r"scale has shape \(2, 1\)": {"scale": torch.zeros(2, 1)},
    r"weight has shape \(1, 200\), needs \[200\]": {"weight": torch.zeros(1, 200)},
    r"bias has shape \(100,\)": {"bias": torch.zeros(100)},
    r"out has shape \(2, 3, 100\), needs \(2, 3, 200\)": {"out": torch.zeros(2, 3, 100)},
    r"scale is bfloat16, needs float32 beside hidden": {"scale": torch.zeros(2, 200, dtype=torch.bfloat16)},
    r"weight is float64, needs float32": {"weight": torch.zeros(200, dtype=torch.float64)},
    r"out is float16, needs float32": {"out": torch.zeros(SHAPE, dtype=torch.float16)},
    r"out is float32, needs bfloat16": {
        "hidden": torch.zeros(SHAPE, dtype=torch.bfloat16),
        "out": torch.zeros(SHAPE),
    },
    r"out has shape \(2, 200\)": {"out": torch.zeros(2, 200, dtype=torch.bfloat16)},
    r"out has stride 3": {"out": torch.zeros(2, 200, 3, dtype=torch.bfloat16).transpose(1, 2)},
    r"hidden is float16, needs float32 or bfloat16": {"hidden": torch.zeros(SHAPE, dtype=torch.float16)},
    r"hidden has stride 3 along its last axis": {"hidden": torch.zeros(2, 200, 3).transpose(1, 2)},
    r"scale has stride 2 along its last axis": {"scale": torch.zeros(200, 2).T},
    r"scale is on meta, hidden on cpu": {"scale": torch.zeros(2, 200, device="meta")},
    r"kind is 'batch', needs one of": {"kind": "batch"},
    r"eps is -1.0": {"eps": -1.0},
    r"eps is nan": {"eps": float("nan")},
    r"hidden has no axis": {"hidden": torch.zeros(())},
    r"an output has shape \(3,\), needs \(200,\)": {"hidden": torch.zeros(200), "out": torch.zeros(3)},
    r"is not contiguous": {"hidden": torch.zeros(6, 200), "out": torch.zeros(6, 400)[:, :200]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_illegal_calls_are_refused(message):
    arguments = {"hidden": torch.zeros(SHAPE)} | REFUSED[message]
    with pytest.raises((ShapeError, DtypeError, ArgumentError), match="^norm_modulate: .*" + message):
        norm_modulate(arguments.pop("hidden"), **arguments)


@pytest.mark.backend("cpu")
def test_float64_is_for_the_reference_alone():
    hidden = torch.zeros(SHAPE, dtype=torch.float64)
    assert norm_modulate(hidden).dtype == torch.float64
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        norm_modulate(hidden, backend="cpu")
