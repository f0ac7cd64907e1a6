"""What one call of `select_tokens` moves and computes, from its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes


def bytes_moved(
    planes: Sequence[Any], weights: Any, ages: Any, keep: int, *, scores: Any = None, factors: Any = None, **_: Any
) -> int:
    """Bytes read and written once: planes or scores, ages twice, ids."""
    if not ages.numel():
        return 0
    return (
        sum(map(nbytes, planes)) + (0 if scores is None else nbytes(scores)) + 2 * nbytes(ages) + 4 * len(ages) * keep
    )


def flops(planes: Sequence[Any], weights: Any, ages: Any, keep: int, *, metric: str = "deviation", **_: Any) -> int:
    """Of the scores: products and sums of planes, 4 more a value of a deviation, 2 of a norm; orders do not count."""
    if not planes or not ages.numel():
        return 0
    return int(planes[0].numel()) * (2 * len(planes) - 1 + (4 if metric == "deviation" else 2))
