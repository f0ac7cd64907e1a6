"""What one call of `attention` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any


def bytes_moved(query: Any, key: Any, value: Any, **_: Any) -> int:
    """Bytes read and written once: query, key, value and a result as large as query."""
    if not query.numel():
        return 0
    return int(query.element_size() * (2 * query.numel() + key.numel() + value.numel()))


def flops(query: Any, key: Any, value: Any, **_: Any) -> int:
    """Multiplications and additions of both products; the softmax is not counted."""
    return 4 * int(query.numel() * key.shape[1])
