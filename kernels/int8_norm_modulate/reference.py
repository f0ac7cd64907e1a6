"""The definition of `int8_norm_modulate`: those of the two ops one after another, in float32 or float64."""

from __future__ import annotations

from torch import Tensor

from vivace.kernels.norm_modulate.reference import norm_modulate, working_dtype
from vivace.kernels.quantize_tokens.reference import quantize_tokens


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
    """quantize_tokens((norm(hidden) * weight + bias) * (1 + scale) + shift)."""
    wide = hidden.to(working_dtype(hidden))
    y = norm_modulate(wide, scale, shift, weight=weight, bias=bias, kind=kind, eps=eps)
    return quantize_tokens(y, smooth=smooth, scale=x_scale)
