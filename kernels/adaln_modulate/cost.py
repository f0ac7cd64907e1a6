"""What one call of `adaln_modulate` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate import cost as norm
from vivace.kernels.norm_modulate.cost import nbytes, vector_bytes


def bytes_moved(hidden: Any, update: Any, *vectors: Any, weight: Any = None, bias: Any = None, **_: Any) -> int:
    """Bytes read and written once: hidden, update, vectors, both results."""
    return 4 * nbytes(hidden) + vector_bytes(hidden, *vectors, weight, bias)


def flops(hidden: Any, update: Any, gate: Any = None, *vectors: Any, **options: Any) -> int:
    """Those of the residual, 1 or 2 an element, and of the norm."""
    return int(hidden.numel()) * (1 if gate is None else 2) + norm.flops(hidden, *vectors, **options)
