"""Tensors of the ops that take some tokens out of all, or put them back."""

from __future__ import annotations

from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import dtype_name

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_tokens(op: str, what: str, tensor: Any) -> str:
    """Rows [R, N, W], elements side by side; returns the name of their dtype. Raises ShapeError, DtypeError."""
    name = dtype_name(tensor.dtype)
    if name not in DTYPES:
        raise DtypeError(f"{op}: {what} is {name}, needs float32, bfloat16 or float16 (float64 in the reference)")
    if tensor.dim() != 3:
        raise ShapeError(f"{op}: {what} has shape {tuple(tensor.shape)}, needs [R, N, W]")
    if tensor.stride(2) != 1 and tensor.shape[2] > 1:
        raise ShapeError(f"{op}: {what} has stride {tensor.stride(2)} along its last axis, needs 1; call .contiguous()")
    return name


def check_ids(op: str, ids: Any, like: Any, tokens: int, rows: int) -> int:
    """int32 [n, M] in one piece, `rows` a multiple of n, which is returned; on a processor 0 .. tokens - 1.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    if ids.dim() != 2 or not ids.is_contiguous():
        raise ShapeError(f"{op}: ids have shape {tuple(ids.shape)}, need [n, M] in one piece")
    if dtype_name(ids.dtype) != "int32":
        raise DtypeError(f"{op}: ids are {dtype_name(ids.dtype)}, need int32")
    pictures = ids.shape[0]
    if rows != pictures and (not pictures or rows % pictures):
        raise ShapeError(f"{op}: {rows} rows beside ids of {pictures} pictures; needs a multiple")
    check_device(op, "ids", ids, like)
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(each) for each in ids.aminmax())
        if low < 0 or high >= tokens:
            raise ArgumentError(f"{op}: ids reach from {low} to {high}, need 0 .. {tokens - 1}")
    return rows


def check_out(op: str, what: str, out: Any, shape: tuple[int, ...], like: Any) -> Any:
    """A result of this shape, dtype and device as `like`; returned. Raises ShapeError, DtypeError, ArgumentError."""
    check_tokens(op, what, out)
    if tuple(out.shape) != shape:
        raise ShapeError(f"{op}: {what} has shape {tuple(out.shape)}, needs {shape}")
    if out.dtype != like.dtype:
        raise DtypeError(f"{op}: {what} is {dtype_name(out.dtype)}, needs {dtype_name(like.dtype)}")
    check_device(op, what, out, like)
    return out


def check_device(op: str, what: str, tensor: Any, like: Any) -> None:
    """One device for all. Raises ArgumentError."""
    if tensor.device != like.device:
        raise ArgumentError(f"{op}: {what} is on {tensor.device}, others on {like.device}; move it with .to(device)")
