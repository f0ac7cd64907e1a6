"""Keeping what rows give, and giving it again, by the public ops: one call a branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vivace.engine.kept import Turn
from vivace.kernels.cache_apply import cache_apply
from vivace.kernels.cache_update import cache_update

TAKEN = (torch.float32, torch.bfloat16, torch.float64)  # dtypes of hidden states that the ops read and write


def keep(
    turn: Turn,
    branches: Sequence[str],
    fresh: Tensor,
    base: Tensor | None = None,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Put fresh - base, or fresh, into the cells of a turn's branches; hidden += gate * fresh, rounded once.

    fresh, base, hidden: [R, N, D], rows by branch, samples of a branch side by side; gate: [R, D]; None: left out.
    """
    rows = (_by_branch(each, len(branches)) for each in (fresh, base, hidden, gate))
    for branch, part, before, to, by in zip(branches, *rows, strict=True):
        slab, lanes = turn.places(branch, tuple(part.shape[1:]), like=part)
        at = torch.tensor(lanes, device=part.device)
        joins = {} if to is None else {"hidden": to, "gate": by, "out": to}
        cache_update(slab.values, at, part, base=before, made=turn.use.made, scales=slab.scales, **joins)


def given(
    turn: Turn, branches: Sequence[str], hidden: Tensor, gate: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """hidden + gate * v, v what a turn's planes give; of site "block" v alone.

    Args:
        hidden: [R, N, D], rows as of `keep`; gate: [R, 1, D] or [R, D], None: 1.
        out: shape and dtype of hidden, which it may be; None: a new tensor.
    Returns: [R, N, D] in the dtype of hidden.
    """
    count, parts = len(branches), []
    gate = None if gate is None else gate.to(torch.promote_types(gate.dtype, torch.float32))
    wanted = _by_branch(out if out is not None and out.dtype in TAKEN else None, count)
    for branch, part, by, to in zip(branches, _by_branch(hidden, count), _by_branch(gate, count), wanted, strict=True):
        slab, lanes = turn.places(branch, tuple(part.shape[1:]), like=part)
        weights = torch.tensor(turn.weights, dtype=torch.float32, device=part.device)
        options: dict[str, Any] = {"scales": slab.scales, "dtype": part.dtype, "out": to}
        if turn.use.site != "block":
            options |= {"hidden": part, "gate": by}
        parts.append(cache_apply(slab.values, torch.tensor(lanes, device=part.device), weights, **options))
    if out is None:
        return torch.cat(parts).to(hidden.dtype)
    return out if out.dtype in TAKEN else out.copy_(torch.cat(parts))


def _by_branch(rows: Tensor | None, branches: int) -> Sequence[Any]:
    """Rows [R, ...] branch by branch, in a dtype that the ops take."""
    if rows is None:
        return [None] * branches
    return (rows if rows.dtype in TAKEN else rows.float()).chunk(branches)
