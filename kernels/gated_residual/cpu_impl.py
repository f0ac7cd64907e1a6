"""`gated_residual` on the CPU: csrc/ops/gated_residual.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import rows, vector, why_not

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gated_residual", "why_not"]


def gated_residual(hidden: Tensor, update: Tensor, gate: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """hidden + gate * update.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if out is None:
        out = torch.empty_like(hidden)
    gates = None if gate is None else vector(gate)
    _C.gated_residual(rows(out), rows(hidden), rows(update), gates, hidden.shape, torch.get_num_threads())
    return out
