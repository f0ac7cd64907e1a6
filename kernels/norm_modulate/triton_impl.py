"""`norm_modulate` on a GPU: one program a row, which stays in registers between its sums.

Fusion is off and the number of warps follows from the width alone, so a row has the same bits in every batch.
"""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.norm_modulate.check import vector_strides
from vivace.kernels.philox_normal import triton_impl as philox
from vivace.kernels.philox_normal.triton_impl import on_device


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on hidden states of `dtype` on `device`; None when it can."""
    reason = philox.why_not(device, dtype)
    return reason if reason or dtype in ("float32", "bfloat16") else f"{dtype} runs on the reference"


def norm_modulate(
    hidden: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """(norm(hidden) * weight + bias) * (1 + scale) + shift, one pass."""
    out = hidden.new_empty(hidden.shape) if out is None else out
    batch, tokens, width = hidden.shape
    block = row_block(width)
    with on_device(hidden.device):
        _norm_modulate[batch * tokens,](
            *rows(out),
            *rows(hidden),
            *vector(scale),
            *vector(shift),
            weight,
            bias,
            tokens,
            width,
            eps,
            CENTRED=kind == "layer",
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return out


def row_block(width: int) -> int:
    """Elements a program holds of a row of this width."""
    return max(128, int(triton.next_power_of_2(width)))


def warps(block: int) -> int:
    """Sixteen elements a thread, up to the most warps there are."""
    return min(16, max(1, block // 512))


def rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """A tensor [B, N, D] and the strides of samples and tokens."""
    return tensor, tensor.stride(0), tensor.stride(1)


def vector(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A modulation of any of its shapes and its strides; an absent one has none."""
    return (None, 0, 0) if tensor is None else (tensor, *vector_strides(tensor))


@triton.jit
def _norm_modulate(
    out,
    out_sample,  # strides of samples and of tokens, here and below
    out_token,
    hidden,
    hidden_sample,
    hidden_token,
    scale,
    scale_sample,
    scale_token,
    shift,
    shift_sample,
    shift_token,
    weight,
    bias,
    tokens,
    width,
    eps,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n = place(tokens)
    i = tl.arange(0, BLOCK)
    here = i < width
    x = read(hidden + b * hidden_sample + n * hidden_token, i, here)
    y = normalised(x, here, width, eps, CENTRED, BLOCK)
    scale_at, shift_at = b * scale_sample + n * scale_token, b * shift_sample + n * shift_token
    y = modulated(y, weight, bias, scale, scale_at, shift, shift_at, i, here)
    write(out + b * out_sample + n * out_token, i, here, y)


@triton.jit
def place(tokens):
    """Sample and token of this program's row."""
    row = tl.program_id(0).to(tl.int64)
    return row // tokens, row % tokens


@triton.jit
def read(row, i, here):
    return tl.load(row + i, mask=here, other=0.0).to(tl.float32)


@triton.jit
def write(row, i, here, y):
    tl.store(row + i, y.to(row.dtype.element_ty), mask=here)


@triton.jit
def modulated(y, weight, bias, scale, scale_at, shift, shift_at, i, here):
    """(y * weight + bias) * (1 + scale) + shift, absent ones left out; `_at`: where the row's vector begins."""
    if weight is not None:
        y = y * read(weight, i, here)
    if bias is not None:
        y = y + read(bias, i, here)
    if scale is not None:
        y = y * (1.0 + read(scale + scale_at, i, here))
    if shift is not None:
        y = y + read(shift + shift_at, i, here)
    return y


@triton.jit
def normalised(x, here, width, eps, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    """x / sqrt(mean(x^2) + eps), the mean of x taken off first where CENTRED; what rounding leaves of it too."""
    count = tl.full([], width, tl.float32)  # a width of 1 comes as a constant
    offset = 0.0
    if CENTRED:
        x = tl.where(here, x - tl.div_rn(tl.sum(x, axis=0), count), 0.0)
        rest = tl.div_rn(tl.sum(x, axis=0), count)
        offset = rest * rest
    squares = tl.div_rn(tl.sum(x * x, axis=0), count) - offset
    if CENTRED:
        squares = tl.where(squares < 0.0, 0.0, squares)  # a constant row; NaN stays
        x = x - rest
    return x * tl.div_rn(1.0, tl.sqrt_rn(squares + eps))
