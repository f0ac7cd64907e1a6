"""A gated residual and the normalisation and modulation after it: what stands between two parts of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vivace.errors import ArgumentError
from vivace.kernels.norm_modulate.check import as_rows, check_hidden, check_like, check_norm, check_vector
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adaln_modulate"]


def adaln_modulate(
    hidden: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
    hidden_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """h = hidden + gate * update, m = (norm(h) * weight + bias) * (1 + scale) + shift; what is None is left out.

    m is taken of h as stored, so both have the bits of `gated_residual` and `norm_modulate` one after the other.

    Args:
        hidden, update, gate: as in `gated_residual`.
        scale, shift, weight, bias, kind, eps, backend: as in `norm_modulate`.
        out, hidden_out: m and h are written there when given, shape and dtype of hidden; either may be hidden or
            update, not both the same.
    Returns: (h, m), each [B, N, D], dtype of hidden. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Peebles and Xie 2023, section 3.2 (adaLN-Zero).
    """
    if hidden.dim() != 3:
        rows = as_rows("adaln_modulate", hidden, (update,), (gate, scale, shift), (out, hidden_out))
        h, m = adaln_modulate(
            *rows[:5], weight=weight, bias=bias, kind=kind, eps=eps, out=rows[5], hidden_out=rows[6], backend=backend
        )
        h = h.view(hidden.shape) if hidden_out is None else hidden_out
        return h, m.view(hidden.shape) if out is None else out
    dtype = check_hidden("adaln_modulate", hidden)
    check_like("adaln_modulate", "update", update, hidden)
    if gate is not None:
        check_vector("adaln_modulate", "gate", gate, hidden)
    check_norm("adaln_modulate", hidden, scale, shift, weight, bias, kind, eps)
    if out is not None:
        check_like("adaln_modulate", "out", out, hidden)
    if hidden_out is not None:
        check_like("adaln_modulate", "hidden_out", hidden_out, hidden)
        if out is not None and out.numel() and out.data_ptr() == hidden_out.data_ptr():
            raise ArgumentError("adaln_modulate: out and hidden_out are the same memory; give two tensors")
    choice = choose(SPEC, hidden.device.type, dtype, backend)
    if not hidden.numel():
        empty = hidden.new_empty(hidden.shape)
        return empty if hidden_out is None else hidden_out, empty.clone() if out is None else out
    result: tuple[Tensor, Tensor] = load(SPEC, choice.backend)(
        hidden, update, gate, scale, shift, weight=weight, bias=bias, kind=kind, eps=eps, out=out, hidden_out=hidden_out
    )
    return result


SPEC = define("adaln_modulate")
