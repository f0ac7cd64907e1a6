"""Arguments of `attention`, by plain attribute access and few calls, so that a call stays short."""

from __future__ import annotations

from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.cache_update.check import check_lanes
from vivace.kernels.norm_modulate.check import DTYPES, dtype_name


def check(
    query: Any,
    key: Any,
    value: Any,
    scale: float | None,
    out: Any,
    *,
    op: str = "attention",
    dtypes: tuple[str, ...] = DTYPES,
    lanes: Any = None,
) -> tuple[str, float]:
    """Name of the working dtype, and the scale. Raises ShapeError, DtypeError, ArgumentError."""
    name = dtype_name(query.dtype)
    if name not in dtypes:
        raise DtypeError(f"{op}: query is {name}, needs {dtypes[0]} or {dtypes[1]} (float64 in the reference)")
    shape, many = query.shape, key.shape
    if len(shape) != 4:
        raise ShapeError(f"{op}: query has shape {tuple(shape)}, needs [B, N, H, K]")
    if len(many) != 4 or (lanes is None and many[0] != shape[0]) or many[2:] != shape[2:]:
        needs = f"[{shape[0] if lanes is None else 'L'}, M, {shape[2]}, {shape[3]}]"
        raise ShapeError(f"{op}: key has shape {tuple(many)}, needs {needs} beside query {tuple(shape)}")
    if value.shape != many:
        raise ShapeError(f"{op}: value has shape {tuple(value.shape)}, needs {tuple(many)} as key")
    _check_like(op, "query", query, query)
    _check_like(op, "key", key, query)
    _check_like(op, "value", value, query)
    if out is not None:
        if out.shape != shape:
            raise ShapeError(f"{op}: out has shape {tuple(out.shape)}, needs {tuple(shape)} as query")
        _check_like(op, "out", out, query)
    if lanes is not None:
        check_lanes(op, lanes, key, distinct=False)
        if lanes.shape[0] != shape[0]:
            raise ShapeError(f"{op}: {lanes.shape[0]} lanes for {shape[0]} rows of query; needs one of each")
    if scale is None:
        return name, shape[3] ** -0.5 if shape[3] else 1.0
    if not 0.0 < scale < float("inf"):
        raise ArgumentError(f"{op}: scale is {scale}, needs a finite number above 0")
    return name, scale


def _check_like(op: str, what: str, tensor: Any, query: Any) -> None:
    """Dtype and device of query; elements of a head side by side, where there is more than one."""
    if tensor.dtype != query.dtype:
        got, needs = dtype_name(tensor.dtype), dtype_name(query.dtype)
        raise DtypeError(f"{op}: {what} is {got}, needs {needs} as query")
    if tensor.device != query.device:
        where = f"{what} is on {tensor.device}, query on {query.device}"
        raise ArgumentError(f"{op}: {where}; move it with .to(device)")
    stride = tensor.stride(3)
    if stride != 1 and tensor.shape[3] > 1:
        raise ShapeError(f"{op}: {what} has stride {stride} along its last axis, needs 1; call .contiguous()")
