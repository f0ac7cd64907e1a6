"""int8 linears: exact sums at the extremes, rows quantized in the call, scales, layouts, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.int8_linear import MOST_DEPTH, SPEC, int8_linear
from vivace.kernels.int8_linear.cases import make
from vivace.kernels.linear import linear, pack_weight
from vivace.kernels.quantize_tokens import quantize_tokens

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def integers(*shape, low=-128, high=128):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(5), dtype=torch.int8)


def exact(x, weight):
    return (x.to(torch.int64)[..., None, :] * weight.to(torch.int64)).sum(-1)


@on_every_backend
@pytest.mark.parametrize("depth", [1, 15, 64, 129, 1000])
def test_sums_are_exact(backend, depth):
    x, weight = integers(2, 3, depth), integers(5, depth)
    x[0, 0], weight[1] = -128, 127
    x[1, 2], weight[0] = -128, -128  # 2^14 a product: sums of float32 stay exact up to a depth of 1024
    arguments = (x, weight, torch.ones(2, 3), torch.ones(5))
    y = int8_linear(*(t.to(device_of(backend)) for t in arguments), out_dtype=torch.float32, backend=backend)
    assert torch.equal(y.cpu().long(), exact(x, weight))


@on_every_backend
def test_sums_beyond_float32_are_rounded_once(backend):
    x, weight = torch.full((1, 5000), -128, dtype=torch.int8), torch.full((1, 5000), -128, dtype=torch.int8)
    x[0, 0] = 1  # 4999 * 2^14 - 128, more than 2^24
    arguments = (x, weight, torch.ones(1), torch.ones(1))
    y = int8_linear(*(t.to(device_of(backend)) for t in arguments), out_dtype=torch.float32, backend=backend)
    assert y.item() == exact(x, weight).float().item()


@on_every_backend
def test_it_is_the_float_linear_of_what_the_integers_stand_for(backend):
    generator = torch.Generator().manual_seed(1)
    hidden, matrix = torch.randn(2, 4, 96, generator=generator), torch.randn(40, 96, generator=generator) / 10.0
    gate, residual = torch.randn(2, 40, generator=generator), torch.randn(2, 4, 40, generator=generator)
    (x, x_scale), (weight, weight_scale) = quantize_tokens(hidden), quantize_tokens(matrix)
    device = device_of(backend)
    ours = int8_linear(
        *(t.to(device) for t in (x, weight, x_scale, weight_scale)), gate=gate.to(device), residual=residual.to(device),
        activation="silu", out_dtype=torch.float32, backend=backend,
    )  # fmt: skip
    wide = (x * x_scale.double()[..., None], weight * weight_scale.double()[:, None])
    options = {"gate": gate.double(), "residual": residual.double(), "activation": "silu"}
    torch.testing.assert_close(ours.cpu().double(), linear(*wide, **options), rtol=1e-5, atol=1e-5)
    close = linear(hidden, matrix, gate=gate, residual=residual, activation="silu")
    assert (ours.cpu() - close).abs().max() < 0.1  # quantization itself


@on_every_backend
def test_the_result_is_bfloat16_unless_named(backend):
    x, weight, x_scale, weight_scale = make("float32", device_of(backend)).args
    y = int8_linear(x, weight, x_scale, weight_scale, backend=backend)
    assert y.dtype == torch.bfloat16
    out = torch.full(y.shape, float("nan"), dtype=torch.float16, device=y.device)
    assert int8_linear(x, weight, x_scale, weight_scale, out=out, backend=backend) is out
    assert out.isfinite().all()


@on_every_backend
def test_bits_do_not_depend_on_rank_or_layout(backend):
    device = device_of(backend)
    x, weight = integers(2, 3, 4, 90).to(device), integers(64, 90).to(device)
    x_scale, weight_scale = torch.rand(2, 3, 4).to(device), torch.rand(64).to(device)
    want = int8_linear(x, weight, x_scale, weight_scale, backend=backend)
    for shape in ((24,), (6, 4), (1, 2, 3, 4)):
        y = int8_linear(x.reshape(*shape, 90), weight, x_scale.reshape(shape), weight_scale, backend=backend)
        assert torch.equal(y.reshape(want.shape), want)
    swapped = x.transpose(0, 2).contiguous().transpose(0, 2)
    wider = weight.new_zeros(64, 97)
    wider[:, :90] = weight
    assert torch.equal(int8_linear(swapped, wider[:, :90], x_scale, weight_scale, backend=backend), want)


def hard_rows(dtype, width):
    """Normals, a row of zeros, one with NaN, one with infinity, ties."""
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(2)) * 3.0
    x[0, 1] = 0.0
    x[0, 2, -1], x[1, 0, 0] = float("nan"), -float("inf")
    x[2, 4] = torch.arange(width) % 127 + 0.5
    x[2, 4, 0] = 127.0
    return x.to(dtype)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 3, 64, 131])
@pytest.mark.parametrize("smoothed", [False, True])
def test_rows_quantized_in_the_call_have_the_bits_of_those_quantized_before_it(backend, dtype, width, smoothed):
    device = device_of(backend)
    x, weight = hard_rows(dtype, width).to(device), integers(70, width).to(device)
    smooth = (torch.rand(width) + 0.25).to(device) if smoothed else None
    weight_scale, bias = torch.rand(70).to(device), torch.randn(70).to(device)
    q, x_scale = quantize_tokens(x, smooth=smooth, backend=backend)
    options = {"activation": "gelu_tanh", "backend": backend}
    y = int8_linear(x, weight, None, weight_scale, bias, smooth=smooth, **options)
    assert y.dtype == dtype
    want = int8_linear(q, weight, x_scale, weight_scale, bias, out_dtype=dtype, **options)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.nan_to_num(), want.nan_to_num())
    assert y[0, 2].isnan().all() and y[1, 0].isnan().all() and int(y.isnan().any(-1).sum()) == 2


def test_half_precision_rows_are_quantized_as_wider_ones():
    x, weight = hard_rows(torch.float32, 40)[2].half(), integers(9, 40)
    y = int8_linear(x, weight, None, torch.ones(9), out_dtype=torch.float32)
    assert torch.equal(y, int8_linear(x.float(), weight, None, torch.ones(9)))
    assert int8_linear(x, weight, None, torch.ones(9)).dtype == torch.float16


FORCED = """
import hashlib, torch
from vivace.kernels.int8_linear import int8_linear
generator = torch.Generator().manual_seed(3)
digest = hashlib.sha256()
for rows, columns, depth in ((1, 1, 1), (53, 67, 131), (2, 130, 1029), (100, 64, 256)):
    weight = torch.randint(-128, 128, (columns, depth), generator=generator, dtype=torch.int8)
    weight[0], scale, bias = -128, torch.rand(columns, generator=generator) / 99, torch.randn(columns)
    bias = torch.randn(columns, generator=generator)
    ints = torch.randint(-128, 128, (rows, depth), generator=generator, dtype=torch.int8)
    ints[0] = 127
    floats = torch.randn(rows, depth, generator=generator)
    floats[-1] = 0.0
    for x, x_scale in ((ints, torch.rand(rows, generator=generator)), (floats, None), (floats.bfloat16(), None)):
        for activation in ("none", "gelu", "gelu_tanh", "silu"):
            for dtype in (torch.float32, torch.bfloat16):
                y = int8_linear(x, weight, x_scale, scale, bias, activation=activation, out_dtype=dtype, backend="cpu")
                digest.update(y.float().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.backend("cpu")
def test_every_instruction_set_gives_the_same_bits():
    from vivace import _C

    found = {}
    for isa in _C.available_isas():
        env = os.environ | {"VIVACE_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", FORCED], env=env, capture_output=True, text=True, check=True)
        found[isa] = run.stdout.strip()
    assert len(set(found.values())) == 1, found


