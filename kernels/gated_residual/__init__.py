"""The residual of a transformer block, gated by its conditioning, in one pass over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.kernels.norm_modulate.check import as_rows, check_hidden, check_like, check_vector
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gated_residual"]


def gated_residual(
    hidden: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """hidden + gate * update; gate None: hidden + update.

    Arithmetic is float32, float64 for float64; product and sum are rounded one by one, so every backend gives the same
    bits.

    Args:
        hidden: float32 | bfloat16 [B, N, D] (float64 runs in the reference only); rows may lie anywhere, elements of a
            row side by side. Other ranks: the first axis is B, those between it and D make N.
        update: the same shape and dtype, any such layout.
        gate: [D], [B, D] or [B, N, D], with 1 for B or N where it is shared; float32 or hidden's dtype.
        out: written when given, shape and dtype of hidden; may be hidden or update.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: [B, N, D], dtype of hidden. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Peebles and Xie 2023, section 3.2 (adaLN-Zero).
    """
    if hidden.dim() != 3:
        rows = as_rows("gated_residual", hidden, (update,), (gate,), (out,))
        flat = gated_residual(*rows[:3], out=rows[3], backend=backend)
        return flat.view(hidden.shape) if out is None else out
    dtype = check_hidden("gated_residual", hidden)
    check_like("gated_residual", "update", update, hidden)
    if gate is not None:
        check_vector("gated_residual", "gate", gate, hidden)
    if out is not None:
        check_like("gated_residual", "out", out, hidden)
    choice = choose(SPEC, hidden.device.type, dtype, backend)
    if not hidden.numel():
        return hidden.new_empty(hidden.shape) if out is None else out
    result: Tensor = load(SPEC, choice.backend)(hidden, update, gate, out=out)
    return result


SPEC = define("gated_residual")
