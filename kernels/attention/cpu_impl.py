"""`attention` on the CPU: csrc/ops/attention.*, the products in registers, scores and weights in cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import CODES, why_not

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention", "why_not"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    lanes: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of every head.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    batch, queries, heads, width = query.shape
    _C.attention(
        (out.data_ptr(), *out.stride()[:3]),
        (query.data_ptr(), *query.stride()[:3]),
        (key.data_ptr(), *key.stride()[:3]),
        (value.data_ptr(), *value.stride()[:3]),
        (batch, heads, queries, key.shape[1], width),
        CODES[query.dtype],
        width**-0.5 if scale is None else scale,
        torch.get_num_threads(),
        None if lanes is None else lanes.tolist(),
        len(key),
    )
    return out
