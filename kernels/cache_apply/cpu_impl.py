"""`cache_apply` on the CPU: csrc/ops/cache_apply.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace import _C
from vivace.kernels.cache_update.cpu_impl import planes, some, why_not
from vivace.kernels.norm_modulate.cpu_impl import rows, vector

__all__ = ["cache_apply", "why_not"]


def cache_apply(
    kept: Tensor,
    lanes: Tensor,
    weights: Tensor,
    *,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """v = sum_j weights[r, j] * plane j; hidden + gate * v, or v.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if out is None:
        shape = (lanes.shape[0], kept.shape[2] if ids is None else ids.shape[1], kept.shape[3])
        out = kept.new_empty(shape, dtype=torch.float32 if dtype is None else dtype)
    weights = weights.contiguous()
    _C.cache_apply(
        planes(kept, scales),
        lanes.tolist(),
        weights.data_ptr(),
        weights.shape[1],
        None if hidden is None else rows(hidden),
        None if gate is None else vector(gate),
        rows(out),
        some(ids, kept),
        out.shape,
        torch.get_num_threads(),
    )
    return out
