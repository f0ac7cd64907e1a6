"""What one call of `gelu` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

OPERATIONS = {"none": 36, "tanh": 24}  # of the float32 kernel, an element; a division counts as one


def bytes_moved(hidden: Any, *, gated: bool = False, **_: Any) -> int:
    """Bytes read and written once: hidden, and a result of its size or half of it."""
    read = int(hidden.numel() * hidden.element_size())
    return read + read // (2 if gated else 1)


def flops(hidden: Any, *, gated: bool = False, approximate: str = "none", **_: Any) -> int:
    """Float operations of the float32 kernel; gated: one multiplication more for each result."""
    count = int(hidden.numel()) // (2 if gated else 1)
    return count * (OPERATIONS[approximate] + (1 if gated else 0))
