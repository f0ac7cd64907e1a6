"""A linear layer of 8-bit floats: float32 sums, scales by token and by channel, and the epilogue of `linear`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.fp8_quantize_tokens import ABSENT
from vivace.kernels.linear.check import check_epilogue, check_scales, result_dtype
from vivace.kernels.norm_modulate.check import dtype_name
from vivace.kernels.quantize_tokens.check import check_smooth
from vivace.kernels.spec import TRITON, choose, define, load

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["fp8_linear"]

FORMAT = "float8_e4m3fn"
INPUTS = ("float32", "bfloat16", "float16", "float64")  # quantized in the call
TOLERANCE = 2.0**-8  # of results of about unit size: what the matrix units of sm_89 and sm_90 leave of float32


def fp8_linear(
    x: Tensor,
    weight: Tensor,
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

    x W^T is summed in float32: 128 products at a time in the matrix unit, which keeps 13 bits behind the point of the
    largest of them, and those sums in registers. What follows is float32 too, rounded once to the result (float64
    scales: all in float64, in the reference only). A row's bits depend on that row alone.

    Args:
        x: float8_e4m3fn [..., K] with x_scale, rows anywhere; or float32 | bfloat16 | float16 [B, ..., K] without, then
            it is quantized by token first. K >= 1, elements of a row side by side.
        weight: float8_e4m3fn [N, K]; weight_scale: float32 [N]; x_scale: float32 [...], one a row of x, or None: real
            x = x_scale x, as of `fp8_quantize_tokens`.
        smooth: float32 [K], multiplied with an x that is quantized here; None: 1.
        bias: [N], float32 or the dtype of the result; activation: "none" | "gelu" | "gelu_tanh" | "silu".
        gate: [N], [B, N], [B, tokens, N] or of the result's rank, with 1 for axes that share it; B is the first axis of
            x, tokens the product of those between it and K.
        residual, out: [..., N], dtype of the result; out may be residual.
        out_dtype: float32 | bfloat16 | float16 (float64 with float64 scales); None: that of out, else of x where x is
            quantized here, else bfloat16.
        backend: "reference" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto". There is no C++: fp8 runs on CUDA,
            on GPUs of capability 8.9 or more.
    Returns: [..., N]. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Micikevicius et al. 2022 (e4m3); DeepSeek-AI 2024, section 3.3.2 (sums of the matrix unit).
    """
    _check_numbers(x, weight, x_scale, weight_scale, smooth)
    shape = (*x.shape[:-1], weight.shape[0])
    dtype = result_dtype("fp8_linear", x, x_scale, weight_scale, out, out_dtype)
    check_epilogue("fp8_linear", x, shape, dtype, activation, bias, gate, residual, out)
    choice = choose(SPEC, x.device.type, dtype_name(dtype), backend)
    if 0 in shape:
        return x.new_empty(shape, dtype=dtype) if out is None else out
    options = {"activation": activation, "gate": gate, "residual": residual, "smooth": smooth, "out": out}
    result: Tensor = load(SPEC, choice.backend)(x, weight, x_scale, weight_scale, bias, **options, out_dtype=dtype)
    return result


def _check_numbers(x: Any, weight: Any, x_scale: Any, weight_scale: Any, smooth: Any) -> None:
    kind, wide = dtype_name(x.dtype), dtype_name(weight_scale.dtype)
    if x_scale is None and kind not in INPUTS:
        raise DtypeError(f"fp8_linear: x is {kind} without x_scale, needs float32, bfloat16 or float16")
    if x_scale is not None and kind != FORMAT:
        raise DtypeError(f"fp8_linear: x is {kind}, needs {FORMAT}, see fp8_quantize_tokens; or x_scale None")
    if dtype_name(weight.dtype) != FORMAT:
        raise DtypeError(f"fp8_linear: weight is {dtype_name(weight.dtype)}, needs {FORMAT}; see fp8_quantize_tokens")
    if not x.dim() or weight.dim() != 2 or x.shape[-1] != weight.shape[-1] or not x.shape[-1]:
        sizes = f"{tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ShapeError(f"fp8_linear: x has shape {sizes}, need [..., K] and [N, K], K of 1 or more")
    check_scales("fp8_linear", x, weight, x_scale, weight_scale, weight_scale.dtype)
    if x_scale is None and (kind == "float64") != (wide == "float64"):
        raise DtypeError(f"fp8_linear: x is {kind} beside scales in {wide}; float64 goes with float64 alone")
    if smooth is not None:
        if x_scale is not None:
            raise ArgumentError("fp8_linear: smooth is for an x that is quantized here; this one has x_scale")
        check_smooth("fp8_linear", smooth, x)


SPEC = define("fp8_linear", tolerance=TOLERANCE, backends=(TRITON,), absent=ABSENT)
