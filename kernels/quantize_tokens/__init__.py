"""Rows of hidden states as 8-bit integers with a scale each, in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import DtypeError, ShapeError
from vivace.kernels.linear.check import check_place
from vivace.kernels.norm_modulate.check import dtype_name
from vivace.kernels.spec import TRITON, choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["quantize_tokens"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def quantize_tokens(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """scale = max |x| / 127, q = x / scale rounded to the nearest integer, half to even, within [-127, 127].

    Every row has its scale; a row whose scale is 0 (zeros, or numbers too small for a scale) takes 1, one that holds
    NaN or infinity takes NaN and zeros. Arithmetic is float32, float64 for float64, each operation rounded correctly:
    the same integers and scales on every backend.

    Args:
        x: float32 | bfloat16 [..., K] (float16 on a GPU too, float64 in the reference), K >= 1; rows may lie anywhere,
            elements of a row side by side.
        backend: "reference" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: q, int8 [..., K], and scale, float32 [...] (float64 of float64): x is about scale q, what `int8_linear`
        takes. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Dettmers et al. 2022, section 2.1 (absmax quantization, by row).
    """
    dtype = dtype_name(x.dtype)
    if dtype not in DTYPES:
        raise DtypeError(
            f"quantize_tokens: x is {dtype}, needs float32, bfloat16 or float16 (float64 in the reference)"
        )
    if not x.dim() or not x.shape[-1]:
        raise ShapeError(f"quantize_tokens: x has shape {tuple(x.shape)}, needs [..., K] with K of 1 or more")
    check_place("quantize_tokens", "x", x, x)
    choice = choose(SPEC, x.device.type, dtype, backend)
    result: tuple[Tensor, Tensor] = load(SPEC, choice.backend)(x)
    return result


SPEC = define("quantize_tokens", backends=(TRITON,))
