"""What `cache_update` and `cache_apply` are handed: memory of kept planes, lanes in it, rows beside it."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import dtype_name

STORES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "float64")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KEPT_AS = " kept as "  # between the dtypes of the rows and of the store, for the choice of a backend


def check_kept(op: str, kept: Any, scales: Any) -> str:
    """Planes [L, P, ..., W] in one piece and, for int8, their scales [L, P, ...]; returns the name of the store.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    store = dtype_name(kept.dtype)
    if store not in STORES:
        raise DtypeError(f"{op}: kept is {store}, needs one of {', '.join(STORES)}")
    if kept.dim() < 3 or not kept.shape[1] or not kept.is_contiguous():
        raise ShapeError(f"{op}: kept has shape {tuple(kept.shape)}, needs [L, P, ..., W] in one piece, P of 1 or more")
    if (scales is None) == (store == "int8"):
        raise ArgumentError(f"{op}: kept is {store}: scales are for int8 planes, and they need them")
    if scales is None:
        return store
    if scales.shape != kept.shape[:-1] or not scales.is_contiguous():
        raise ShapeError(
            f"{op}: scales have shape {tuple(scales.shape)}, need {tuple(kept.shape[:-1])} in one piece: one for a row"
        )
    if dtype_name(scales.dtype) not in ("float32", "float64"):
        raise DtypeError(f"{op}: scales are {dtype_name(scales.dtype)}, need float32")
    check_device(op, "scales", scales, kept)
    return store


def check_lanes(op: str, lanes: Any, kept: Any, *, distinct: bool) -> None:
    """int64 [R], on the device of kept; on a processor their numbers are looked at too.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    if lanes.dim() != 1:
        raise ShapeError(f"{op}: lanes have shape {tuple(lanes.shape)}, need [R]: one lane for each row")
    if dtype_name(lanes.dtype) != "int64":
        raise DtypeError(f"{op}: lanes are {dtype_name(lanes.dtype)}, need int64")
    check_device(op, "lanes", lanes, kept)
    if lanes.device.type != "cpu":
        return
    numbers, count = lanes.tolist(), kept.shape[0]
    if numbers and (min(numbers) < 0 or max(numbers) >= count):
        raise ArgumentError(f"{op}: lanes {numbers} leave the {count} that kept has")
    if distinct and len(set(numbers)) < len(numbers):
        raise ArgumentError(f"{op}: lanes {numbers} hold one twice; each row needs its own")


def check_ids(op: str, ids: Any, lanes: Any, kept: Any) -> None:
    """int32 [n, M] in one piece, n dividing the rows, beside kept tokens of one axis; numbers looked at on a processor.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    if kept.dim() != 4 or ids.dim() != 2 or not ids.shape[0] or lanes.shape[0] % ids.shape[0]:
        raise ShapeError(
            f"{op}: ids have shape {tuple(ids.shape)}, need [n, M] in one piece beside kept [L, P, N, W] and "
            f"{lanes.shape[0]} lanes, a multiple of n"
        )
    if dtype_name(ids.dtype) != "int32" or not ids.is_contiguous():
        raise DtypeError(f"{op}: ids are {dtype_name(ids.dtype)}, need int32 in one piece")
    check_device(op, "ids", ids, kept)
    if ids.device.type != "cpu" or not ids.numel():
        return
    if int(ids.min()) < 0 or int(ids.max()) >= kept.shape[2]:
        raise ArgumentError(
            f"{op}: ids from {int(ids.min())} to {int(ids.max())} leave the {kept.shape[2]} tokens kept"
        )


def check_rows(op: str, what: str, rows: Any, shape: tuple[int, ...], kept: Any) -> str:
    """Rows of that shape, elements side by side, on the device of kept; returns the name of their dtype.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    if rows.shape != shape:
        raise ShapeError(f"{op}: {what} has shape {tuple(rows.shape)}, needs {tuple(shape)} beside kept and lanes")
    name = dtype_name(rows.dtype)
    if name not in DTYPES:
        raise DtypeError(f"{op}: {what} is {name}, needs float32, bfloat16 or float16 (float64 in the reference)")
    check_device(op, what, rows, kept)
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        raise ShapeError(f"{op}: {what} has stride {rows.stride(-1)} along its last axis, needs 1; call .contiguous()")
    return name


def check_device(op: str, what: str, tensor: Any, kept: Any) -> None:
    """One device for all. Raises ArgumentError."""
    if tensor.device != kept.device:
        raise ArgumentError(f"{op}: {what} is on {tensor.device}, kept on {kept.device}; move it with .to(device)")


def tokens_of(kept: Any, ids: Any) -> tuple[int, ...]:
    """The shape of the tokens of a row that a call is about."""
    return tuple(kept.shape[2:-1]) if ids is None else (ids.shape[1],)


def flat(kept: Any, scales: Any) -> tuple[Any, Any]:
    """Kept planes of any rank and their scales as [L, P, N, W] and [L, P, N]."""
    if kept.dim() == 4:
        return kept, scales
    lanes, planes, tokens, width = kept.shape[0], kept.shape[1], math.prod(kept.shape[2:-1]), kept.shape[-1]
    return kept.view(lanes, planes, tokens, width), None if scales is None else scales.view(lanes, planes, tokens)


@cache
def working(op: str, store: str, *rows: str) -> str:
    """The dtypes that decide who can run: of the rows (the rarest of them) and of the store. Raises DtypeError."""
    rarest = next((name for name in ("float64", "float16", "bfloat16") if name in rows), "float32")
    if store == "float64" and rarest != "float64":
        raise DtypeError(f"{op}: kept is float64, beside rows of {rarest}; it needs float64 rows")
    return rarest + KEPT_AS + store
