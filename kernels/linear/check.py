"""Arguments that the linears share: places, scales of 8-bit numbers, and the epilogue residual + gate * act(y + bias).

A call of some microseconds spends most of them here, so a check that holds is a comparison or two; names are looked up
for messages alone.
"""

from __future__ import annotations

from math import prod
from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import dtype_name

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")
RESULTS = ("float32", "bfloat16", "float16", "float64")  # dtypes of a result


def check_epilogue(
    op: str,
    like: Any,
    shape: tuple[int, ...],
    dtype: Any,
    activation: str,
    bias: Any,
    gate: Any,
    residual: Any,
    out: Any,
) -> None:
    """What is added to and multiplied with a result of this shape and dtype, on the device of `like`.

    bias [N] and gate [N], [B, N], [B, tokens, N] or of the result's rank (1 for each but N too; B is the first axis,
    tokens the product of those between it and the last) are float32 or of the result's or `like`'s dtype; residual and
    out have the result's shape and dtype.

    Raises: ArgumentError, ShapeError, DtypeError.
    """
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"{op}: activation is {activation!r}, needs one of {ACTIVATIONS}")
    if bias is not None:
        if bias.shape != shape[-1:]:
            raise ShapeError(
                f"{op}: bias has shape {tuple(bias.shape)}, needs [{shape[-1]}], one for each row of weight"
            )
        _check_vector(op, "bias", bias, like, dtype)
    if gate is not None:
        _check_gate_shape(op, gate.shape, shape)
        _check_vector(op, "gate", gate, like, dtype)
    if residual is not None:
        _check_same(op, "residual", residual, like, shape, dtype)
    if out is not None and out is not residual:
        _check_same(op, "out", out, like, shape, dtype)


def check_place(op: str, name: str, tensor: Any, like: Any) -> None:
    """On the device of `like`, elements of the last axis side by side. Raises ArgumentError, ShapeError."""
    if tensor.device != like.device:
        raise ArgumentError(f"{op}: {name} is on {tensor.device}, x on {like.device}; move it with .to(device)")
    if not tensor.is_contiguous() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        stride = tensor.stride(-1)
        raise ShapeError(f"{op}: {name} has stride {stride} along its last axis, needs 1; call .contiguous()")


def check_scales(op: str, x: Any, weight: Any, x_scale: Any, weight_scale: Any, wide: Any) -> None:
    """Scales of rows x, one each or None, and of rows of a weight, one each, both of the dtype `wide`; places of all.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    if x_scale is not None:
        _check_scale(op, "x_scale", x_scale, x.shape[:-1], wide)
    _check_scale(op, "weight_scale", weight_scale, weight.shape[:1], wide)
    check_place(op, "x", x, x)
    check_place(op, "weight", weight, x)
    if x_scale is not None:
        check_place(op, "x_scale", x_scale, x)
    check_place(op, "weight_scale", weight_scale, x)


def result_dtype(op: str, x: Any, x_scale: Any, weight_scale: Any, out: Any, out_dtype: Any) -> Any:
    """The dtype of a product of 8-bit numbers: what is asked for, else that of out, of the rows before they were
    quantized, bfloat16; float64 beside float64 scales. Raises DtypeError.
    """
    double = dtype_name(weight_scale.dtype) == "float64"
    if out_dtype is None:
        out_dtype = out.dtype if out is not None else weight_scale.dtype if double else _own(x, x_scale)
    name = dtype_name(out_dtype)
    if name not in RESULTS or (name == "float64") != double:
        needs = "float64 of float64 scales" if double else "float32, bfloat16 or float16 of float32 scales"
        raise DtypeError(f"{op}: the result is to be {name}, needs {needs}")
    return out_dtype


def _own(x: Any, x_scale: Any) -> Any:
    import torch

    return x.dtype if x_scale is None else torch.bfloat16


def _check_scale(op: str, name: str, scale: Any, shape: Any, wide: Any) -> None:
    if scale.shape != shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(scale.shape)}, needs {tuple(shape)}")
    if scale.dtype != wide or dtype_name(wide) not in ("float32", "float64"):
        raise DtypeError(f"{op}: {name} is {dtype_name(scale.dtype)}, needs float32 (or float64, both)")


def _check_gate_shape(op: str, gate: Any, shape: tuple[int, ...]) -> None:
    if gate == shape[-1:]:
        return
    batch, columns, tokens, lead = shape[0] if len(shape) > 1 else 1, shape[-1], prod(shape[1:-1]), gate[:-1]
    axes = (batch, tokens)[: len(lead)] if len(lead) < 3 else shape[:-1]
    fits = len(lead) == len(axes) and all(size in (1, axis) for size, axis in zip(lead, axes, strict=True))
    if gate[-1:] != shape[-1:] or not fits:
        needs = f"[{columns}], [{batch}, {columns}] or [{batch}, {tokens}, {columns}] (1 for {batch} and {tokens} too)"
        raise ShapeError(f"{op}: gate has shape {tuple(gate)}, needs {needs} for a result {shape}")


def _check_vector(op: str, name: str, vector: Any, like: Any, dtype: Any) -> None:
    if vector.dtype != dtype and dtype_name(vector.dtype) != "float32":
        allowed = dict.fromkeys(("float32", dtype_name(dtype), dtype_name(like.dtype)))
        allowed.pop("int8", None)
        if dtype_name(vector.dtype) not in allowed:
            raise DtypeError(f"{op}: {name} is {dtype_name(vector.dtype)}, needs {' or '.join(allowed)}")
    check_place(op, name, vector, like)


def _check_same(op: str, name: str, tensor: Any, like: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if tensor.shape != shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, needs {shape} as the result")
    if tensor.dtype != dtype:
        raise DtypeError(f"{op}: {name} is {dtype_name(tensor.dtype)}, needs {dtype_name(dtype)} as the result")
    check_place(op, name, tensor, like)
