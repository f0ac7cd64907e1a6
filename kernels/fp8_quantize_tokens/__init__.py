"""Rows of hidden states as 8-bit floats with a scale each, in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.kernels.quantize_tokens.check import check_rows
from vivace.kernels.spec import TRITON, choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fp8_quantize_tokens"]

ABSENT = "fp8 runs on CUDA, on GPUs of capability 8.9 or more"


def fp8_quantize_tokens(
    x: Tensor, *, smooth: Tensor | None = None, scale: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """s = max |x smooth| / 448 or the scale given; q = x smooth / s, rounded to e4m3, half to even, within [-448, 448].

    A row of zeros, or of numbers too small for a scale, takes 1; one that holds NaN or infinity takes NaN and zeros,
    whatever is given. Arithmetic is float32, float64 for float64, each operation rounded correctly: the same numbers
    and scales on every backend.

    Args:
        x: float32 | bfloat16 | float16 [B, ..., K] (float64 in the reference), K >= 1; rows may lie anywhere, elements
            of a row side by side.
        smooth: float32 [K], multiplied with every row first; None: 1.
        scale: float32 [], [B] or [B, 1, ...], the scale of all rows of a sample: what lies beyond 448 of it is cut
            off. None, or for a sample a number not above 0: each row's own.
        backend: "reference" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto". There is no C++: fp8 runs on CUDA.
    Returns: q, float8_e4m3fn [B, ..., K], and s, float32 [B, ...] (float64 of float64): x smooth is about s q, what
        `fp8_linear` takes. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Micikevicius et al. 2022, table 1 (e4m3); Xiao et al. 2023, eq. 3 (smoothing).
    """
    dtype = check_rows("fp8_quantize_tokens", x, smooth, scale)
    choice = choose(SPEC, x.device.type, dtype, backend)
    result: tuple[Tensor, Tensor] = load(SPEC, choice.backend)(x, smooth=smooth, scale=scale)
    return result


SPEC = define("fp8_quantize_tokens", backends=(TRITON,), absent=ABSENT)
