"""`gather_tokens` on the CPU: csrc/ops/gather_tokens.*, rows copied and normalised while they are in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace import _C
from vivace.kernels.norm_modulate.cpu_impl import rows, vector, why_not

__all__ = ["gather_tokens", "id_numbers", "why_not"]


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
) -> Tensor | tuple[Tensor, Tensor]:
    """x[r, ids[r % n, m]], and that normalised and modulated.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if out is None:
        out = x.new_empty(x.shape[0], ids.shape[1], x.shape[2])
    if kind is not None and normed is None:
        normed = torch.empty_like(out)
    _C.gather_tokens(
        id_numbers(ids, x.shape[1]),
        rows(x),
        rows(out),
        None if scale is None else vector(scale),
        None if shift is None else vector(shift),
        None if weight is None else vector(weight),
        None if bias is None else vector(bias),
        None if normed is None else rows(normed),
        out.shape,
        kind == "layer",
        eps,
        torch.get_num_threads(),
    )
    return out if normed is None else (out, normed)


def id_numbers(ids: Tensor, tokens: int) -> tuple[int, int, int]:
    """ids [n, M] of so many tokens as C++ takes them."""
    return ids.data_ptr(), ids.shape[0], tokens
