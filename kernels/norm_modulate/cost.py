"""What one call of `norm_modulate` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any


def bytes_moved(hidden: Any, *vectors: Any, weight: Any = None, bias: Any = None, out: Any = None, **_: Any) -> int:
    """Bytes read and written once: hidden, vectors, the result."""
    return nbytes(hidden) + nbytes(hidden if out is None else out) + vector_bytes(hidden, *vectors, weight, bias)


def flops(hidden: Any, *vectors: Any, weight: Any = None, bias: Any = None, kind: str = "layer", **_: Any) -> int:
    """Additions and multiplications an element: 6 of a layer norm (mean 1, deviation 1, squares 2, result 2), 3 of an
    RMS norm, one for each vector. 1 + scale is not counted.
    """
    given = sum(vector is not None for vector in (*vectors, weight, bias))
    return int(hidden.numel()) * ((6 if kind == "layer" else 3) + given)


def nbytes(tensor: Any) -> int:
    """Bytes of the elements of a tensor."""
    return int(tensor.numel()) * int(tensor.element_size())


def vector_bytes(hidden: Any, *vectors: Any) -> int:
    """Bytes of the vectors given, 0 where there is no row to apply them to."""
    return sum(nbytes(vector) for vector in vectors if vector is not None) if hidden.numel() else 0