@pytest.mark.backend("triton")
def test_a_packed_weight_is_refused_by_the_gpu():
    packed = pack_weight(integers(5, 8))
    with pytest.raises(ArgumentError, match=r"int8_linear: .*(packed weight is for the CPU|is on cpu)"):
        int8_linear(X.to(device_of("triton")), packed, S.to(device_of("triton")), T, backend="triton")


@pytest.mark.backend("cpu")
def test_unknown_dtype_codes_are_refused():
    from vivace import _C

    for code in (2, 4, -1, 1 << 32, (1 << 32) + 3):
        with pytest.raises(ValueError, match="is none of float32, bfloat16 and int8"):
            _C.run_products(code, 1, 1)
        with pytest.raises(ValueError, match="is none of float32, bfloat16 and int8"):
            _C.packed_bytes(4, 4, code)
    assert _C.run_products(3, 1, 1) > 0


X, W, S, T = integers(2, 3, 8), integers(5, 8), torch.ones(2, 3), torch.ones(5)
REFUSED = [
    ((X.float(), W, S, T), {}, DtypeError, "x is float32, needs int8 beside an x_scale"),
    ((X, W, None, T), {}, DtypeError, "x is int8, needs its x_scale"),
    ((X.short(), W, None, T), {}, DtypeError, "x is int16, needs int8, or without"),
    ((X, W, S, T), {"smooth": torch.ones(8)}, ArgumentError, "smooth is for x that is quantized here"),
    ((X.float(), W, None, T), {"smooth": torch.ones(7)}, ShapeError, r"smooth has shape \(7,\)"),
    ((X.float(), W, None, T), {"smooth": torch.ones(8).bfloat16()}, DtypeError, "smooth is bfloat16"),
    ((X, W.short(), S, T), {}, DtypeError, "weight is int16"),
    ((X, W[:, :7], S, T), {}, ShapeError, r"x has shape \(2, 3, 8\) and weight \(5, 7\)"),
    ((X, W[0], S, T), {}, ShapeError, r"weight \(8,\)"),
    ((X[..., :0], W[:, :0], S, T), {}, ShapeError, "K is 0"),
    ((X, W, S[0], T), {}, ShapeError, r"x_scale has shape \(3,\), needs \(2, 3\)"),
    ((X, W, S, T[:4]), {}, ShapeError, r"weight_scale has shape \(4,\), needs \(5,\)"),
    ((X, W, S.bfloat16(), T), {}, DtypeError, "x_scale is bfloat16"),
    ((X, W, S, T.double()), {}, DtypeError, "weight_scale is float64"),
    ((X, W, S, T, T[:4]), {}, ShapeError, r"bias has shape \(4,\)"),
    ((X, W, S, T, T.half()), {}, DtypeError, "bias is float16"),
    ((X, W, S, T), {"activation": "relu"}, ArgumentError, "activation is 'relu'"),
    ((X, W, S, T), {"gate": torch.ones(3, 5)}, ShapeError, r"gate has shape \(3, 5\)"),
    ((X, W, S, T), {"residual": torch.ones(2, 3, 5)}, DtypeError, "residual is float32, needs bfloat16"),
    ((X, W, S, T), {"residual": torch.ones(2, 3, 4).bfloat16()}, ShapeError, "residual has shape"),
    ((X, W, S, T), {"out_dtype": torch.int8}, DtypeError, "to be int8"),
    ((X, W, S, T), {"out_dtype": torch.float64}, DtypeError, "to be float64"),
    ((X, W, S, T.to("meta")), {}, ArgumentError, "weight_scale is on meta"),
    ((X, W.T.contiguous().T, S, T), {}, ShapeError, "weight has stride 5"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(args, kwargs, error, words):
    with pytest.raises(error, match=f"int8_linear: .*{words}"):
        int8_linear(*args, **kwargs)


def test_a_depth_whose_sums_int32_may_not_hold_is_refused():
    x = torch.zeros(1, MOST_DEPTH + 1, dtype=torch.int8)
    with pytest.raises(ShapeError, match="K is 131072"):
        int8_linear(x, x, torch.ones(1), torch.ones(1))
    assert 128 * 128 * MOST_DEPTH < 2**31 <= 128 * 128 * (MOST_DEPTH + 1)
