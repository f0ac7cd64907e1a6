"""A linear layer with what follows it in one pass: bias, activation, gate and residual."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.errors import DtypeError, ShapeError
from vivace.kernels.linear.check import RESULTS, check_epilogue, check_place
from vivace.kernels.linear.packed import PackedWeight, pack_weight
from vivace.kernels.norm_modulate.check import dtype_name
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["PackedWeight", "linear", "pack_weight"]

DTYPES = RESULTS  # of x too


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + gate * act(x W^T + bias), each that is None left out; act is the identity, GELU or SiLU.

    Sums and everything after them are float32, float64 for float64; the result is rounded once. A row's bits depend on
    that row alone: not on the number of rows, the batch or the threads. On the CPU a `PackedWeight` saves packing the
    weight at every call, which costs as much as some 20 rows.

    Args:
        x: [..., K], float32 | bfloat16 | float16 (reference and Triton) | float64 (reference); rows may lie anywhere,
            elements of a row side by side.
        weight: [N, K], dtype of x.
        bias: [N], float32 or the dtype of x.
        activation: "none" | "gelu" (erf) | "gelu_tanh" | "silu".
        gate: float32 or the dtype of x, [N], [B, N], [B, tokens, N] or of the result's rank, B and tokens also 1.
        residual: [..., N], dtype of the result.
        out: written when given, [..., N]; may be the residual, not x.
        out_dtype: of the result, float32 | bfloat16 | float16 | float64; None: that of out, else of x.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [..., N]. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Hendrycks and Gimpel 2016 (GELU), Elfwing et al. 2017 (SiLU), Peebles and Xie 2023, section 3.2 (gate).
    """
    shape, dtype = _check_product(x, weight)
    result_dtype = _result_dtype(x, out, out_dtype)
    check_epilogue("linear", x, shape, result_dtype, activation, bias, gate, residual, out)
    choice = choose(SPEC, x.device.type, dtype, backend)
    if 0 in shape:
        return x.new_empty(shape, dtype=result_dtype) if out is None else out
    result: Tensor = load(SPEC, choice.backend)(
        x, weight, bias, activation=activation, gate=gate, residual=residual, out=out, out_dtype=result_dtype
    )
    return result


def _check_product(x: Any, weight: Any) -> tuple[tuple[int, ...], str]:
    """Shape of the result and name of the dtype of x. Raises ShapeError, DtypeError, ArgumentError."""
    dtype, shape, sizes = dtype_name(x.dtype), x.shape, weight.shape
    if not shape:
        raise ShapeError("linear: x has no axis, needs [..., K]")
    if dtype not in DTYPES:
        raise DtypeError(f"linear: x is {dtype}, needs one of {DTYPES}")
    if len(sizes) != 2 or sizes[1] != shape[-1] or not sizes[1]:
        needs = f"[N, {shape[-1]}] for x {tuple(shape)}, K > 0"
        raise ShapeError(f"linear: weight has shape {tuple(sizes)}, needs {needs}")
    if weight.dtype != x.dtype:
        raise DtypeError(f"linear: weight is {dtype_name(weight.dtype)}, needs {dtype} as x")
    check_place("linear", "x", x, x)
    check_place("linear", "weight", weight, x)
    return (*shape[:-1], sizes[0]), dtype


def _result_dtype(x: Any, out: Any, out_dtype: Any) -> Any:
    """dtype of the result. Raises DtypeError."""
    if out_dtype is None:
        out_dtype = x.dtype if out is None else out.dtype
    if out_dtype == x.dtype:
        return out_dtype
    name, of_x = dtype_name(out_dtype), dtype_name(x.dtype)
    if name not in DTYPES or (name == "float64") != (of_x == "float64"):
        needs = "float64" if of_x == "float64" else "float32, bfloat16 or float16"
        raise DtypeError(f"linear: the result is to be {name}, needs {needs} for x in {of_x}")
    return out_dtype


SPEC = define("linear")
