"""`qk_norm_rope` on the CPU: csrc/ops/qk_norm_rope.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import CODES, why_not

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["qk_norm_rope", "why_not"]

KINDS = {"none": 0, "rms": 1, "layer": 2}


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    kind: str = "rms",
    pairs: str = "interleaved",
    eps: float = 1e-6,
    rotate_from: int = 0,
    rotate_key: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(x) * weight + bias of query and key, then y * cos + turned(y) * sin.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if out is None:
        plain = torch.contiguous_format
        out = (torch.empty_like(query, memory_format=plain), torch.empty_like(key, memory_format=plain))
    turn = None
    if cos is not None and sin is not None:
        turn = (*_table(cos), *_table(sin), rotate_from, cos.shape[-2])
    _C.qk_norm_rope(
        _side(query, out[0], query_weight, query_bias),
        _side(key, out[1], key_weight, key_bias),
        turn,
        rotate_key,
        pairs == "half",
        query.shape[0],
        query.shape[3],
        CODES[query.dtype],
        KINDS[kind],
        eps,
        torch.get_num_threads(),
    )
    return out


def _side(x: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[int, ...]:
    """Queries or keys as C++ takes them."""
    _, tokens, heads, _ = x.shape
    vectors = (*_vector(weight), *_vector(bias))
    return (x.data_ptr(), *x.stride()[:3], out.data_ptr(), *out.stride()[:3], *vectors, tokens, heads)


def _vector(vector: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if vector is None else (vector.data_ptr(), CODES[vector.dtype], len(vector))


def _table(table: Tensor) -> tuple[int, int, int]:
    """cos or sin; [R, K] and [1, R, K] serve every sample."""
    sizes, strides = table.shape, table.stride()
    return table.data_ptr(), strides[0] if len(sizes) == 3 and sizes[0] > 1 else 0, strides[-2]
