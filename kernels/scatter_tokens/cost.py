"""What one call of `scatter_tokens` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes, vector_bytes


def bytes_moved(
    full: Any, ids: Any, fresh: Any, *, second: Any = None, hidden: Any = None, gate: Any = None, **_: Any
) -> int:
    """Bytes read and written once: fresh, what stands beside it, ids; the rows of full that they name."""
    if not _elements(full, fresh):
        return 0
    read = nbytes(fresh) + sum(nbytes(each) for each in (second, hidden) if each is not None)
    return read + nbytes(ids) + vector_bytes(fresh, gate) + _elements(full, fresh) * int(full.element_size())


def flops(full: Any, ids: Any, fresh: Any, *, hidden: Any = None, gate: Any = None, **_: Any) -> int:
    """Sum and product with hidden and gate."""
    return _elements(full, fresh) * ((hidden is not None) + (gate is not None))


def _elements(full: Any, fresh: Any) -> int:
    return int(fresh.shape[0]) * int(fresh.shape[1]) * int(full.shape[2])
