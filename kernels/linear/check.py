"""Arguments of the epilogue that the linears share: residual + gate * act(y + bias), y [..., N]."""

from __future__ import annotations

from math import prod
from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import dtype_name

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu")


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
        if tuple(bias.shape) != shape[-1:]:
            raise ShapeError(
                f"{op}: bias has shape {tuple(bias.shape)}, needs [{shape[-1]}], one for each row of weight"
            )
        _check_vector(op, "bias", bias, like, dtype)
    if gate is not None:
        _check_gate_shape(op, tuple(gate.shape), shape)
        _check_vector(op, "gate", gate, like, dtype)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, needs {shape} as the result")
        if tensor.dtype != dtype:
            raise DtypeError(f"{op}: {name} is {dtype_name(tensor.dtype)}, needs {dtype_name(dtype)} as the result")
        check_place(op, name, tensor, like)


def check_place(op: str, name: str, tensor: Any, like: Any) -> None:
    """On the device of `like`, elements of the last axis side by side. Raises ArgumentError, ShapeError."""
    if tensor.device != like.device:
        raise ArgumentError(f"{op}: {name} is on {tensor.device}, x on {like.device}; move it with .to(device)")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        stride = tensor.stride(-1)
        raise ShapeError(f"{op}: {name} has stride {stride} along its last axis, needs 1; call .contiguous()")


def _check_gate_shape(op: str, gate: tuple[int, ...], shape: tuple[int, ...]) -> None:
    batch, columns = shape[0] if len(shape) > 1 else 1, shape[-1]
    tokens = prod(shape[1:-1])

    def fits(axes: tuple[int, ...]) -> bool:
        lead = gate[:-1]
        return len(lead) == len(axes) and all(size in (1, axis) for size, axis in zip(lead, axes, strict=True))

    if gate[-1:] != (columns,) or not any(map(fits, ((), (batch,), (batch, tokens), shape[:-1]))):
        needs = f"[{columns}], [{batch}, {columns}] or [{batch}, {tokens}, {columns}] (1 for {batch} and {tokens} too)"
        raise ShapeError(f"{op}: gate has shape {gate}, needs {needs} for a result {shape}")


def _check_vector(op: str, name: str, vector: Any, like: Any, dtype: Any) -> None:
    allowed = dict.fromkeys(("float32", dtype_name(dtype), dtype_name(like.dtype)))
    allowed.pop("int8", None)
    if dtype_name(vector.dtype) not in allowed:
        raise DtypeError(f"{op}: {name} is {dtype_name(vector.dtype)}, needs {' or '.join(allowed)}")
    check_place(op, name, vector, like)
