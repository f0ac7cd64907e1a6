"""What one call of `cache_apply` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.cache_update.cost import plane_bytes
from vivace.kernels.norm_modulate.cost import vector_bytes


def bytes_moved(
    kept: Any, lanes: Any, weights: Any, *, hidden: Any = None, gate: Any = None, out: Any = None, dtype: Any = None,
    ids: Any = None, **_: Any,
) -> int:  # fmt: skip
    """Bytes read and written once: planes that are read, hidden, gate, the result."""
    elements = _elements(kept, lanes, ids)
    size = int(next((each.itemsize for each in (hidden, out, dtype) if each is not None), 4))
    moved = int(weights.shape[1]) * plane_bytes(kept, elements) + size * elements
    return moved if hidden is None else moved + size * elements + vector_bytes(hidden, gate)


def flops(
    kept: Any, lanes: Any, weights: Any, *, hidden: Any = None, gate: Any = None, ids: Any = None, **_: Any
) -> int:
    """A product an element for each plane, sums between them, a sum and a product with hidden and gate."""
    return _elements(kept, lanes, ids) * (2 * int(weights.shape[1]) - 1 + (hidden is not None) + (gate is not None))


def _elements(kept: Any, lanes: Any, ids: Any) -> int:
    if ids is not None:
        return int(lanes.shape[0]) * int(ids.shape[1]) * int(kept.shape[-1])
    return int(kept[:1, 0].numel() if kept.shape[0] else 0) * int(lanes.shape[0])
