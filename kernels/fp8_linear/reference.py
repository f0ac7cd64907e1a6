"""The definition of `fp8_linear`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.fp8_quantize_tokens.reference import fp8_quantize_tokens
from vivace.kernels.linear.reference import epilogue


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
    """residual + gate * act(x_scale weight_scale (x W^T) + bias); the product is summed in float64."""
    if x_scale is None:
        x, x_scale = fp8_quantize_tokens(x, smooth=smooth)
    y = (x.double() @ weight.double().T).to(weight_scale.dtype)
    y = y * x_scale[..., None] * weight_scale
    y = epilogue(y, bias, activation, gate, residual)
    return y.to(out_dtype or torch.bfloat16) if out is None else out.copy_(y)
