"""Lanes of kept memory for the rows of a forward of a foreign network: what one turn keeps there and gives again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vivace.engine.kept import Slab, Turn
from vivace.kernels.cache_apply import cache_apply
from vivace.kernels.cache_update import cache_update
from vivace.models.caching.planes import TAKEN, on_device, one_slab
from vivace.models.tokens.active import Active


class Rows:
    """The rows of a forward: a branch and the position of a sample each."""

    def __init__(self, rows: Sequence[tuple[str, int]]) -> None:
        self.count = len(rows)
        self.groups = [(b, tuple(n for _, n in group)) for b, group in groupby(rows, lambda row: row[0])]


class Lanes:
    """The lanes of a turn for the rows of a forward.

    active: the tokens that a row of some computes, None: all. What is kept has all tokens: those are put into it and
    taken from it. behind: text tokens lie behind the image's in what holds both.
    """

    def __init__(self, turn: Turn, rows: Rows, active: Active | None = None, behind: bool = False) -> None:
        self.use, self.rows, self.active, self.behind = turn.use, rows, active, behind
        self.turns = [(branch, turn.pick(samples)) for branch, samples in rows.groups]

    def start(self) -> int:
        """The first block of the longest run of ranges that is read with this cell."""
        return min(turn.start(branch) for branch, turn in self.turns)

    def keep(self, part: int, fresh: Tensor, base: Tensor | None = None, text: bool = False) -> None:
        """Keep `fresh` [R, ...], or fresh - base, and the differences that the row makes."""
        fresh = _readable(fresh, self.rows.count)
        some = self.active is not None and not text
        slab, lanes = self._places(part, None if some else tuple(fresh.shape[1:]), fresh)
        under = None if base is None else _readable(base, self.rows.count)
        picked = self._picked(slab, text)
        cache_update(slab.values, lanes, fresh, base=under, made=self.use.made, scales=slab.scales, **picked)

    def give(
        self,
        part: int,
        like: Tensor,
        shape: tuple[int, ...] | None = None,
        hidden: Tensor | None = None,
        text: bool = False,
    ) -> Tensor:
        """What was kept or is forecast, [R, *shape] in the dtype of `like`, plus `hidden`. shape None: any."""
        some = self.active is not None and not text
        slab, lanes = self._places(part, None if some else shape, like)
        dtype = like.dtype if like.dtype in TAKEN else torch.float32
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        weights = self.weights(exact, slab.values.device)
        under = None if hidden is None else _readable(hidden, self.rows.count)
        given: dict[str, Any] = {"dtype": dtype} if under is None else {"hidden": under}
        given |= self._picked(slab, text)
        made: Tensor = cache_apply(slab.values, lanes, weights, scales=slab.scales, **given)
        return made.to(like.dtype)

    def _picked(self, slab: Slab, text: bool) -> dict[str, Any]:
        """The places that a row of some tokens is about, as the ops take them."""
        if self.active is None or text:
            return {}
        return {"ids": self.active.ids(self.active.text_of(slab.shape[0], "what is kept"), self.behind)}

    def _places(self, part: int, shape: tuple[int, ...] | None, like: Tensor) -> tuple[Slab, Tensor]:
        """The slab, and the lane of every row as the ops read it."""
        slab, lanes = self.lanes(part, shape, like)
        return slab, self.index(lanes, slab.values.device)

    def index(self, lanes: tuple[int, ...], device: torch.device) -> Tensor:
        """Lanes as a tensor."""
        return on_device(lanes, torch.int64, device)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Weights [R, terms] of what is read."""
        return on_device(tuple(weights for _, turn in self.turns for weights in turn.weights), dtype, device)

    def lanes(self, part: int, shape: tuple[int, ...] | None, like: Tensor) -> tuple[Slab, tuple[int, ...]]:
        """The slab, and the lane of every row; shape None: of whatever was kept."""
        found = [turn.places(branch, shape, part, like) for branch, turn in self.turns]
        return one_slab([slab for slab, _ in found]), tuple(lane for _, lanes in found for lane in lanes)


def _readable(tensor: Tensor, count: int) -> Tensor:
    """`tensor` as the kernels read it. Raises RuntimeError when it has not a row for each sample."""
    if tensor.shape[0] != count:
        raise RuntimeError(f"cache: a block gives {tensor.shape[0]} rows in a forward of {count}")
    wide = tensor if tensor.dtype in TAKEN else tensor.float()
    return wide if wide.stride(-1) == 1 else wide.contiguous()
