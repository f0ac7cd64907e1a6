"""The definition of `int8_linear`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.linear.packed import PackedWeight
from vivace.kernels.linear.reference import epilogue
from vivace.kernels.quantize_tokens.reference import quantize_tokens


def int8_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
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
    """residual + gate * act(x_scale weight_scale (x W^T) + bias); the product is an integer, exact in float64."""
    if x_scale is None:
        x, step = quantize_tokens(x, smooth=smooth)
        x_scale = step.to(weight_scale.dtype)
    matrix = weight.unpack() if isinstance(weight, PackedWeight) else weight
    y = (x.double() @ matrix.double().T).to(x_scale.dtype)
    y = y * x_scale[..., None] * weight_scale
    y = epilogue(y, bias, activation, gate, residual)
    return y.to(out_dtype or torch.bfloat16) if out is None else out.copy_(y)
