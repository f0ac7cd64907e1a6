"""`sample_adjust` on the CPU: csrc/ops/sample_adjust.*, radix selection and sums over pieces in cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vivace import _C
from vivace.kernels.solver_step.cpu_impl import why_not

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
    import torch

    adjust = pool.new_empty(len(rows), 3)
    _C.sample_adjust(
        adjust=adjust.data_ptr(),
        pool=pool.data_ptr(),
        slots=pool.shape[0],
        capacity=pool.shape[1],
        numel=math.prod(pool.shape[2:]),
        outs=[(out.data_ptr(), out.stride(0), str(out.dtype)[6:]) for out in outs],
        tensors=[tensor.data_ptr() for tensor in tensors],
        ints=table.ints.data_ptr(),
        floats=table.floats.data_ptr(),
        table_rows=len(table),
        rows=rows.tolist(),
        index=index.tolist(),
        seeds=None if seeds is None else seeds.tolist(),
        pictures=None if pictures is None else pictures.tolist(),
        threads=torch.get_num_threads(),
    )
    return adjust
