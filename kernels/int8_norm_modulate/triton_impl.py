"""`int8_norm_modulate` on a GPU: one program a row, which stays in registers from its sums to its integers."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.norm_modulate.triton_impl import (
    modulated,
    normalised,
    place,
    read,
    row_block,
    rows,
    vector,
    warps,
    why_not,
)
from vivace.kernels.philox_normal.triton_impl import on_device
from vivace.kernels.quantize_tokens.check import by_sample
from vivace.kernels.quantize_tokens.triton_impl import write_integers

__all__ = ["int8_norm_modulate", "why_not"]


def int8_norm_modulate(
    hidden: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    smooth: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """quantize_tokens((norm(hidden) * weight + bias) * (1 + scale) + shift), one pass."""
    q = hidden.new_empty(hidden.shape, dtype=torch.int8)
    step = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
    if not hidden.numel():
        return q, step
    batch, tokens, width = hidden.shape
    block = row_block(width)
    with on_device(hidden.device):
        _int8_norm_modulate[batch * tokens,](
            q,
            step,
            *rows(hidden),
            *vector(scale),
            *vector(shift),
            weight,
            bias,
            smooth,
            None if x_scale is None else by_sample(x_scale, hidden).contiguous(),
            tokens,
            width,
            eps,
            CENTRED=kind == "layer",
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return q, step


@triton.jit
def _int8_norm_modulate(
    q,
    step,
    hidden,
    hidden_sample,  # strides of samples and of tokens, here and below
    hidden_token,
    scale,
    scale_sample,
    scale_token,
    shift,
    shift_sample,
    shift_token,
    weight,
    bias,
    smooth,
    given,
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
    write_integers(q, step, tl.where(here, y, 0.0), smooth, given, b, width, i, here)
