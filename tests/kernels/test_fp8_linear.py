"""fp8 linears: exact products, the float linear they stand for, x in either form, layouts, and what is refused."""

import pytest
import torch

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.fp8_linear import SPEC, fp8_linear
from vivace.kernels.fp8_quantize_tokens import fp8_quantize_tokens
from vivace.kernels.linear import linear

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
FP8 = torch.float8_e4m3fn


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def whole(*shape, most=8):
    """Small integers: sums that even few bits hold."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(5)).float().to(FP8)


@on_every_backend
@pytest.mark.parametrize("depth", [1, 15, 64, 129, 1000])
def test_sums_of_small_integers_are_exact(backend, depth):
    x, weight = whole(2, 3, depth), whole(5, depth)
    arguments = (x, weight, torch.ones(2, 3), torch.ones(5))
    y = fp8_linear(*(t.to(device_of(backend)) for t in arguments), out_dtype=torch.float32, backend=backend)
    assert torch.equal(y.cpu(), x.float() @ weight.float().T)


@on_every_backend
def test_it_is_the_float_linear_of_what_the_numbers_stand_for(backend):
    generator = torch.Generator().manual_seed(1)
    hidden, matrix = torch.randn(2, 4, 96, generator=generator), torch.randn(40, 96, generator=generator) / 10.0
    gate, residual = torch.randn(2, 40, generator=generator), torch.randn(2, 4, 40, generator=generator)
    (x, x_scale), (weight, weight_scale) = fp8_quantize_tokens(hidden), fp8_quantize_tokens(matrix)
    device = device_of(backend)
    options = {"gate": gate.to(device), "residual": residual.to(device), "activation": "silu"}
    ours = fp8_linear(
        *(t.to(device) for t in (x, weight, x_scale, weight_scale)),
        **options,
        out_dtype=torch.float32,
        backend=backend,
    )
    wide = (x.double() * x_scale.double()[..., None], weight.double() * weight_scale.double()[:, None])
    wanted = linear(*wide, gate=gate.double(), residual=residual.double(), activation="silu")
    assert spec.error_of(ours, wanted) <= SPEC.tolerance
    close = linear(hidden, matrix, gate=gate, residual=residual, activation="silu")
    assert (ours.cpu() - close).abs().max() < 0.3  # quantization itself


@on_every_backend
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_quantized_here_has_the_bits_of_x_quantized_before(backend, smoothed, dtype):
    device, generator = device_of(backend), torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 5, 64, generator=generator).to(device, dtype)
    weight, weight_scale = fp8_quantize_tokens(torch.randn(24, 64, generator=generator).to(device), backend=backend)
    smooth = torch.linspace(0.1, 3.0, 64).to(device) if smoothed else None
    x, x_scale = fp8_quantize_tokens(hidden, smooth=smooth, backend=backend)
    want = fp8_linear(x, weight, x_scale, weight_scale, out_dtype=dtype, backend=backend)
    assert torch.equal(fp8_linear(hidden, weight, None, weight_scale, smooth=smooth, backend=backend), want)


@on_every_backend
def test_the_result_is_bfloat16_unless_named(backend):
    device = device_of(backend)
    arguments = (
        whole(2, 3, 16).to(device),
        whole(5, 16).to(device),
        torch.ones(2, 3).to(device),
        torch.ones(5).to(device),
    )
    assert fp8_linear(*arguments, backend=backend).dtype == torch.bfloat16
    out = torch.full((2, 3, 5), float("nan"), dtype=torch.float16, device=device)
    assert fp8_linear(*arguments, out=out, backend=backend) is out and out.isfinite().all()


@on_every_backend
def test_bits_do_not_depend_on_rank_or_layout(backend):
    device = device_of(backend)
    x, weight = whole(2, 3, 4, 80, most=200).to(device), whole(64, 80, most=200).to(device)
    x_scale, weight_scale = torch.rand(2, 3, 4).to(device), torch.rand(64).to(device)
    want = fp8_linear(x, weight, x_scale, weight_scale, backend=backend)
    for shape in ((24,), (6, 4), (1, 2, 3, 4)):
        y = fp8_linear(x.reshape(*shape, 80), weight, x_scale.reshape(shape), weight_scale, backend=backend)
        assert torch.equal(y.reshape(want.shape), want)
    swapped = x.transpose(0, 2).contiguous().transpose(0, 2)
    wider = weight.new_zeros(64, 97)
    wider[:, :80] = weight
    assert torch.equal(fp8_linear(swapped, wider[:, :80], x_scale, weight_scale, backend=backend), want)


X, W, S, T = whole(2, 3, 8), whole(5, 8), torch.ones(2, 3), torch.ones(5)
REFUSED = [
    ((X.float(), W, S, T), {}, DtypeError, "x is float32, needs float8_e4m3fn"),
    ((X, W, None, T), {}, DtypeError, "x is float8_e4m3fn without x_scale"),
    ((X, W.float(), S, T), {}, DtypeError, "weight is float32"),
    ((X, W[:, :7], S, T), {}, ShapeError, r"x has shape \(2, 3, 8\) and weight \(5, 7\)"),
    ((X, W[0], S, T), {}, ShapeError, r"weight \(8,\)"),
    ((X[..., :0], W[:, :0], S, T), {}, ShapeError, "K of 1 or more"),
    ((X, W, S[0], T), {}, ShapeError, r"x_scale has shape \(3,\), needs \(2, 3\)"),
    ((X, W, S, T[:4]), {}, ShapeError, r"weight_scale has shape \(4,\), needs \(5,\)"),
    ((X, W, S.bfloat16(), T), {}, DtypeError, "x_scale is bfloat16"),
    ((X, W, S, T.double()), {}, DtypeError, "x_scale is float32"),
    ((X.double(), W, None, T), {}, DtypeError, "x is float64 beside scales in float32"),
    ((X, W, S, T), {"smooth": torch.ones(8)}, ArgumentError, "smooth is for an x that is quantized here"),
    ((X.float(), W, None, T), {"smooth": torch.ones(7)}, ShapeError, "smooth has shape"),
    ((X, W, S, T, T[:4]), {}, ShapeError, r"bias has shape \(4,\)"),
    ((X, W, S, T), {"activation": "relu"}, ArgumentError, "activation is 'relu'"),
    ((X, W, S, T), {"residual": torch.ones(2, 3, 5)}, DtypeError, "residual is float32, needs bfloat16"),
    ((X, W, S, T), {"out_dtype": torch.float64}, DtypeError, "to be float64"),
    ((X, W, S, T), {"backend": "cpu"}, BackendError, "fp8 runs on CUDA, on GPUs of capability 8.9 or more"),
    ((X, W, S, T.to("meta")), {}, ArgumentError, "weight_scale is on meta"),
    ((X, W.T.contiguous().T, S, T), {}, ShapeError, "weight has stride 5"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(args, kwargs, error, words):
    with pytest.raises(error, match=f"fp8_linear: .*{words}"):
        fp8_linear(*args, **kwargs)
