"""`fp8_quantize_tokens` on a GPU: one program a row, which stays in registers between its maximum and its numbers."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.linear import triton_impl as product
from vivace.kernels.linear.triton_impl import by_token
from vivace.kernels.norm_modulate.triton_impl import place, read, row_block, rows, warps
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.quantize_tokens.check import by_sample
from vivace.kernels.spec import interpreted

LEAST_CAPABILITY = (8, 9)


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on inputs of `dtype` on `device`; None when it can."""
    reason = product.why_not(device, dtype)
    if reason is not None or interpreted():
        return reason
    found = torch.cuda.get_device_capability()
    return None if found >= LEAST_CAPABILITY else f"fp8 needs a GPU of capability 8.9 or more, this has {found}"


def fp8_quantize_tokens(
    x: Tensor, *, smooth: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s = max |x smooth| / 448 or the scale given; q = x smooth / s rounded to e4m3, half to even, one pass."""
    q, step = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if not x.numel():
        return q, step
    source = by_token(x)
    batch, tokens, width = source.shape
    block = row_block(width)
    with on_device(x.device):
        _fp8_quantize_tokens[batch * tokens,](
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
def _fp8_quantize_tokens(q, scale, x, x_sample, x_token, smooth, given, tokens, width, BLOCK: tl.constexpr):
    b, n = place(tokens)
    i = tl.arange(0, BLOCK)
    here = i < width
    values = read(x + b * x_sample + n * x_token, i, here)
    if smooth is not None:
        values = values * read(smooth, i, here)
    size = tl.abs(values)
    finite = tl.min((size < float("inf")).to(tl.int32), axis=0) == 1  # NaN is not less than anything
    step = tl.div_rn(tl.max(size, axis=0), tl.full([], 448.0, tl.float32))
    step = tl.where(step == 0.0, 1.0, step)
    if given is not None:
        fixed = tl.load(given + b)
        step = tl.where(fixed > 0.0, fixed, step)
    nearest = _on_grid(tl.minimum(tl.maximum(tl.div_rn(values, step), -448.0), 448.0))
    row = tl.program_id(0).to(tl.int64)
    tl.store(q + row * width + i, tl.where(finite, nearest, 0.0).to(tl.float8e4nv), mask=here)
    tl.store(scale + row, tl.where(finite, step, float("nan")))


@triton.jit
def _on_grid(x):
    """The nearest number of e4m3, half to even, of |x| <= 448: the sum has three bits left below the first of x."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20; below 2^-6 all steps are 2^-9
    near = ((x + large) - large).to(tl.int32, bitcast=True)
    return (near | (bits & -0x80000000)).to(tl.float32, bitcast=True)  # what became 0 keeps its sign
