"""`fp8_quantize_tokens` on a GPU: one program a row, which stays in registers between its maximum and its numbers."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.linear import triton_impl as product
from vivace.kernels.norm_modulate.triton_impl import place, read
from vivace.kernels.quantize_tokens.triton_impl import launch, quotients, write_row
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
    return launch(_fp8_quantize_tokens, torch.float8_e4m3fn, x, smooth, scale)


@triton.jit
def _fp8_quantize_tokens(q, scale, x, x_sample, x_token, smooth, given, tokens, width, BLOCK: tl.constexpr):
    b, n = place(tokens)
    i = tl.arange(0, BLOCK)
    here = i < width
    values = read(x + b * x_sample + n * x_token, i, here)
    quotient, step, finite = quotients(values, smooth, given, b, i, here, 448.0)
    write_row(q, scale, _on_grid(quotient).to(tl.float8e4nv), step, finite, width, i, here)


@triton.jit
def _on_grid(x):
    """The nearest number of e4m3, half to even, of |x| <= 448: the sum has three bits left below the first of x."""
    bits = x.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 * 2^20; below 2^-6 all steps are 2^-9
    near = ((x + large) - large).to(tl.int32, bitcast=True)
    return (near | (bits & -0x80000000)).to(tl.float32, bitcast=True)  # what became 0 keeps its sign
