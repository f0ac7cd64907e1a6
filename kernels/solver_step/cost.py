"""What one call of `solver_step` moves and computes, from its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vivace.kernels.solver_step import table as t
from vivace.kernels.solver_step.table import StepTable


def bytes_moved(
    pool: Any, outs: Sequence[Any], table: StepTable, rows: Any, index: Any, *, net: Any = None, **_: Any
) -> int:
    """Bytes read and written once per element: distinct tensors a sample reads, plus its destinations.

    With classes an element counts as one of the first class's row, which reads and writes what the others do.
    """
    total = 0
    for ints, floats in table_rows(table, rows):
        total += bytes_read(pool, outs, ints, floats)
        for code in ints[t.DESTINATION_AT :][: int(ints[1])].tolist():
            total += int((net if code == t.NET else pool).element_size())
    return total * int(math.prod(pool.shape[2:]))


def bytes_read(pool: Any, outs: Sequence[Any], ints: Any, floats: Any) -> int:
    """Bytes one element of a sample at this row reads."""
    n, m = int(ints[0]), int(ints[1])
    used = (floats[: t.PREV_AT].reshape(t.OUTPUTS, t.SOURCES)[:m, :n] != 0).any(axis=0)
    codes = set(ints[t.SOURCE_AT :][:n][used].tolist()) | set(ints[t.SCALE_AT :][:n][used].tolist())
    total = 0
    for code in codes - {t.NONE, t.ONE}:
        if t.OUT <= code < t.ONE:
            total += int(outs[code - t.OUT].element_size())
        elif code < t.OUT or t.TENSOR <= code < t.NOISE:
            total += int(pool.element_size())
    return total


def flops(pool: Any, outs: Sequence[Any], table: StepTable, rows: Any, index: Any, **_: Any) -> int:
    """Multiplications and additions: two a nonzero coefficient, one a scale; noise and clamp not counted."""
    total = 0
    for ints, floats in table_rows(table, rows):
        n, m = int(ints[0]), int(ints[1])
        coef = floats[: t.PREV_AT].reshape(t.OUTPUTS, t.SOURCES)[:m, :n]
        total += 2 * int(np.count_nonzero(coef)) + 2 * int(np.count_nonzero(floats[t.PREV_AT : t.LOW_AT]))
        total += int(np.count_nonzero((ints[t.SCALE_AT :][:n] != t.NONE) & (coef != 0).any(axis=0)))
    return total * int(math.prod(pool.shape[2:]))


def table_rows(table: StepTable, rows: Any) -> list[tuple[Any, Any]]:
    """Numpy rows of the samples of a call."""
    ints, floats = (a.cpu().numpy() if table.is_torch else a for a in (table.ints, table.floats))
    numbers = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    return [(ints[r], floats[r]) for r in numbers]
