"""The rows of some tokens side by side, and normalised and modulated in the same pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import ArgumentError, ShapeError
from vivace.kernels.gather_tokens.check import check_ids, check_out, check_tokens
from vivace.kernels.norm_modulate.check import check_norm
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gather_tokens"]


def gather_tokens(
    x: Tensor,
    ids: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str | None = None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    normed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[r, m] = x[r, ids[r % n, m]]; and (norm(y) * weight + bias) * (1 + scale) + shift where any of it is asked for.

    The second result has the bits of `norm_modulate` of y on the same backend; y those of x.

    Args:
        x: float32 | bfloat16 [R, N, W] (float16 on a GPU and in the reference, float64 in the reference); rows may lie
            anywhere, elements of a row side by side; 1 for R where all rows read the same.
        ids: int32 [n, M], any of 0 .. N - 1, R a multiple of n: rows lie branch after branch, n pictures each. Numbers
            on a GPU are not looked at.
        scale, shift: [W], [R, W] or [R, M, W], with 1 for R or M where they are shared; float32 or the dtype of x.
        weight, bias: [W], float32 or the dtype of x.
        kind: "layer" | "rms": asks for the norm; None: "layer" where scale, shift, weight, bias or normed is given.
        eps: added to the mean of squares, 0 or more.
        out, normed: [R, M, W], dtype of x, written when given; share no memory with x.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [R, M, W], dtype of x, or two of them: y, and y normalised. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Liu et al. 2025 (RAS), section 3.2; Peebles and Xie 2023, section 3.2 (adaLN).
    """
    op = "gather_tokens"
    dtype = check_tokens(op, "x", x)
    rows = check_ids(op, ids, x, x.shape[1], out.shape[0] if out is not None else max(x.shape[0], ids.shape[0]))
    if x.shape[0] not in (1, rows):
        raise ShapeError(f"{op}: x has shape {tuple(x.shape)}, needs [{rows}, N, W], or 1 for all rows")
    shape = (rows, ids.shape[1], x.shape[2])
    given = any(each is not None for each in (scale, shift, weight, bias, normed))
    kind = "layer" if kind is None and given else kind
    out = x.new_empty(shape) if out is None else check_out(op, "out", out, shape, x)
    if kind is None:
        if eps < 0.0:
            raise ArgumentError(f"{op}: eps is {eps}, needs a finite number of 0 or more")
    else:
        check_norm(op, out, scale, shift, weight, bias, kind, eps)
        normed = x.new_empty(shape) if normed is None else check_out(op, "normed", normed, shape, x)
    choice = choose(SPEC, x.device.type, dtype, backend)
    if out.numel():
        load(SPEC, choice.backend)(
            x.expand(rows, -1, -1), ids, scale=scale, shift=shift, weight=weight, bias=bias, kind=kind, eps=eps,
            out=out, normed=normed,
        )  # fmt: skip
    return out if normed is None else (out, normed)


SPEC = define("gather_tokens")
