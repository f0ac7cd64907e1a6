"""`fp8_linear` on a GPU: the kernel of `int8_linear` on 8-bit floats."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.fp8_quantize_tokens.triton_impl import fp8_quantize_tokens, why_not
from vivace.kernels.int8_linear.triton_impl import launch
from vivace.kernels.linear.triton_impl import tile_for

__all__ = ["fp8_linear", "why_not"]


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * act(x_scale weight_scale (x W^T) + bias), each that is None left out."""
    if x_scale is None:
        x, x_scale = fp8_quantize_tokens(x, smooth=smooth)
    if out is None:
        out = x.new_empty((*x.shape[:-1], len(weight)), dtype=out_dtype or torch.bfloat16)
    return launch(tile_for(x, weight), x, weight, x_scale, weight_scale, bias, activation, gate, residual, out)
