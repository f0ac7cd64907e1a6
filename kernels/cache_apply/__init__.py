"""What a row of a plan reuses or forecasts from what earlier rows kept, in one pass with the residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.cache_update.check import (
    check_device,
    check_ids,
    check_kept,
    check_lanes,
    check_rows,
    flat,
    tokens_of,
    working,
)
from vivace.kernels.norm_modulate.check import as_rows, check_vector, dtype_name
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["cache_apply"]


def cache_apply(
    kept: Tensor,
    lanes: Tensor,
    weights: Tensor,
    *,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """v = sum_j weights[r, j] * kept[lanes[r], j]; hidden + gate * v, or v.

    Arithmetic is float32, float64 for float64; products and sums are rounded one by one, planes in the order 0, 1, ...,
    so every backend gives the same bits. A plane times 1 is the plane.

    Args:
        kept: planes [L, P, N, W] in one piece, as `cache_update` writes them.
        lanes: int64 [R]: where each row's planes lie; rows may share one. Numbers on a GPU are not looked at.
        weights: float32 [R, terms], terms 1 .. P: of the first planes; each of them is read, also for a weight of 0.
        hidden: float32 | bfloat16 [R, N, W] (float16 on a GPU and in the reference, float64 in the reference); rows may
            lie anywhere, elements of a row side by side. Other ranks: [R, ..., W], and kept alike. None: v is returned.
        gate: [W], [R, W] or [R, N, W], with 1 for R or N where it is shared; float32 or hidden's dtype. None: 1.
        out: written when given; may be hidden.
        scales: float32 [L, P, N] of int8 planes.
        ids: int32 [n, M], R a multiple of n: row r is about tokens ids[r % n] alone; hidden and out are [R, M, W].
            Numbers on a GPU are not looked at. None: all N.
        dtype: of v where hidden is None; None: that of `out`, else float32 (float64 of float64).
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [R, N, W], dtype of hidden, or `dtype`. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Selvaraju et al. 2024 (FORA); Liu et al. 2025 (TaylorSeer).
    """
    op = "cache_apply"
    store = check_kept(op, kept, scales)
    check_lanes(op, lanes, kept, distinct=False)
    _check_weights(op, weights, lanes, kept)
    if ids is not None:
        check_ids(op, ids, lanes, kept)
    shape = (lanes.shape[0], *tokens_of(kept, ids), kept.shape[-1])
    if hidden is None and gate is not None:
        raise ArgumentError(f"{op}: gate is for a sum with hidden, which is not given")
    if hidden is not None:
        check_rows(op, "hidden", hidden, shape, kept)
    wanted = _result_dtype(op, kept, weights, hidden, out, dtype)
    if out is None:
        out = kept.new_empty(shape, dtype=wanted)
    name = check_rows(op, "out", out, shape, kept)
    choice = choose(SPEC, kept.device.type, working(op, store, name, "float32"), backend)
    into, written = hidden, out
    if out.dim() != 3:
        rows, gate, written = as_rows(op, out if hidden is None else hidden, (), (gate,), (out,))
        into = None if hidden is None else rows
    if into is not None and gate is not None:
        check_vector(op, "gate", gate, into)
    if out.numel():
        planes, factors = flat(kept, scales)
        load(SPEC, choice.backend)(
            planes, lanes, weights, hidden=into, gate=gate, out=written, scales=factors, dtype=wanted, ids=ids
        )
    return out


def _check_weights(op: str, weights: Tensor, lanes: Tensor, kept: Tensor) -> None:
    """float32 [R, terms], terms 1 .. P (float64 beside float64). Raises ShapeError, DtypeError, ArgumentError."""
    rows, planes = lanes.shape[0], kept.shape[1]
    if weights.dim() != 2 or weights.shape[0] != rows or not 1 <= weights.shape[1] <= planes:
        raise ShapeError(
            f"{op}: weights have shape {tuple(weights.shape)}, need [{rows}, 1 to {planes}]: planes that each row reads"
        )
    if dtype_name(weights.dtype) not in ("float32", "float64"):
        raise DtypeError(f"{op}: weights are {dtype_name(weights.dtype)}, need float32")
    check_device(op, "weights", weights, kept)


def _result_dtype(
    op: str, kept: Tensor, weights: Tensor, hidden: Tensor | None, out: Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    """That of hidden, of v as asked for, of out, or what arithmetic is in. Raises DtypeError where they differ."""
    import torch

    wide = torch.float64 in (kept.dtype, weights.dtype)
    if hidden is not None and dtype is None and out is None and not wide and hidden.dtype != torch.float64:
        return hidden.dtype
    found = (None if hidden is None else hidden.dtype, dtype, None if out is None else out.dtype)
    wanted = next((each for each in found if each is not None), torch.float64 if wide else torch.float32)
    if any(each not in (None, wanted) for each in found) or wide != (wanted == torch.float64):
        told = ", ".join(
            f"{name} {dtype_name(each)}"
            for name, each in zip(("hidden", "dtype", "out"), found, strict=True) if each is not None
        )  # fmt: skip
        raise DtypeError(
            f"{op}: {told or 'v'} beside kept {dtype_name(kept.dtype)}, weights {dtype_name(weights.dtype)}: "
            "needs one dtype of results, float64 only of float64 weights"
        )
    return wanted


SPEC = define("cache_apply")
