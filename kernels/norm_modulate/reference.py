"""The definition of `norm_modulate`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_modulate(
    hidden: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """(norm(hidden) * weight + bias) * (1 + scale) + shift."""
    x = hidden.to(working_dtype(hidden))
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if scale is not None:
        y = y * (1.0 + by_token(scale, y))
    if shift is not None:
        y = y + by_token(shift, y)
    return y.to(hidden.dtype) if out is None else out.copy_(y)


def working_dtype(hidden: Tensor) -> torch.dtype:
    """float64 of float64, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def by_token(vector: Tensor, like: Tensor) -> Tensor:
    """[B, D] as [B, 1, D], others as they are, in the dtype of `like`."""
    return (vector[:, None] if vector.dim() == 2 else vector).to(like.dtype)
