"""Tensors of the ops over rows of hidden states: checks by plain attribute access, so that a call stays short.

`op` names the op in messages. Nothing here needs torch to be imported, and nothing makes a tensor for [B, N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError

DTYPES = ("float32", "bfloat16", "float64")
KINDS = ("layer", "rms")
_NAMES: dict[Any, str] = {}


def dtype_name(dtype: Any) -> str:
    """ "float32" of torch.float32; kept, since making the text takes longer than finding it."""
    name = _NAMES.get(dtype)
    if name is None:
        name = _NAMES[dtype] = str(dtype).removeprefix("torch.")
    return name


def check_hidden(op: str, hidden: Any) -> str:
    """Name of the dtype of [B, N, D] hidden states. Raises ShapeError, DtypeError."""
    name = dtype_name(hidden.dtype)
    if name not in DTYPES:
        raise DtypeError(f"{op}: hidden is {name}, needs float32 or bfloat16 (float64 in the reference)")
    _check_rows(op, "hidden", hidden)
    return name


def check_like(op: str, what: str, tensor: Any, hidden: Any) -> None:
    """`tensor` has the shape, dtype and device of `hidden`. Raises ShapeError, DtypeError, ArgumentError."""
    if tensor.shape != hidden.shape:
        raise ShapeError(f"{op}: {what} has shape {tuple(tensor.shape)}, needs {tuple(hidden.shape)} as hidden")
    if tensor.dtype != hidden.dtype:
        raise DtypeError(f"{op}: {what} is {dtype_name(tensor.dtype)}, needs {dtype_name(hidden.dtype)} as hidden")
    _check_device(op, what, tensor, hidden)
    _check_rows(op, what, tensor)


def check_out(op: str, out: Any, hidden: Any, dtype: str) -> None:
    """`out` is like `hidden` of that dtype, or bfloat16 beside float32. Raises as `check_like` does."""
    if dtype != "float32" or dtype_name(out.dtype) != "bfloat16":
        return check_like(op, "out", out, hidden)
    if out.shape != hidden.shape:
        raise ShapeError(f"{op}: out has shape {tuple(out.shape)}, needs {tuple(hidden.shape)} as hidden")
    _check_device(op, "out", out, hidden)
    _check_rows(op, "out", out)


def check_vector(op: str, what: str, vector: Any, hidden: Any) -> None:
    """A modulation [D], [B, D] or [B, N, D], B and N also 1, float32 or the dtype of [B, N, D] hidden states.

    Raises: ShapeError, DtypeError, ArgumentError.
    """
    batch, tokens, width = hidden.shape
    shape = vector.shape
    fits = 1 <= len(shape) <= 3 and shape[-1] == width
    if fits and len(shape) > 1:
        fits = shape[0] == batch or shape[0] == 1
    if fits and len(shape) == 3:
        fits = shape[1] == tokens or shape[1] == 1
    if not fits:
        needs = f"[{width}], [{batch}, {width}] or [{batch}, {tokens}, {width}] (1 for {batch} and {tokens} too)"
        raise ShapeError(f"{op}: {what} has shape {tuple(shape)}, needs {needs} beside hidden {tuple(hidden.shape)}")
    _check_kind(op, what, vector, hidden)


def vector_strides(vector: Any) -> tuple[int, int]:
    """Strides of B and N of a modulation [D], [B, D] or [B, N, D]; 0 for an axis that is absent or of size 1."""
    sizes, strides = vector.shape, vector.stride()
    samples = strides[0] if len(sizes) > 1 and sizes[0] > 1 else 0
    return samples, strides[1] if len(sizes) > 2 and sizes[1] > 1 else 0


def check_weight(op: str, what: str, weight: Any, hidden: Any) -> None:
    """A weight or bias [D], float32 or the dtype of `hidden`. Raises ShapeError, DtypeError, ArgumentError."""
    shape = weight.shape
    if len(shape) != 1 or shape[0] != hidden.shape[-1]:
        raise ShapeError(f"{op}: {what} has shape {tuple(shape)}, needs [{hidden.shape[-1]}], the width of hidden")
    _check_kind(op, what, weight, hidden)


def check_norm(op: str, hidden: Any, scale: Any, shift: Any, weight: Any, bias: Any, kind: str, eps: float) -> None:
    """What a norm with modulation takes besides hidden. Raises ShapeError, DtypeError, ArgumentError."""
    if scale is not None:
        check_vector(op, "scale", scale, hidden)
    if shift is not None:
        check_vector(op, "shift", shift, hidden)
    if weight is not None:
        check_weight(op, "weight", weight, hidden)
    if bias is not None:
        check_weight(op, "bias", bias, hidden)
    if kind not in KINDS:
        raise ArgumentError(f"{op}: kind is {kind!r}, needs one of {KINDS}")
    if not 0.0 <= eps < float("inf"):
        raise ArgumentError(f"{op}: eps is {eps}, needs a finite number of 0 or more")


def as_rows(op: str, hidden: Any, tensors: Sequence[Any], vectors: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
    """(hidden, *tensors, *vectors, *outs) of any rank as for [B, N, D]; None stays None.

    The first axis is B, those between it and D make N; a vector of hidden's rank is taken along. Inputs that have no
    such view are copied; an output must be contiguous. Raises ShapeError.
    """
    shape = tuple(hidden.shape)
    if not shape:
        raise ShapeError(f"{op}: hidden has no axis, needs [..., D]")
    batch, width = shape[0] if len(shape) > 1 else 1, shape[-1]
    tokens = 1
    for size in shape[1:-1]:
        tokens *= size
    for what, tensor in (*(("an input", t) for t in tensors), *(("an output", t) for t in outs)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"{op}: {what} has shape {tuple(tensor.shape)}, needs {shape} as hidden")
    if any(out is not None and not out.is_contiguous() for out in outs):
        raise ShapeError(
            f"{op}: an output of shape {shape} is not contiguous; allocate it in one piece or give [B, N, D]"
        )
    rows = [None if t is None else t.reshape(batch, tokens, width) for t in (hidden, *tensors)]
    rows += [_vector_rows(vector, shape) for vector in vectors]
    return rows + [None if out is None else out.view(batch, tokens, width) for out in outs]


def _vector_rows(vector: Any, shape: tuple[int, ...]) -> Any:
    """A vector of hidden's rank, 4 or more, as [B, N, D] or [B, 1, D]; any other as it is."""
    if vector is None or vector.dim() != len(shape) or len(shape) < 4:
        return vector
    between = tuple(vector.shape[1:-1])
    if any(size != 1 for size in between):
        vector = vector.expand(vector.shape[0], *shape[1:-1], vector.shape[-1])
    return vector.flatten(1, -2)


def _check_kind(op: str, what: str, vector: Any, hidden: Any) -> None:
    if vector.dtype != hidden.dtype and dtype_name(vector.dtype) != "float32":
        wanted = " or ".join(dict.fromkeys(("float32", dtype_name(hidden.dtype))))
        raise DtypeError(f"{op}: {what} is {dtype_name(vector.dtype)}, needs {wanted} beside hidden")
    _check_device(op, what, vector, hidden)
    _check_rows(op, what, vector)


def _check_device(op: str, what: str, tensor: Any, hidden: Any) -> None:
    if tensor.device != hidden.device:
        raise ArgumentError(f"{op}: {what} is on {tensor.device}, hidden on {hidden.device}; move it with .to(device)")


def _check_rows(op: str, what: str, tensor: Any) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ShapeError(
            f"{op}: {what} has stride {tensor.stride(-1)} along its last axis, needs 1; call .contiguous()"
        )
