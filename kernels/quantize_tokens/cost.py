"""What one call of `quantize_tokens` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes

SCALE_BYTES = 4


def bytes_moved(x: Any) -> int:
    """Bytes read and written once: x, an integer for each element, a scale for each row."""
    rows = int(x.numel()) // int(x.shape[-1])
    return nbytes(x) + int(x.numel()) + SCALE_BYTES * rows


def flops(x: Any) -> int:
    """Four operations an element: maximum, division, rounding, limits."""
    return 4 * int(x.numel())
