"""Normalised and modulated hidden states as 8-bit integers with a scale a row, in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import ShapeError
from vivace.kernels.norm_modulate.check import as_rows, check_hidden, check_norm
from vivace.kernels.quantize_tokens.check import check_given, check_smooth
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["int8_norm_modulate"]


def int8_norm_modulate(
    hidden: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    smooth: Tensor | None = None,
    x_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y = (norm(hidden) * weight + bias) * (1 + scale) + shift; s = max |y smooth| / 127; q = y smooth / s, rounded.

    Those of `quantize_tokens` of the float32 result of `norm_modulate`, bit for bit on every backend; y is never
    written. Between backends an integer may differ by one where the last bit of y decides.

    Args:
        hidden, scale, shift, weight, bias, kind, eps: as in `norm_modulate`, D >= 1.
        smooth: float32 [D], multiplied with every row of y; None: 1.
        x_scale: float32 [], [B] or [B, 1, ...], the scale of all rows of a sample: what lies beyond 127 of it is cut
            off. None, or for a sample a number not above 0: each row's own.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: q, int8 [B, N, D], and s, float32 [B, N] (float64 of float64), what `int8_linear` takes. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Peebles and Xie 2023, section 3.2 (adaLN); Dettmers et al. 2022, section 2.1; Xiao et al. 2023, eq. 3.
    """
    if hidden.dim() != 3:
        flat = as_rows("int8_norm_modulate", hidden, (), (scale, shift), ())
        q, step = int8_norm_modulate(
            *flat, weight=weight, bias=bias, kind=kind, eps=eps, smooth=smooth, x_scale=x_scale, backend=backend
        )
        return q.view(hidden.shape), step.view(hidden.shape[:-1])
    dtype = check_hidden("int8_norm_modulate", hidden)
    if not hidden.shape[-1]:
        raise ShapeError(f"int8_norm_modulate: hidden has shape {tuple(hidden.shape)}, needs D of 1 or more")
    check_norm("int8_norm_modulate", hidden, scale, shift, weight, bias, kind, eps)
    if smooth is not None:
        check_smooth("int8_norm_modulate", smooth, hidden)
    if x_scale is not None:
        check_given("int8_norm_modulate", "x_scale", x_scale, hidden)
    choice = choose(SPEC, hidden.device.type, dtype, backend)
    result: tuple[Tensor, Tensor] = load(SPEC, choice.backend)(
        hidden, scale, shift, weight=weight, bias=bias, kind=kind, eps=eps, smooth=smooth, x_scale=x_scale
    )
    return result


SPEC = define("int8_norm_modulate", tolerance=1.0)  # an integer; tests compare the bits with those of the two ops
