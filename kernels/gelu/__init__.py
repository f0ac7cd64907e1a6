"""The Gaussian error linear unit of feed-forward layers, plain or as the gate of the other half, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.norm_modulate.check import check_hidden, dtype_name
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gelu"]

APPROXIMATE = ("none", "tanh")


def gelu(
    hidden: Tensor,
    *,
    gated: bool = False,
    approximate: str = "none",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x * (1 + erf(x / sqrt(2))) / 2; gated (GEGLU): hidden[..., :F] * gelu(hidden[..., F:]).

    approximate="tanh": x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2.
    Arithmetic is float32, float64 for float64; a gated result is rounded once. As the definition has it, -inf gives
    NaN (0 times infinity) and NaN gives NaN. An element's bits depend on its inputs alone.

    Args:
        hidden: float32 | bfloat16 [..., F], gated [..., 2F] (float64 runs in the reference only); rows may lie
            anywhere, elements of a row side by side.
        out: written when given, [..., F], dtype of hidden; may be hidden, or its first half when gated.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [..., F], dtype of hidden. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Hendrycks and Gimpel 2016, section 2; Shazeer 2020, section 2 (GEGLU).
    """
    shape: tuple[int, ...] = hidden.shape
    if not shape:
        raise ShapeError("gelu: hidden has no axis, needs [..., F]")
    dtype = check_hidden("gelu", hidden)
    if approximate not in APPROXIMATE:
        raise ArgumentError(f"gelu: approximate is {approximate!r}, needs one of {APPROXIMATE}")
    if gated:
        if shape[-1] % 2:
            raise ShapeError(f"gelu: hidden has shape {tuple(shape)}, a gated one needs an even last axis [..., 2F]")
        shape = (*shape[:-1], shape[-1] // 2)
    if out is not None:
        _check_out(out, hidden, shape)
    choice = choose(SPEC, hidden.device.type, dtype, backend)
    if not hidden.numel():
        return hidden.new_empty(shape) if out is None else out
    result: Tensor = load(SPEC, choice.backend)(hidden, gated=gated, approximate=approximate, out=out)
    return result


def _check_out(out: Tensor, hidden: Tensor, shape: tuple[int, ...]) -> None:
    """`out` can hold the result. Raises ShapeError, DtypeError, ArgumentError."""
    if tuple(out.shape) != shape:
        raise ShapeError(f"gelu: out has shape {tuple(out.shape)}, needs {tuple(shape)}")
    if out.dtype != hidden.dtype:
        raise DtypeError(f"gelu: out is {dtype_name(out.dtype)}, needs {dtype_name(hidden.dtype)} as hidden")
    if out.device != hidden.device:
        raise ArgumentError(f"gelu: out is on {out.device}, hidden on {hidden.device}; allocate it there")
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ShapeError(f"gelu: out has stride {out.stride(-1)} along its last axis, needs 1; call .contiguous()")


SPEC = define("gelu")
