"""What is multiplied with rows before they are quantized, and scales given for them: checks, and one shape of them."""

from __future__ import annotations

from typing import Any

from vivace.errors import DtypeError, ShapeError
from vivace.kernels.linear.check import check_place
from vivace.kernels.norm_modulate.check import dtype_name

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_rows(op: str, x: Any, smooth: Any, scale: Any) -> str:
    """Rows [B, ..., K] that are to be quantized, what multiplies them and scales given; returns the name of the dtype.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    dtype = dtype_name(x.dtype)
    if dtype not in DTYPES:
        raise DtypeError(f"{op}: x is {dtype}, needs float32, bfloat16 or float16 (float64 in the reference)")
    if not x.dim() or not x.shape[-1]:
        raise ShapeError(f"{op}: x has shape {tuple(x.shape)}, needs [..., K] with K of 1 or more")
    check_place(op, "x", x, x)
    if smooth is not None:
        check_smooth(op, smooth, x)
    if scale is not None:
        check_given(op, "scale", scale, x)
    return dtype


def check_smooth(op: str, smooth: Any, x: Any) -> None:
    """[K] beside x [..., K], float32 (float64 beside float64). Raises ShapeError, DtypeError, ArgumentError."""
    if tuple(smooth.shape) != tuple(x.shape[-1:]):
        raise ShapeError(f"{op}: smooth has shape {tuple(smooth.shape)}, needs [{x.shape[-1]}], the width of a row")
    _check_wide(op, "smooth", smooth, x)


def check_given(op: str, name: str, scale: Any, x: Any) -> None:
    """[], [B] or [B, 1, ...] beside x [B, ..., K], float32 (float64 beside float64); B may be 1.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    shape, batch = tuple(scale.shape), _samples(x)
    if shape[:1] not in ((), (1,), (batch,)) or any(size != 1 for size in shape[1:]):
        raise ShapeError(
            f"{op}: {name} has shape {shape}, needs [], [{batch}] or [{batch}, 1, ...]: one for each sample"
        )
    _check_wide(op, name, scale, x)


def by_sample(scale: Any, x: Any) -> Any:
    """A scale given for rows x [B, ..., K], as [B]."""
    return scale.reshape(-1).expand(_samples(x))


def _samples(x: Any) -> int:
    return int(x.shape[0]) if x.dim() > 1 else 1


def _check_wide(op: str, name: str, tensor: Any, x: Any) -> None:
    found, wide = dtype_name(tensor.dtype), dtype_name(x.dtype) == "float64"
    if found != "float32" and not (wide and found == "float64"):
        raise DtypeError(f"{op}: {name} is {found}, needs float32{' or float64' if wide else ''}")
    check_place(op, name, tensor, x)
