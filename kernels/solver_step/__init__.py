"""The fused solver step: guidance, conversion, affine update and history write of a row in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from vivace.kernels.solver_step.table import Output, Reduction, StepTable, build_row, build_table
from vivace.kernels.spec import CPU, choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

# A bound step: row numbers of the samples, and the classes of their tokens where rows go by class.
Launch: TypeAlias = "Callable[[Sequence[int], Tensor | None], object]"

__all__ = ["Output", "Reduction", "StepTable", "bind_step", "build_row", "build_table", "solver_step"]


def solver_step(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Any,
    index: Any,
    *,
    net: Tensor | None = None,
    tensors: Sequence[Tensor] = (),
    seeds: Any = None,
    pictures: Any = None,
    adjust: Tensor | None = None,
    classes: Tensor | None = None,
    patch: Sequence[int] = (),
    backend: str | None = None,
) -> None:
    """y_k = clamp(sum_j coef[k][j] * source_j * scale_j + sum_{l<k} prev[k][l] * y_l, low_k, high_k), per sample.

    Sample b runs row r = rows[b] of the table on lane index[b] of the pool; samples may run different rows. Per
    element, every source is read before any y is written, so a destination may be a source. A source whose coefficients
    in the row are all 0 is not read, a term with coefficient 0 adds nothing (NaN there stays there), NaN passes the
    clamp. An adjusted output takes (low, high, gain) of its sample instead: y_k = clamp(.., low, high) * gain.
    With `classes` an element of sample b runs row rows[b] + c instead, c the class of the token that it belongs to: it
    has the bits of that row, and what that row does not write stays.
    Each product (source by scale, then by coefficient) and each sum is rounded on its own, in the dtype of the pool, j
    ascending, then l ascending: every backend gives the same bits in float32, noise aside.

    Args:
        pool: the state, float32 [S, capacity, *L], contiguous; slots in a row's codes index S. Written in place.
            float64 runs in the reference only.
        outs: network outputs by branch, each [B, *L], float32 | bfloat16 | float16 (float64 with a float64 pool); the
            sample axis may have any stride, a sample that is not contiguous is copied first.
        table: rows as data, on the device of the pool, numbers in its dtype; a numpy table is copied there every call.
            Layout: `solver_step.table`.
        rows, index: row and lane of each sample, int64 or int32 [B], on the host (tensor, numpy array or list) or on
            the device; lanes must differ. What is on the device is not checked, so that nothing waits for it.
        net: network-input plane [capacity, *L], contiguous, any of the dtypes of `outs`; rounded to nearest even.
            Needed when a row writes it.
        tensors: side-car tensors, each [*L], contiguous, dtype of the pool.
        seeds, pictures: 64-bit request seed (as int64 bits) and picture number per sample, int64 [B]. Needed when a row
            reads noise; element i of draw k is `philox_normal(..., seeds, pictures, k)`.
        adjust: (low, high, gain) per sample [B, 3], contiguous, dtype of the pool: what `sample_adjust` returned.
            Needed when a row has adjusted outputs.
        classes: class of every token, uint8 [B, N], contiguous, on the device of the pool; tokens are patches of the
            sample's axes behind the first one, in row-major order. What is on a device is not checked.
        patch: edge of a token by axis, one for each axis behind the first one, or for all.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: nothing; `pool` and `net` are written at the lanes of the samples.
    Raises: ShapeError, DtypeError, ArgumentError (rows, lanes, missing inputs), BackendError.
    Source: Zhao et al. 2023, algorithms 1 and 2 merged into one row; Ho and Salimans 2022, eq. 6.
    """
    from vivace.kernels.solver_step.check import prepare

    given = (pool, outs, table, rows, index, net, tensors, seeds, pictures, adjust)
    call = prepare("solver_step", *given, classes=classes, patch=patch)
    choice = choose(SPEC, pool.device.type, str(pool.dtype)[6:], backend)
    if not len(call.rows) or not pool.numel():
        return
    load(SPEC, choice.backend)(
        pool,
        call.outs,
        call.table,
        call.rows,
        call.index,
        net=net,
        tensors=tensors,
        seeds=call.seeds,
        pictures=call.pictures,
        adjust=adjust,
        classes=classes,
        patch=patch,
    )


def bind_step(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Sequence[int],
    index: Sequence[int],
    *,
    net: Tensor,
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    pictures: Sequence[int],
    classes: Tensor | None = None,
    patch: Sequence[int] = (),
) -> Launch | None:
    """(rows, classes) -> solver_step(pool, outs, table, rows, index, ...): a loop's launch, tensors checked once.

    Arguments are those of `solver_step`; `rows` and `classes` are those of the first call, and none has adjusted
    outputs. The launch holds addresses, not tensors: the caller keeps every tensor where it is; classes it is handed
    anew. None where nothing can be bound, on other devices and dtypes or when a tensor has to be copied first: call
    `solver_step`. Later rows, and what their codes reach, are checked in C++ (ValueError).
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    """
    from vivace.kernels.solver_step.check import prepare

    given: Any = {"net": net, "tensors": tensors, "seeds": seeds, "pictures": pictures}
    choice = choose(SPEC, pool.device.type, str(pool.dtype)[6:])
    tokens: Any = {"classes": classes, "patch": patch}
    call = prepare("solver_step", pool, outs, table, rows, index, net, tensors, seeds, pictures, **tokens)
    kept = all(own is out for own, out in zip(call.outs, outs, strict=True)) and call.table is table
    if choice.backend != CPU or not kept or not pool.numel():
        return None
    from vivace.kernels.solver_step.cpu_impl import bound

    return bound(pool, outs, table, index, **given, patch=patch)


SPEC = define("solver_step")
