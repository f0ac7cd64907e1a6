"""What one call of `int8_linear` moves and computes, from its arguments."""

from __future__ import annotations

from typing import Any

from vivace.kernels.norm_modulate.cost import nbytes

RESULT_BYTES = 2  # of bfloat16, the dtype of a result that is not named


def bytes_moved(
    x: Any,
    weight: Any,
    x_scale: Any,
    weight_scale: Any,
    bias: Any = None,
    *,
    smooth: Any = None,
    gate: Any = None,
    residual: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    **_: Any,
) -> int:
    """Bytes read and written once: x, weight, scales, vectors, residual, the result. 0 where there is no result."""
    results = int(x.numel()) // int(x.shape[-1]) * len(weight)
    dtype = out.dtype if out is not None else out_dtype
    if dtype is None and x.is_floating_point():
        dtype = x.dtype
    written = results * (RESULT_BYTES if dtype is None else int(dtype.itemsize))
    read = (x, weight, x_scale, weight_scale, bias, smooth, gate, residual)
    return written + sum(nbytes(tensor) for tensor in read if tensor is not None) if results else 0


def flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """One multiplication and one addition for each product; the epilogue is not counted."""
    return 2 * int(x.numel()) * len(weight)
