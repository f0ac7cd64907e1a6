"""`int8_linear` on a GPU: the kernel of `linear` with an int32 sum and both scales in its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.linear.triton_impl import launch, tile_for, why_not

__all__ = ["int8_linear", "why_not"]


def int8_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * act(x_scale weight_scale (x W^T) + bias), each that is None left out."""
    if out is None:
        out = x.new_empty((*x.shape[:-1], len(weight)), dtype=out_dtype or torch.bfloat16)
    return launch(tile_for(x, weight), x, weight, x_scale, weight_scale, bias, activation, gate, residual, out)
