"""`quantize_tokens` on a GPU: one program a row, which stays in registers between its maximum and its integers."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.linear.triton_impl import by_token, why_not
from vivace.kernels.norm_modulate.triton_impl import place, read, row_block, rows, warps
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["quantize_tokens", "why_not"]


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max |x| / 127, q = x / scale rounded half to even, one pass."""
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not x.numel():
        return q, scale
    source = by_token(x)
    batch, tokens, width = source.shape
    block = row_block(width)
    with on_device(x.device):
        _quantize_tokens[batch * tokens,](
            q, scale, *rows(source), tokens, width, BLOCK=block, num_warps=warps(block), enable_fp_fusion=False
        )
    return q, scale


@triton.jit
def _quantize_tokens(q, scale, x, x_sample, x_token, tokens, width, BLOCK: tl.constexpr):
    b, n = place(tokens)
    i = tl.arange(0, BLOCK)
    here = i < width
    values = read(x + b * x_sample + n * x_token, i, here)
    size = tl.abs(values)
    finite = tl.min((size < float("inf")).to(tl.int32), axis=0) == 1  # NaN is not less than anything
    step = tl.div_rn(tl.max(size, axis=0), tl.full([], 127.0, tl.float32))
    step = tl.where(step == 0.0, 1.0, step)
    nearest = _rounded(tl.div_rn(values, step))
    nearest = tl.where(finite, tl.minimum(tl.maximum(nearest, -127.0), 127.0), 0.0)
    row = tl.program_id(0).to(tl.int64)
    tl.store(q + row * width + i, nearest.to(tl.int8), mask=here)
    tl.store(scale + row, tl.where(finite, step, float("nan")))


@triton.jit
def _rounded(x):
    """The nearest integer, half to even, of |x| < 2^22: the sum has no bits left for a fraction."""
    return (x + 12582912.0) - 12582912.0
