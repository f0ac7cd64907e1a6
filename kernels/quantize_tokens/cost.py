"""What one call of `quantize_tokens` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes, vector_bytes

SCALE_BYTES = 4


def bytes_moved(x: Any, *, smooth: Any = None, scale: Any = None, **_: Any) -> int:
    """Bytes read and written once: x, smooth, scales given, an integer for each element, a scale for each row."""
    return nbytes(x) + vector_bytes(x, smooth, scale) + integer_bytes(x)


def integer_bytes(x: Any) -> int:
    """Bytes of the integers and scales of rows like these."""
    rows = int(x.numel()) // int(x.shape[-1])
    return int(x.numel()) + SCALE_BYTES * rows


def flops(x: Any, *, smooth: Any = None, **_: Any) -> int:
    """Four operations an element: maximum, division, rounding, limits; one more with `smooth`."""
    return (4 if smooth is None else 5) * int(x.numel())
