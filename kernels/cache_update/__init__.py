"""What a row of a plan keeps for later rows: a value and its backward differences, in one pass with the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import ArgumentError
from vivace.kernels.cache_update.check import check_ids, check_kept, check_lanes, check_rows, flat, tokens_of, working
from vivace.kernels.norm_modulate.check import as_rows, check_like, check_vector
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["cache_update"]


def cache_update(
    kept: Tensor,
    lanes: Tensor,
    fresh: Tensor,
    *,
    base: Tensor | None = None,
    made: int = 0,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """f = fresh - base; D_0' = f, D_{j+1}' = D_j' - D_j for j < made; hidden + gate * f.

    Planes are rounded to the dtype of the store. A difference is that of the new value, not rounded yet, to the old
    plane as it is stored, so that the new value's rounding is not in it; the sum is of f itself. Arithmetic is float32,
    float64 for float64; differences, products and sums are rounded one by one, so every backend gives the same bits,
    and the sum has those of `gated_residual` and of a linear with gate and residual.

    Args:
        kept: [L, P, N, W] in one piece, L lanes of P planes, written at `lanes`: plane 0 the newest value, plane j its
            j-th backward difference; planes beyond `made` stay. float32 | bfloat16 | float16 | float8_e4m3fn (beyond
            448 cut off, infinity too) | int8 (as `quantize_tokens` makes it); float64 beside float64.
        lanes: int64 [R], distinct: where each row's planes lie. Numbers on a GPU are not looked at.
        fresh: float32 | bfloat16 [R, N, W] (float16 on a GPU and in the reference, float64 in the reference); rows may
            lie anywhere, elements of a row side by side. Other ranks: [R, ..., W], and kept alike.
        base: taken off first, shape and dtype of fresh; None: 0.
        made: differences that are made, 0 .. P - 1; reads as many planes, which must have been written.
        hidden: [R, N, W], any of the dtypes of fresh; None: nothing is added.
        gate: [W], [R, W] or [R, N, W], with 1 for R or N where it is shared; float32 or hidden's dtype. None: 1.
        out: written when given, shape and dtype of hidden; may be hidden.
        scales: float32 [L, P, N], written with int8 planes: the scale of each row.
        ids: int32 [n, M], distinct in a row, R a multiple of n: row r is about tokens ids[r % n] alone; fresh, base,
            hidden and out are [R, M, W] and all else of kept stays. Numbers on a GPU are not looked at. None: all N.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: hidden + gate * f, dtype of hidden; None without hidden. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Selvaraju et al. 2024 (FORA); Liu et al. 2025 (TaylorSeer), its differences left undivided.
    """
    op = "cache_update"
    dtypes = _check(kept, lanes, fresh, base, made, hidden, scales, ids)
    if hidden is None and (gate is not None or out is not None):
        raise ArgumentError(f"{op}: gate and out are for a sum with hidden, which is not given")
    choice = choose(SPEC, kept.device.type, dtypes, backend)
    if fresh.dim() != 3:
        fresh, base, into, gate, written = as_rows(op, fresh, (base, hidden), (gate,), (out,))
        if hidden is not None and out is None:
            out = hidden.new_empty(hidden.shape)
            written = out.view(into.shape)
    else:
        into, written = hidden, out
    if hidden is not None:
        if gate is not None:
            check_vector(op, "gate", gate, into)
        if written is not None:
            check_like(op, "out", written, into)
    if not fresh.numel():
        return None if hidden is None else hidden.new_empty(hidden.shape) if out is None else out
    planes, factors = flat(kept, scales)
    result: Tensor | None = load(SPEC, choice.backend)(
        planes, lanes, fresh, base=base, made=made, hidden=into, gate=gate, out=written, scales=factors, ids=ids
    )
    return result if out is None else out


def _check(
    kept: Tensor,
    lanes: Tensor,
    fresh: Tensor,
    base: Tensor | None,
    made: int,
    hidden: Tensor | None,
    scales: Tensor | None,
    ids: Tensor | None,
) -> str:
    """All but gate and out, which follow from hidden; returns the dtypes that decide who can run."""
    op = "cache_update"
    store = check_kept(op, kept, scales)
    check_lanes(op, lanes, kept, distinct=True)
    if ids is not None:
        check_ids(op, ids, lanes, kept)
    dtype = check_rows(op, "fresh", fresh, (lanes.shape[0], *tokens_of(kept, ids), kept.shape[-1]), kept)
    if base is not None:
        check_like(op, "base", base, fresh)
    if not 0 <= made < kept.shape[1]:
        raise ArgumentError(f"{op}: made is {made}, needs 0 to {kept.shape[1] - 1}, as kept has {kept.shape[1]} planes")
    beside = dtype if hidden is None else check_rows(op, "hidden", hidden, fresh.shape, kept)
    return working(op, store, dtype, beside)


SPEC = define("cache_update")
