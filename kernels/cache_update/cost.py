"""What one call of `cache_update` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes, vector_bytes


def bytes_moved(
    kept: Any,
    lanes: Any,
    fresh: Any,
    *,
    base: Any = None,
    made: int = 0,
    hidden: Any = None,
    gate: Any = None,
    **_: Any,
) -> int:
    """Bytes read and written once: fresh, base, planes (`made` read, one more written), hidden, gate, the result."""
    moved = nbytes(fresh) + (2 * made + 1) * plane_bytes(kept, int(fresh.numel()))
    if base is not None:
        moved += nbytes(base)
    return moved if hidden is None else moved + 2 * nbytes(hidden) + vector_bytes(hidden, gate)


def flops(
    kept: Any,
    lanes: Any,
    fresh: Any,
    *,
    base: Any = None,
    made: int = 0,
    hidden: Any = None,
    gate: Any = None,
    **_: Any,
) -> int:
    """A subtraction an element for base and for each difference, a sum and a product with hidden and gate."""
    each = (base is not None) + made + (hidden is not None) + (gate is not None)
    return int(fresh.numel()) * each


def plane_bytes(kept: Any, elements: int) -> int:
    """Bytes of so many elements of a plane, with their scales."""
    scales = elements // int(kept.shape[-1]) * 4 if elements and str(kept.dtype) == "torch.int8" else 0
    return elements * int(kept.element_size()) + scales
