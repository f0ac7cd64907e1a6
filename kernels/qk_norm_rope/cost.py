"""What one call of `qk_norm_rope` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any


def bytes_moved(query: Any, key: Any, *, cos: Any = None, sin: Any = None, **options: Any) -> int:
    """Bytes read and written once: query and key in and out, the tables, weights and biases."""
    if not query.numel() + key.numel():
        return 0
    vectors = [value for name, value in options.items() if name.endswith(("_weight", "_bias"))]
    others = [tensor for tensor in (cos, sin, *vectors) if tensor is not None]
    return 2 * (_nbytes(query) + _nbytes(key)) + sum(_nbytes(tensor) for tensor in others)


def flops(query: Any, key: Any, *, cos: Any = None, kind: str = "rms", **options: Any) -> int:
    """Multiplications and additions an element: 3 or 5 of the norm, 1 of each vector, 3 of the rotation."""
    total = 0
    for x, side in ((query, "query"), (key, "key")):
        vectors = [options.get(f"{side}_{part}") for part in ("weight", "bias")]
        each = {"rms": 3, "layer": 5, "none": 0}[kind] + sum(vector is not None for vector in vectors)
        total += each * int(x.numel())
        if cos is not None and (side == "query" or options.get("rotate_key", True)):
            total += 3 * int(cos.shape[-2] * x.shape[0] * x.shape[2] * x.shape[3])
    return total


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
