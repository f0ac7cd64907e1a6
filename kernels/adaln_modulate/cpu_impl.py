"""`adaln_modulate` on the CPU: csrc/ops/adaln_modulate.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import rows, vector, why_not

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adaln_modulate", "why_not"]


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
    """h = hidden + gate * update, m = (norm(h) * weight + bias) * (1 + scale) + shift.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if hidden_out is None:
        hidden_out = torch.empty_like(hidden)
    if out is None:
        out = torch.empty_like(hidden)
    _C.adaln_modulate(
        rows(hidden_out),
        rows(out),
        rows(hidden),
        rows(update),
        None if gate is None else vector(gate),
        None if scale is None else vector(scale),
        None if shift is None else vector(shift),
        None if weight is None else vector(weight),
        None if bias is None else vector(bias),
        hidden.shape,
        kind == "layer",
        eps,
        torch.get_num_threads(),
    )
    return hidden_out, out
