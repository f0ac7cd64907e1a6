"""Looks at the first blocks of a foreign transformer: what a guard measures, and the states a run goes on from.

A look is a forward whose later blocks hand on what they read. Nothing is thrown, so that hooks see whole forwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.engine.denoiser import BlockCall, BlockOut
from vivace.errors import UnsupportedError
from vivace.models.caching.foreign import Cached, Keeper
from vivace.models.caching.inside import inside, silent, watching
from vivace.models.caching.looks import look_blocks
from vivace.models.caching.wiring import half_of

States = list[dict[str, dict[int, Tensor]]]  # by sample and branch: parts [1, ...] of what leaves the first blocks


class Aside:
    """Parts of rows, held by the tensors themselves."""

    def __init__(self, parts: Mapping[int, Tensor] | None = None) -> None:
        self.parts = dict(parts or {})

    def keep(self, part: int, fresh: Tensor, base: Tensor | None = None, text: bool = False) -> None:
        """Hold `fresh`."""
        self.parts[part] = fresh

    def give(
        self,
        part: int,
        like: Tensor,
        shape: tuple[int, ...] | None = None,
        hidden: Tensor | None = None,
        text: bool = False,
    ) -> Tensor:
        """What is held."""
        return self.parts[part]


class Look(Keeper):
    """The interceptor of a look by one of `looks.METRICS`. After the forward: signal [R, ...], and `held`."""

    def __init__(self, cached: Cached, rows: Sequence[tuple[str, int]], metric: str, params: Sequence[float]) -> None:
        super().__init__(cached.parts, cached.wiring, (), rows)
        self.block = look_blocks(metric, params, len(cached.parts.blocks))
        self.signal: Tensor | None = None
        self.held, self._begin = Aside(), torch.empty(0)
        if self.block:
            self.keep_range(self.held, 0, self.block)

    def __call__(self, call: BlockCall) -> BlockOut:
        block = call.info.index
        if block == 0:
            self._begin = call.hidden[:, call.image]
        if block < self.block:
            out = super().__call__(call)
            if block == self.block - 1:
                self.signal = out.hidden[:, call.image].float() - self._begin.float()
            return out
        if block == 0:
            call.compute(inside=partial(inside, self._silenced()))
        return BlockOut(call.hidden, call.context)

    def _silenced(self) -> dict[str, Any]:
        """Stand-ins in the first block: the attention shows what it reads, nothing is computed."""
        entry, info = self.parts.entries[0], self.parts.blocks[0]
        block = self.parts.module.get_submodule(info.name)
        wraps: dict[str, Any] = {}
        for half in entry.inside:
            wraps |= watching(block, half, self._watch) if "attn" in half.sites else silent(block, half)
        return wraps

    def _watch(self, modulated: Tensor) -> None:
        self.signal = modulated.float()


def metrics_of(cached: Cached) -> frozenset[str]:
    """Metrics that a look at this network knows."""
    if cached.wiring.resized:
        return frozenset()
    half = half_of(cached.parts.entries[0], "attn")
    modulated = half is not None and len(half.sites) == 1
    return frozenset({"first_block", "modulated_input"} if modulated else {"first_block"})


def check_metric(cached: Cached, metric: str) -> None:
    """Raise UnsupportedError for a metric that the network has not."""
    known = metrics_of(cached)
    if metric not in known:
        name = type(cached.parts.module).__name__
        raise UnsupportedError(f"guard {metric!r}: {name} is looked at by {' or '.join(sorted(known)) or 'none'}")


def states_of(held: Aside, rows: Sequence[tuple[str, int]], states: States) -> None:
    """Put the rows of what a look held into states by sample and branch."""
    for row, (branch, sample) in enumerate(rows):
        states[sample][branch] = {part: tensor[row : row + 1] for part, tensor in held.parts.items()}


def resumed(keeper: Keeper, states: States, block: int, rows: Sequence[tuple[str, int]]) -> Keeper:
    """The keeper of a run that goes on after blocks [0, block), which are given what a look held."""
    if block:
        found = [states[sample][branch] for branch, sample in rows]
        keeper.give_range(Aside({part: torch.cat([each[part] for each in found]) for part in found[0]}), 0, block)
    return keeper
