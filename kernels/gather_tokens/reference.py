"""The definition of `gather_tokens`: plain torch, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import norm_modulate


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
    """x[r, ids[r % n, m]], and that normalised and modulated."""
    places, rows = of_rows(ids, len(x)), torch.arange(len(x), device=x.device)[:, None]
    y = x[rows, places] if out is None else out.copy_(x[rows, places])
    if kind is None:
        return y
    return y, norm_modulate(y, scale, shift, weight=weight, bias=bias, kind=kind, eps=eps, out=normed)


def of_rows(ids: Tensor, rows: int) -> Tensor:
    """[n, M] -> int64 [R, M]: those of every row, branch after branch."""
    return ids.long().repeat(rows // len(ids), 1) if len(ids) else ids.long()
