"""Arguments of `qk_norm_rope`, by plain attribute access and few calls, so that a call stays short."""

from __future__ import annotations

from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import DTYPES, dtype_name

KINDS = ("rms", "layer", "none")
PAIRS = ("interleaved", "half")


def check(
    query: Any,
    key: Any,
    query_affine: tuple[Any, Any],
    key_affine: tuple[Any, Any],
    cos: Any,
    sin: Any,
    kind: str,
    pairs: str,
    eps: float,
    rotate_from: int,
    rotate_key: bool,
    out: tuple[Any, Any] | None,
) -> str:
    """Name of the working dtype. Raises ShapeError, DtypeError, ArgumentError."""
    name = dtype_name(query.dtype)
    if name not in DTYPES:
        raise DtypeError(f"qk_norm_rope: query is {name}, needs float32 or bfloat16 (float64 in the reference)")
    if kind not in KINDS:
        raise ArgumentError(f"qk_norm_rope: kind is {kind!r}, needs one of {KINDS}")
    if pairs not in PAIRS:
        raise ArgumentError(f"qk_norm_rope: pairs is {pairs!r}, needs one of {PAIRS}")
    if not 0.0 <= eps < float("inf"):
        raise ArgumentError(f"qk_norm_rope: eps is {eps}, needs a finite number of 0 or more")
    shape, many = query.shape, key.shape
    if len(shape) != 4:
        raise ShapeError(f"qk_norm_rope: query has shape {tuple(shape)}, needs [B, N, H, K]")
    if len(many) != 4 or many[0] != shape[0] or many[3] != shape[3]:
        needs = f"[{shape[0]}, M, H2, {shape[3]}]"
        raise ShapeError(f"qk_norm_rope: key has shape {tuple(many)}, needs {needs} beside query")
    _check_like("query", query, query)
    _check_like("key", key, query)
    if query_affine[0] is not None or query_affine[1] is not None:
        _check_affine("query", query_affine, query, kind)
    if key_affine[0] is not None or key_affine[1] is not None:
        _check_affine("key", key_affine, key, kind)
    if cos is not None or sin is not None:
        _check_tables(query, min(shape[1], many[1]) if rotate_key else shape[1], cos, sin, rotate_from)
    if out is not None:
        for i, wanted in enumerate((shape, many)):
            if out[i].shape != wanted:
                got = tuple(out[i].shape)
                raise ShapeError(f"qk_norm_rope: out[{i}] has shape {got}, needs {tuple(wanted)}")
            _check_like(f"out[{i}]", out[i], query)
    return name


def _check_like(what: str, tensor: Any, query: Any) -> None:
    """Dtype and device of query; channels side by side."""
    if tensor.dtype != query.dtype:
        got, needs = dtype_name(tensor.dtype), dtype_name(query.dtype)
        raise DtypeError(f"qk_norm_rope: {what} is {got}, needs {needs} as query")
    if tensor.device != query.device or tensor.stride(3) != 1:
        _check_place(what, tensor, query)


def _check_affine(side: str, affine: tuple[Any, Any], of: Any, kind: str) -> None:
    """Weight and bias of one head or of all, float32 or the dtype of `of`."""
    if kind == "none":
        raise ArgumentError(f"qk_norm_rope: weight or bias of {side} is given with kind 'none'; leave it out")
    _, _, heads, width = of.shape
    for vector in affine:
        if vector is None:
            continue
        size = vector.shape
        if len(size) != 1 or (size[0] != width and size[0] != heads * width):
            needs = f"[{width}] or [{heads * width}]"
            raise ShapeError(f"qk_norm_rope: {_name(side, affine, vector)} has shape {tuple(size)}, needs {needs}")
        if vector.dtype != of.dtype and dtype_name(vector.dtype) != "float32":
            got, wanted = dtype_name(vector.dtype), " or ".join({"float32": 0, dtype_name(of.dtype): 0})
            raise DtypeError(f"qk_norm_rope: {_name(side, affine, vector)} is {got}, needs {wanted}")
        if vector.device != of.device or vector.stride(0) != 1:
            _check_place(_name(side, affine, vector), vector, of)
    weight, bias = affine
    if weight is not None and bias is not None and weight.shape != bias.shape:
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ShapeError(f"qk_norm_rope: weight and bias of {side} have shapes {shapes}; needs the same")


def _name(side: str, affine: tuple[Any, Any], vector: Any) -> str:
    return f"{side}_{'weight' if vector is affine[0] else 'bias'}"


def _check_tables(query: Any, tokens: int, cos: Any, sin: Any, rotate_from: int) -> None:
    """cos and sin [R, K] or [B, R, K], rows for tokens that query and, where they turn, keys have."""
    if cos is None or sin is None:
        raise ArgumentError("qk_norm_rope: cos and sin come together; one of them is None")
    batch, _, _, width = query.shape
    shape = cos.shape
    if width % 2:
        raise ShapeError(f"qk_norm_rope: heads of {width} channels cannot be turned in pairs; needs an even number")
    rank = len(shape)
    if (rank != 2 and rank != 3) or shape[-1] != width or (rank == 3 and shape[0] != 1 and shape[0] != batch):
        needs = f"[R, {width}] or [{batch}, R, {width}]"
        raise ShapeError(f"qk_norm_rope: cos has shape {tuple(shape)}, needs {needs}")
    if sin.shape != shape:
        raise ShapeError(f"qk_norm_rope: cos has shape {tuple(shape)}, sin {tuple(sin.shape)}; needs the same")
    for what, table in (("cos", cos), ("sin", sin)):
        name = dtype_name(table.dtype)
        if name != "float32" and not (name == "float64" and table.dtype == query.dtype):
            raise DtypeError(f"qk_norm_rope: {what} is {name}, needs float32; use .float()")
        if table.device != query.device or table.stride(-1) != 1:
            _check_place(what, table, query)
    rows = shape[-2]
    if rotate_from < 0 or rotate_from + rows > tokens:
        raise ShapeError(
            f"qk_norm_rope: cos has {rows} rows for the tokens from {rotate_from} on, there are {tokens} tokens; give "
            "the rows of the turned tokens alone"
        )


def _check_place(what: str, tensor: Any, query: Any) -> None:
    """On the device of query; strides of an axis of one element mean nothing."""
    if tensor.device != query.device:
        where = f"{what} is on {tensor.device}, query on {query.device}"
        raise ArgumentError(f"qk_norm_rope: {where}; move it with .to(device)")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        stride = tensor.stride(-1)
        raise ShapeError(f"qk_norm_rope: {what} has stride {stride} along its last axis, needs 1; call .contiguous()")
