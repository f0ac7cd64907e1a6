"""The definition of `adaln_modulate`: the definitions of its two halves."""

from __future__ import annotations

from torch import Tensor

from vivace.kernels.gated_residual.reference import gated_residual
from vivace.kernels.norm_modulate.reference import norm_modulate


def adaln_modulate(
    hidden: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
    hidden_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = hidden + gate * update, m = (norm(h) * weight + bias) * (1 + scale) + shift."""
    h = gated_residual(hidden, update, gate, out=hidden_out)
    return h, norm_modulate(h, scale, shift, weight=weight, bias=bias, kind=kind, eps=eps, out=out)
