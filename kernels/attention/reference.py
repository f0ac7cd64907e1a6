"""The definition of `attention`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import working_dtype


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    lanes: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of every head; scale None: 1 / sqrt(K)."""
    if lanes is not None:
        key, value = key[lanes], value[lanes]
    q, k, v = (tensor.to(working_dtype(query)).transpose(1, 2) for tensor in (query, key, value))
    factor = query.shape[3] ** -0.5 if scale is None else scale
    result = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    for b in range(len(query)):  # alone: the bits of a batched product of torch depend on the size of the batch
        weights = (q[b] @ k[b].transpose(1, 2) * factor).softmax(-1)
        result[b] = (weights @ v[b]).transpose(0, 1)
    return result
