"""The definition of `cache_apply`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.cache_update.reference import added, plane


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
    """v = sum_j weights[r, j] * plane j; hidden + gate * v, or v."""
    v = None
    for j in range(weights.shape[1]):
        term = weights[:, j, None, None] * plane(kept, lanes, j, scales, weights.dtype, ids)
        v = term if v is None else v + term
    assert v is not None  # one term at least
    if hidden is not None:
        return added(hidden, gate, v, out)
    return v.to(v.dtype if dtype is None else dtype) if out is None else out.copy_(v)
