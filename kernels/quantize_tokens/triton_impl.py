"""`quantize_tokens` on a GPU: one program a row, which stays in registers between its maximum and its integers."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.linear.triton_impl import by_token, why_not
from vivace.kernels.norm_modulate.triton_impl import place, read, row_block, rows, warps
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.quantize_tokens.check import by_sample

__all__ = ["quantize_tokens", "why_not"]


def quantize_tokens(x: Tensor, *, smooth: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = max |x smooth| / 127 or the scale given; q = x smooth / s rounded half to even, one pass."""
    return launch(_quantize_tokens, torch.int8, x, smooth, scale)


def launch(
    kernel: Any, dtype: torch.dtype, x: Tensor, smooth: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rows of x in 8 bits of that dtype and their scales, by a kernel with one program a row."""
    q, step = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not x.numel():
        return q, step
    source = by_token(x)
    batch, tokens, width = source.shape
    block = row_block(width)
    with on_device(x.device):
        kernel[batch * tokens,](
            q,
            step,
            *rows(source),
            smooth,
            None if scale is None else by_sample(scale, x).contiguous(),
            tokens,
            width,
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return q, step


@triton.jit
def _quantize_tokens(q, scale, x, x_sample, x_token, smooth, given, tokens, width, BLOCK: tl.constexpr):
    b, n = place(tokens)
    i = tl.arange(0, BLOCK)
    here = i < width
    values = read(x + b * x_sample + n * x_token, i, here)
    write_integers(q, scale, values, smooth, given, b, width, i, here)


@triton.jit
def write_integers(q, scale, values, smooth, given, b, width, i, here):
    """The integers of this program's row of sample b, and its scale: its own, or the sample's among those given."""
    quotient, step, finite = quotients(values, smooth, given, b, i, here, 127.0)
    write_row(q, scale, _rounded(quotient).to(tl.int8), step, finite, width, i, here)


@triton.jit
def quotients(values, smooth, given, b, i, here, MOST: tl.constexpr):
    """values smooth / s within [-MOST, MOST], 0 in a row that is not finite; s; whether it is.

    s: the row's own scale, or that of sample b among those given.
    """
    if smooth is not None:
        values = values * read(smooth, i, here)
    size = tl.abs(values)
    finite = tl.min((size < float("inf")).to(tl.int32), axis=0) == 1  # NaN is not less than anything
    step = tl.div_rn(tl.max(size, axis=0), tl.full([], MOST, tl.float32))
    step = tl.where(step == 0.0, 1.0, step)
    if given is not None:
        fixed = tl.load(given + b)
        step = tl.where(fixed > 0.0, fixed, step)
    quotient = tl.minimum(tl.maximum(tl.div_rn(values, step), -MOST), MOST)
    return tl.where(finite, quotient, 0.0), step, finite


@triton.jit
def write_row(q, scale, numbers, step, finite, width, i, here):
    """The numbers of this program's row, and its scale: NaN where the row is not finite."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(q + row * width + i, numbers, mask=here)
    tl.store(scale + row, tl.where(finite, step, float("nan")))


@triton.jit
def _rounded(x):
    """The nearest integer, half to even, of |x| < 2^22: the sum has no bits left for a fraction."""
    return (x + 12582912.0) - 12582912.0
