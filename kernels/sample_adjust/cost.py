"""What one call of `sample_adjust` moves and computes, from its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vivace.kernels.solver_step import cost
from vivace.kernels.solver_step.table import StepTable


def bytes_moved(pool: Any, outs: Sequence[Any], table: StepTable, rows: Any, index: Any, **_: Any) -> int:
    """Bytes read once per element: distinct tensors a sample reads. Further passes are not counted."""
    read = sum(cost.bytes_read(pool, outs, *row) for row in cost.table_rows(table, rows))
    return read * int(math.prod(pool.shape[2:]))


def flops(pool: Any, outs: Sequence[Any], table: StepTable, rows: Any, index: Any, **_: Any) -> int:
    """Multiplications and additions of the combinations, computed once; the reduction itself is not counted."""
    return cost.flops(pool, outs, table, rows, index)
