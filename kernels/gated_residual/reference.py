"""The definition of `gated_residual`: plain torch, in float32 or float64."""

from __future__ import annotations

from torch import Tensor

from vivace.kernels.norm_modulate.reference import by_token, working_dtype


def gated_residual(hidden: Tensor, update: Tensor, gate: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """hidden + gate * update."""
    x = hidden.to(working_dtype(hidden))
    step = update.to(x.dtype)
    y = x + (step if gate is None else by_token(gate, x) * step)
    return y.to(hidden.dtype) if out is None else out.copy_(y)
