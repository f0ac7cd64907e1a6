"""`scatter_tokens` on the CPU: csrc/ops/scatter_tokens.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace import _C
from vivace.kernels.gather_tokens.cpu_impl import id_numbers
from vivace.kernels.norm_modulate.cpu_impl import rows, vector, why_not

__all__ = ["scatter_tokens", "why_not"]


def scatter_tokens(
    full: Tensor,
    ids: Tensor,
    fresh: Tensor,
    *,
    second: Tensor | None = None,
    lanes: Tensor | None = None,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """full[lanes[r], ids[r % n, m]] = fresh, fresh and second side by side, or hidden + gate * fresh.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    _C.scatter_tokens(
        id_numbers(ids, full.shape[1]),
        rows(full),
        full.shape[0],
        None if lanes is None else lanes.tolist(),
        rows(fresh),
        None if second is None else rows(second),
        fresh.shape[2],
        None if hidden is None else rows(hidden),
        None if gate is None else vector(gate),
        (fresh.shape[0], fresh.shape[1], full.shape[2]),
        torch.get_num_threads(),
    )
    return full
