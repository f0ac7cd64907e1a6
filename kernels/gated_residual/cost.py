"""What one call of `gated_residual` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes, vector_bytes


def bytes_moved(hidden: Any, update: Any, gate: Any = None, **_: Any) -> int:
    """Bytes read and written once: hidden, update, gate, the result."""
    return 3 * nbytes(hidden) + vector_bytes(hidden, gate)


def flops(hidden: Any, update: Any, gate: Any = None, **_: Any) -> int:
    """One addition an element, and one multiplication where there is a gate."""
    return int(hidden.numel()) * (1 if gate is None else 2)
