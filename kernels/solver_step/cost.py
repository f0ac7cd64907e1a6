"""What one call of `solver_step` moves and computes, from its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vivace.kernels.solver_step.table import (
    DESTINATION_AT, LOW_AT, NET, NONE, ONE, OUT, OUTPUTS, PREV_AT, SCALE_AT, SOURCE_AT, SOURCES, TENSOR, NOISE, StepTable
)  # fmt: skip


def bytes_moved(
    pool: Any, outs: Sequence[Any], table: StepTable, rows: Any, index: Any, *, net: Any = None, **_: Any
) -> int:
    """Bytes read and written once per element: distinct tensors a sample reads, plus its destinations."""
    total = 0
    for ints, floats in _rows(table, rows):
        n, m = int(ints[0]), int(ints[1])
        used = (floats[:PREV_AT].reshape(OUTPUTS, SOURCES)[:m, :n] != 0).any(axis=0)
        codes = set(ints[SOURCE_AT:][:n][used].tolist()) | set(ints[SCALE_AT:][:n][used].tolist())
        for code in codes - {NONE, ONE}:
            if OUT <= code < ONE:
                total += int(outs[code - OUT].element_size())
            elif code < OUT or TENSOR <= code < NOISE:
                total += int(pool.element_size())
        for code in ints[DESTINATION_AT:][:m].tolist():
            total += int((net if code == NET else pool).element_size())
    return total * math.prod(pool.shape[2:])


def flops(pool: Any, outs: Sequence[Any], table: StepTable, rows: Any, index: Any, **_: Any) -> int:
    """Multiplications and additions: two a nonzero coefficient, one a scale; noise and clamp not counted."""
    total = 0
    for ints, floats in _rows(table, rows):
        n, m = int(ints[0]), int(ints[1])
        coef = floats[:PREV_AT].reshape(OUTPUTS, SOURCES)[:m, :n]
        total += 2 * np.count_nonzero(coef) + 2 * np.count_nonzero(floats[PREV_AT:LOW_AT])
        total += np.count_nonzero((ints[SCALE_AT:][:n] != NONE) & (coef != 0).any(axis=0))
    return int(total) * math.prod(pool.shape[2:])


def _rows(table: StepTable, rows: Any) -> list[tuple[Any, Any]]:
    """Numpy rows of the samples of a call."""
    ints, floats = (a.cpu().numpy() if table.is_torch else a for a in (table.ints, table.floats))
    numbers = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    return [(ints[r], floats[r]) for r in numbers]
