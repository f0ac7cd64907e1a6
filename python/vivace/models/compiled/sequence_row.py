"""Rows of the native DiT as a fixed sequence of torch linears and our ops: where those beat the row in C++."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from vivace.engine.compiled import Bucket
from vivace.models.compiled.cpp_row import Fault, Memory, Picks
from vivace.models.compiled.parts import Part
from vivace.models.compiled.precisions import Kinds, plain
from vivace.models.compiled.scales import scale_table
from vivace.models.compiled.sequence import Arena, DitSequence
from vivace.models.dit import DiT
from vivace.models.quantized.weights import QuantizedWeights

KEPT = 8  # arenas and position tables kept, one for each (rows, tokens)


class SequenceRow:
    """Evaluates rows by `DitSequence`; owns its arenas, whose outputs the next run overwrites. See `CppRow`."""

    def __init__(
        self,
        model: DiT,
        kinds: Kinds | None = None,
        quantized: QuantizedWeights | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.sequence = model, DitSequence(model, None, kinds, quantized)
        self.fault: Fault | None = None
        self._scales = scale_table(quantized, kinds or plain(model))
        self._arena = lru_cache(KEPT)(self.sequence.arena)
        self._positions = lru_cache(KEPT)(self._table)

    def reserve(self, branches: int, bucket: Bucket, some: bool = False) -> None:
        """Nothing: arenas fit one number of rows and tokens and are made when that is known."""

    def run(
        self,
        x: Tensor,
        lanes: Sequence[int],
        tables: Sequence[Tensor],
        picks: Picks,
        groups: Sequence[int] | None = None,
        *,
        part: Part | None = None,
        check: bool = False,
    ) -> tuple[Tensor, ...]:
        """Predictions [n, C, H, W] per branch, in the model's dtype; arguments as of `CppRow.run`."""
        self.fault, look = None, partial(self._look, len(lanes)) if check else None
        some = None if part is None or part.focus is None else part.focus.count
        return self.sequence.run(*self._call(x, lanes, tables, picks, groups, some), look, part)

    def look(
        self,
        x: Tensor,
        lanes: Sequence[int],
        tables: Sequence[Tensor],
        picks: Picks,
        groups: Sequence[int] | None,
        blocks: int,
        *,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As `CppRow.look`; the hidden states in their own dtype."""
        self.fault, look = None, partial(self._look, len(lanes)) if check else None
        made = self.sequence.look(*self._call(x, lanes, tables, picks, groups), look, blocks)
        signal, states = (rows.unflatten(0, (len(picks[0]), len(lanes))) for rows in made)
        return signal, states

    def _call(
        self,
        x: Tensor,
        lanes: Sequence[int],
        tables: Sequence[Tensor],
        picks: Picks,
        groups: Sequence[int] | None,
        some: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, int, Arena, Tensor | None]:
        """What `DitSequence` takes first. some: how many tokens a token row computes."""
        patch, (height, width) = self.model.config.patch, x.shape[2:]
        grid, branches, n = (height // patch, width // patch), len(picks[0]), len(lanes)
        adjacent = list(lanes) == list(range(lanes[0], lanes[0] + n))
        samples = x[lanes[0] : lanes[0] + n] if adjacent else x[torch.tensor(lanes)]
        chosen = [table[pick[b]] for b in range(branches) for table, pick in zip(tables, picks, strict=True)]
        arena = self._arena(branches * n, some or grid[0] * grid[1])
        given = None
        if groups is not None and self._scales is not None:
            given = self._scales[list(groups) * branches].flatten(1)
        return samples, torch.stack(chosen), self._positions(grid), branches, arena, given

    def _look(self, samples: int, name: str, x: Tensor) -> None:
        """Note the first linear whose input [R, N, ...] is not finite, and the sample."""
        if self.fault is None and not bool(x.isfinite().all()):
            rows = x.isfinite().flatten(1).all(1)
            self.fault = name, int((~rows).nonzero()[0]) % samples

    def _table(self, grid: tuple[int, int]) -> Tensor:
        return self.model.position_table(grid).to(self.model.dtype)
