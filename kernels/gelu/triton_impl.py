"""`gelu` on a GPU: one program for 1024 elements of a row, the operations of csrc/ops/gelu.inl one by one."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.gelu.terms import TANH, TERMS
from vivace.kernels.norm_modulate.triton_impl import read, why_not, write
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["gelu", "why_not"]

BLOCK = 1024  # elements a program handles
WARPS = 4
_TANH = tl.constexpr(TANH)


def gelu(hidden: Tensor, *, gated: bool = False, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """x * (1 + erf(x / sqrt(2))) / 2; gated: hidden[..., :F] * gelu(hidden[..., F:]), one pass."""
    width = hidden.shape[-1] // 2 if gated else hidden.shape[-1]
    out = hidden.new_empty((*hidden.shape[:-1], width)) if out is None else out
    source, target = hidden.reshape(-1, hidden.shape[-1]), out.reshape(-1, width)
    rows = len(source)
    if not gated and source.is_contiguous() and target.is_contiguous():
        rows, width = 1, source.numel()
    blocks = triton.cdiv(width, BLOCK)
    terms = TERMS[str(hidden.dtype)[6:]]
    with on_device(hidden.device):
        _gelu[rows * blocks,](
            target,
            target.stride(0),
            source,
            source.stride(0),
            width,
            blocks,
            LIMIT=terms.limit,
            P=terms.p,
            Q=terms.q,
            EXP2=terms.exp2,
            DEGREE=len(terms.p) - 1,
            GATED=gated,
            BY_TANH=approximate == "tanh",
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
    return out


@triton.jit
def _gelu(
    out,
    out_row,  # strides of rows, here and below
    hidden,
    hidden_row,
    width,
    blocks,  # of a row
    LIMIT: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    EXP2: tl.constexpr,
    DEGREE: tl.constexpr,  # of P, of Q and of 2^r
    GATED: tl.constexpr,
    BY_TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)
    here = i < width
    source = hidden + row * hidden_row
    x = read(source + width if GATED else source, i, here)
    y = _by_tanh(x, EXP2, DEGREE) if BY_TANH else _by_erf(x, LIMIT, P, Q, DEGREE)
    if GATED:
        y = read(source, i, here) * y
    write(out + row * out_row, i, here, y)


@triton.jit
def _by_erf(x, LIMIT: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, DEGREE: tl.constexpr):
    near = _clamp(x, -LIMIT, LIMIT)
    square = near * near
    return (tl.div_rn(near * _horner(square, P, DEGREE), _horner(square, Q, DEGREE)) + 0.5) * x


@triton.jit
def _by_tanh(x, EXP2: tl.constexpr, DEGREE: tl.constexpr):
    """x / (1 + 2^t); the nearest integer to t goes into the exponent by way of the lowest bits of t + 1.5 * 2^23."""
    near = _clamp(x * _horner(x * x, _TANH, 1), -126.0, 128.0)
    shifted = near + 12582912.0
    fraction = _horner(near - (shifted - 12582912.0), EXP2, DEGREE)
    bits = fraction.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return tl.div_rn(x, bits.to(tl.float32, bitcast=True) + 1.0)


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Polynomial, lowest coefficient first."""
    y = x * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for k in tl.static_range(2, DEGREE + 1):
        y = y * x + COEFFICIENTS[DEGREE - k]
    return y


@triton.jit
def _clamp(x, low, high):
    """NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)
