"""Reductions over a sample, of a combination computed on the fly: dynamic threshold and guidance rescale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vivace.kernels.solver_step.table import StepTable
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sample_adjust"]


def sample_adjust(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Any,
    index: Any,
    *,
    tensors: Sequence[Tensor] = (),
    seeds: Any = None,
    pictures: Any = None,
    backend: str | None = None,
) -> Tensor:
    """(low, high, gain) = (-s, s, 1/s), s = min(max(quantile(|y_0|, ratio), 1), max), or (-inf, inf, f), per sample.

    f = phi * std(y_1) / std(y_0) + 1 - phi. Which of both, and the terms of y_0 and y_1, is said by row rows[b] of the
    table, a `Reduction`; `solver_step` then applies the result: y = clamp(.., low, high) * gain.
    y is computed as in `solver_step`, in the dtype of the pool, and never stored. The quantile is exact and that of
    torch.quantile: linear between neighbours, NaN when a y is NaN; its rank is rounded to float32 as there, in samples
    of more than 2^24 elements to float64. Deviations are unbiased, as torch.std, summed in float64, in an order that
    depends on the sample's size alone.

    Args:
        pool, outs, table, rows, index, tensors, seeds, pictures, backend: as in `solver_step`; the pool is only read.
    Returns: [B, 3] in the dtype and on the device of the pool; (-inf, inf, 1) for a sample without elements.
    Raises: ShapeError, DtypeError, ArgumentError (a row that reduces nothing, missing inputs), BackendError.
    Source: Saharia et al. 2022 (Imagen), section 2.3; Lin et al. 2023, eq. 16.
    """
    import math

    from vivace.kernels.solver_step.check import prepare

    call = prepare("sample_adjust", pool, outs, table, rows, index, None, tensors, seeds, pictures, reduces=True)
    choice = choose(SPEC, pool.device.type, str(pool.dtype)[6:], backend)
    if not len(call.rows) or not math.prod(pool.shape[2:]):
        return pool.new_tensor([-math.inf, math.inf, 1.0]).repeat(len(call.rows), 1)
    adjust: Tensor = load(SPEC, choice.backend)(
        pool,
        call.outs,
        call.table,
        call.rows,
        call.index,
        tensors=tensors,
        seeds=call.seeds,
        pictures=call.pictures,
    )
    return adjust


SPEC = define("sample_adjust")
