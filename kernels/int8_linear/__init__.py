"""A linear layer of 8-bit integers: exact sums, scales by token and by channel, and the epilogue of `linear`.

Rows of other numbers are quantized in the same call; on the CPU by the threads that multiply them afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.linear.check import check_epilogue, check_scales, result_dtype
from vivace.kernels.linear.packed import PackedWeight
from vivace.kernels.norm_modulate.check import dtype_name
from vivace.kernels.quantize_tokens import quantize_tokens
from vivace.kernels.quantize_tokens.check import DTYPES as QUANTIZED
from vivace.kernels.quantize_tokens.check import check_smooth
from vivace.kernels.spec import TRITON, choose, define, load

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["int8_linear"]

MOST_DEPTH = (1 << 17) - 1  # products of two numbers in [-128, 127] whose sum int32 always holds


def int8_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + gate * act(x_scale weight_scale (x W^T) + bias), each of bias, gate, residual that is None left out.

    x W^T is an exact int32 sum; what follows is float32 arithmetic, rounded once to the result (float64 scales: all in
    float64, in the reference only). A row's bits depend on that row alone.

    Args:
        x: int8 [..., K], rows anywhere, 1 <= K < 2^17; weight: int8 [N, K]. Elements of a row lie side by side.
            float32 | bfloat16 | float16 x is quantized first, as `quantize_tokens` does without a scale given.
        x_scale: float32 [...], one a row of x; weight_scale: float32 [N]: real x = x_scale x, `quantize_tokens`.
            None, and only then, x is not int8.
        smooth: float32 [K], multiplied with every row of x before it is quantized; not for int8 x.
        bias: [N], float32 or the dtype of the result; activation: "none" | "gelu" | "gelu_tanh" | "silu".
        gate: [N], [B, N], [B, tokens, N] or of the result's rank, with 1 for axes that share it; B is the first axis of
            x, tokens the product of those between it and K.
        residual, out: [..., N], dtype of the result; out may be residual.
        out_dtype: float32 | bfloat16 | float16 (float64 with float64 scales); None: that of out, else of x where x is
            quantized here, else bfloat16.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [..., N]. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Dettmers et al. 2022, section 2.1 (vector-wise scales); Xiao et al. 2023 (W8A8).
    """
    _check_operands(x, weight, x_scale, weight_scale)
    if smooth is not None:
        _check_smooth(x, x_scale, smooth)
    shape = (*x.shape[:-1], weight.shape[0])
    dtype = result_dtype("int8_linear", x, x_scale, weight_scale, out, out_dtype)
    check_epilogue("int8_linear", x, shape, dtype, activation, bias, gate, residual, out)
    choice = choose(SPEC, x.device.type, dtype_name(dtype), backend)
    if 0 in shape:
        return x.new_empty(shape, dtype=dtype) if out is None else out
    options: dict[str, Any] = {"activation": activation, "gate": gate, "residual": residual, "out": out}
    if choice.backend == TRITON:
        x, x_scale = _on_the_gpu(x, weight, x_scale, smooth)
    else:
        options["smooth"] = smooth
    run = load(SPEC, choice.backend)
    result: Tensor = run(x, weight, x_scale, weight_scale, bias, **options, out_dtype=dtype)
    return result


def _on_the_gpu(x: Tensor, weight: Any, x_scale: Tensor | None, smooth: Tensor | None) -> tuple[Tensor, Tensor]:
    """Integers and their scales, which the kernel takes. Raises ArgumentError for a packed weight."""
    if isinstance(weight, PackedWeight):
        raise ArgumentError("int8_linear: a packed weight is for the CPU; give the triton backend the Tensor itself")
    return quantize_tokens(x, smooth=smooth, backend=TRITON) if x_scale is None else (x, x_scale)


def _check_smooth(x: Any, x_scale: Any, smooth: Any) -> None:
    """Raises ShapeError, DtypeError, ArgumentError."""
    if x_scale is not None:
        raise ArgumentError("int8_linear: smooth is for x that is quantized here, this one is int8 already")
    check_smooth("int8_linear", smooth, x)


def _check_operands(x: Any, weight: Any, x_scale: Any, weight_scale: Any) -> None:
    """Raises ShapeError, DtypeError, ArgumentError."""
    if (name := dtype_name(x.dtype)) not in (QUANTIZED if x_scale is None else ("int8",)):
        raise DtypeError(f"int8_linear: x is {name}, {_needs(name, x_scale)}")
    if dtype_name(weight.dtype) != "int8":
        raise DtypeError(f"int8_linear: weight is {dtype_name(weight.dtype)}, needs int8; see quantize_tokens")
    shape, sizes = x.shape, weight.shape
    if not shape or len(sizes) != 2 or shape[-1] != sizes[1]:
        raise ShapeError(f"int8_linear: x has shape {tuple(shape)} and weight {tuple(sizes)}, need [..., K] and [N, K]")
    if not 1 <= sizes[1] <= MOST_DEPTH:
        raise ShapeError(f"int8_linear: K is {sizes[1]}, needs 1 to {MOST_DEPTH}, whose sums int32 holds")
    wide = (weight_scale if x_scale is None else x_scale).dtype
    check_scales("int8_linear", x, weight, x_scale, weight_scale, wide)


def _needs(name: str, x_scale: Any) -> str:
    if x_scale is not None:
        return "needs int8 beside an x_scale; without one it is quantized here"
    return "needs its x_scale" if name == "int8" else f"needs int8, or without an x_scale one of {', '.join(QUANTIZED)}"


SPEC = define("int8_linear")
