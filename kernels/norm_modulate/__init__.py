"""Normalisation and adaptive modulation of hidden states in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.kernels.norm_modulate.check import as_rows, check_hidden, check_norm, check_out
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["norm_modulate"]


def norm_modulate(
    hidden: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """(norm(hidden) * weight + bias) * (1 + scale) + shift, each factor or term that is None left out.

    norm over the last axis: "layer" (x - mean) / sqrt(mean((x - mean)^2) + eps), "rms" x / sqrt(mean(x^2) + eps).
    Arithmetic is float32, float64 for float64. A row's bits depend on that row alone, on every CPU and thread count.

    Args:
        hidden: float32 | bfloat16 [B, N, D] (float64 runs in the reference only); rows may lie anywhere, elements of a
            row side by side. Other ranks: the first axis is B, those between it and D make N.
        scale, shift: [D], [B, D] or [B, N, D], with 1 for B or N where they are shared; float32 or hidden's dtype.
        weight, bias: [D], float32 or hidden's dtype.
        kind: "layer" | "rms"; eps: added to the mean of squares, 0 or more.
        out: written when given, shape and dtype of hidden, or bfloat16 beside float32; may be hidden.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [B, N, D], out or a new tensor of the dtype of hidden. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Peebles and Xie 2023, section 3.2 (adaLN); Ba et al. 2016; Zhang and Sennrich 2019, eq. 4.
    """
    if hidden.dim() != 3:
        rows = as_rows("norm_modulate", hidden, (), (scale, shift), (out,))
        flat = norm_modulate(*rows[:3], weight=weight, bias=bias, kind=kind, eps=eps, out=rows[3], backend=backend)
        return flat.view(hidden.shape) if out is None else out
    dtype = check_hidden("norm_modulate", hidden)
    check_norm("norm_modulate", hidden, scale, shift, weight, bias, kind, eps)
    if out is not None:
        check_out("norm_modulate", out, hidden, dtype)
    choice = choose(SPEC, hidden.device.type, dtype, backend)
    if not hidden.numel():
        return hidden.new_empty(hidden.shape) if out is None else out
    result: Tensor = load(SPEC, choice.backend)(
        hidden, scale, shift, weight=weight, bias=bias, kind=kind, eps=eps, out=out
    )
    return result


SPEC = define("norm_modulate")
