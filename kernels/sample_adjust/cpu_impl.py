"""`sample_adjust` on the CPU: csrc/ops/sample_adjust.*, radix selection and sums over pieces in cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vivace import _C
from vivace.kernels.solver_step.cpu_impl import packed, why_not

if TYPE_CHECKING:
    from torch import Tensor

    from vivace.kernels.solver_step.table import StepTable

__all__ = ["sample_adjust", "why_not"]


def sample_adjust(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    *,
    tensors: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    pictures: Tensor | None = None,
) -> Tensor:
    """(-s, s, 1/s), s = min(max(quantile(|y_0|, ratio), 1), max), or (-inf, inf, phi std(y_1) / std(y_0) + 1 - phi).

    A sample is reduced by one thread; the bits do not depend on their number.
    """
    adjust = pool.new_empty(len(rows), 3)
    _C.sample_adjust(**packed(pool, outs, table, rows, index, tensors, seeds, pictures), adjust=adjust.data_ptr())
    return adjust
