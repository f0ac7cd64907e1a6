"""What one call of `gather_tokens` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes, vector_bytes

VECTORS = ("scale", "shift", "weight", "bias")


def bytes_moved(x: Any, ids: Any, **options: Any) -> int:
    """Bytes read and written once: rows of x that ids name, ids, vectors, one or two results."""
    elements = _elements(x, ids)
    if not elements:
        return 0
    vectors = vector_bytes(x, *(options.get(name) for name in VECTORS))
    return elements * int(x.element_size()) * (2 + _normed(options)) + nbytes(ids) + vectors


def flops(x: Any, ids: Any, **options: Any) -> int:
    """Those of the norm and its vectors, 0 without."""
    if not _normed(options):
        return 0
    given = sum(options.get(name) is not None for name in VECTORS)
    return _elements(x, ids) * ((3 if options.get("kind") == "rms" else 6) + given)


def _normed(options: Any) -> bool:
    return any(options.get(name) is not None for name in (*VECTORS, "normed", "kind"))


def _elements(x: Any, ids: Any) -> int:
    return max(int(x.shape[0]), len(ids)) * int(ids.shape[1]) * int(x.shape[2]) if x.numel() else 0
