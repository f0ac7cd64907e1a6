"""Keeping what rows give, and giving it again, by the public ops: one call a use, whatever the branches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vivace.engine.caching import Use
from vivace.engine.kept import Slab, Turn
from vivace.engine.tokens import Focus
from vivace.kernels.cache_apply import cache_apply
from vivace.kernels.cache_update import cache_update

TAKEN = (torch.float32, torch.bfloat16, torch.float64)  # dtypes of hidden states that the ops read and write


class Place(NamedTuple):
    """Where the rows of one use lie: memory as of `Slab`, int64 lanes [R], weights [R, terms] of what is read."""

    use: Use
    values: Tensor
    scales: Tensor | None
    lanes: Tensor
    weights: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, as of `Slab`."""
        return tuple(self.values.shape[2:])

    @property
    def dtype(self) -> torch.dtype:
        """Of what is kept."""
        return self.values.dtype


def keep(
    turn: Turn | Place,
    branches: Sequence[str],
    fresh: Tensor,
    base: Tensor | None = None,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    focus: Focus | None = None,
) -> None:
    """Put fresh - base, or fresh, into the cells of a turn's branches; hidden += gate * fresh, rounded once.

    Args:
        fresh, base, hidden: [R, N, D], rows by branch, samples of a branch side by side; gate: [R, D]; None: left out.
        focus: the tokens that rows of a token row are about, [R, M, D]; what is kept of others stays.
    """
    place = _placed(turn, branches, fresh, focus)
    to = _taken(hidden)
    joins = {} if to is None else {"hidden": to, "gate": _taken(gate), "out": to}
    scales, made = place.scales, place.use.made
    if focus is not None:
        joins["ids"] = focus.ids
    cache_update(place.values, place.lanes, _taken(fresh), base=_taken(base), made=made, scales=scales, **joins)
    if hidden is not None and to is not hidden:
        hidden.copy_(to)


def given(
    turn: Turn | Place,
    branches: Sequence[str],
    hidden: Tensor,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    focus: Focus | None = None,
) -> Tensor:
    """hidden + gate * v, v what a turn's planes give; of site "block" v alone.

    Args:
        hidden: [R, N, D], rows as of `keep`; gate: [R, 1, D] or [R, D], None: 1.
        out: shape and dtype of hidden, which it may be; None: a new tensor. focus: as of `keep`.
    Returns: [R, N, D] in the dtype of hidden, [R, M, D] of a token row.
    """
    place, rows = _placed(turn, branches, hidden, focus), _taken(hidden)
    assert place.weights is not None, "what is read has weights"
    to = out if out is not None and out.dtype in TAKEN else None
    options: dict[str, Any] = {"scales": place.scales, "dtype": rows.dtype, "out": to}
    if place.use.site != "block":
        by = None if gate is None else gate.to(torch.promote_types(gate.dtype, torch.float32))
        options |= {"hidden": rows, "gate": by}
    if focus is not None:
        options["ids"] = focus.ids
    made: Tensor = cache_apply(place.values, place.lanes, place.weights, **options)
    if out is None:
        return made.to(hidden.dtype)
    return made if to is not None else out.copy_(made)


def kept_whole(turn: Turn | Place, branches: Sequence[str], like: Tensor, focus: Focus) -> Tensor:
    """What a token row's turn reads of all tokens, [R, N, W] beside rows `like` [R, M, W], in their dtype."""
    place, rows = _placed(turn, branches, like, focus), _taken(like)
    assert place.weights is not None, "what is read has weights"
    made: Tensor = cache_apply(place.values, place.lanes, place.weights, scales=place.scales, dtype=rows.dtype)
    return made.to(like.dtype)


def _placed(turn: Turn | Place, branches: Sequence[str], like: Tensor, focus: Focus | None) -> Place:
    """Where the rows of a turn lie, which are as wide as those of `like`."""
    if isinstance(turn, Place):
        return turn
    rows = like if turn.use.site == "kv" else _taken(like)
    shape = tuple(like.shape[1:]) if focus is None else (focus.tokens, *like.shape[2:])
    found = [turn.places(branch, shape, like=rows) for branch in branches]
    slab, device = one_slab([slab for slab, _ in found]), rows.device
    lanes = on_device(tuple(lane for _, lanes in found for lane in lanes), torch.int64, device)
    wide = torch.float64 if slab.values.dtype == torch.float64 else torch.float32
    weights = on_device(turn.weights * len(branches), wide, device) if turn.use.reads else None
    return Place(turn.use, slab.values, slab.scales, lanes, weights)


def one_slab(slabs: Sequence[Slab]) -> Slab:
    """The slab that all rows of a call lie in. Raises RuntimeError, our bug, where they lie in several."""
    if any(slab is not slabs[0] for slab in slabs):
        raise RuntimeError("cache: rows of one forward lie in slabs of different shapes")
    return slabs[0]


def _taken(rows: Tensor | None) -> Any:
    """Rows in a dtype that the ops take."""
    return rows if rows is None or rows.dtype in TAKEN else rows.float()


def on_device(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor that nobody may write into; those of a row are mostly those of the one before."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _sent(numbers, dtype, device, stream)


@lru_cache(4096)
def _sent(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """Sent in `stream`, which is the one that reads them."""
    with torch.inference_mode(False):
        return sendable(torch.tensor(numbers, dtype=dtype), device).to(device, non_blocking=True)


def sendable(numbers: Tensor, device: torch.device) -> Tensor:
    """Host numbers that a device can fetch without anybody waiting."""
    return numbers.pin_memory() if device.type == "cuda" else numbers
