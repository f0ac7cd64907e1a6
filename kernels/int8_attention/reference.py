"""The definition of `int8_attention`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import working_dtype

KEYS = 64  # in a row that share a scale
MOST = 127.0


def int8_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, out: Tensor | None = None
) -> Tensor:
    """softmax(scale a c (q . k)) v of every head; scale None: 1 / sqrt(K)."""
    wide, factor = working_dtype(query), query.shape[3] ** -0.5 if scale is None else scale
    result = torch.zeros_like(query, memory_format=torch.contiguous_format) if out is None else out.zero_()
    if not key.numel():
        return result
    for b in range(len(query)):  # alone: the bits of a batched product of torch depend on the size of the batch
        heads, k, v = (tensor[b].to(wide).transpose(0, 1) for tensor in (query, key, value))
        q, a = integers(heads, heads.abs().amax(-1, keepdim=True))
        k, c = quantized_keys(k)
        scores = (q.double() @ k.double().transpose(1, 2)).to(wide) * c.transpose(1, 2) * (a * factor)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        rounded = weights.to(query.dtype).to(wide)
        result[b] = (rounded @ v / weights.sum(-1, keepdim=True)).transpose(0, 1)
    return result


def quantized_keys(key: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [H, M, K] less their mean as integers, and the scale of each key, [H, M, 1]."""
    mean = key.mean(1, keepdim=True).to(torch.bfloat16).to(key.dtype)
    rest = key - mean
    blocks = [rest[:, begin : begin + KEYS] for begin in range(0, rest.shape[1], KEYS)]
    largest = [block.abs().amax((1, 2), keepdim=True).expand(-1, block.shape[1], 1) for block in blocks]
    return integers(rest, torch.cat(largest, 1))


def integers(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """x / s rounded half to even and s = largest / 127; zeros and NaN where `largest` is not finite."""
    step = largest / MOST
    step = torch.where(step == 0.0, 1.0, step)
    finite = largest.isfinite()
    q = (x / step).round().clamp(-MOST, MOST)
    return torch.where(finite, q, 0.0), torch.where(finite, step, torch.nan)
