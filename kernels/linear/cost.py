"""What one call of `linear` moves and computes, from its arguments."""

from __future__ import annotations

from math import prod
from typing import Any

OPERATIONS = {"none": 0, "gelu": 36, "gelu_tanh": 24, "silu": 17}  # of the float32 kernel, an element of the result


def bytes_moved(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    gate: Any = None,
    residual: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    **_: Any,
) -> int:
    """Bytes read and written once: x, weight, what the result is combined with, the result."""
    count = _results(x, weight)
    kind = x.dtype if out is None and out_dtype is None else out_dtype if out is None else out.dtype
    read = [t for t in (x, bias, gate, residual) if t is not None]
    moved = sum(int(t.numel()) * int(t.element_size()) for t in read) + prod(weight.shape) * int(x.element_size())
    return moved + count * int(kind.itemsize) if count else 0


def flops(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: str = "none",
    gate: Any = None,
    residual: Any = None,
    **_: Any,
) -> int:
    """2 K a result for the product, besides what follows it."""
    given = sum(tensor is not None for tensor in (bias, gate, residual))
    return _results(x, weight) * (2 * int(x.shape[-1]) + OPERATIONS[activation] + given)


def _results(x: Any, weight: Any) -> int:
    return int(prod(x.shape[:-1])) * int(weight.shape[0])
