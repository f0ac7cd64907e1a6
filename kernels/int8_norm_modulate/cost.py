"""What one call of `int8_norm_modulate` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate import cost as norm
from vivace.kernels.norm_modulate.cost import nbytes, vector_bytes
from vivace.kernels.quantize_tokens import cost as tokens


def bytes_moved(
    hidden: Any, *vectors: Any, weight: Any = None, bias: Any = None, smooth: Any = None, x_scale: Any = None, **_: Any
) -> int:
    """Bytes read and written once: hidden, vectors, scales given, an integer for each element, a scale for each row."""
    read = nbytes(hidden) + vector_bytes(hidden, *vectors, weight, bias, smooth, x_scale)
    return read + tokens.integer_bytes(hidden)


def flops(hidden: Any, *vectors: Any, smooth: Any = None, x_scale: Any = None, **options: Any) -> int:
    """Those of both ops."""
    return norm.flops(hidden, *vectors, **options) + tokens.flops(hidden, smooth=smooth)
