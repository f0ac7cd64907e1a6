"""Rows of the native DiT as a fixed sequence of torch linears and our ops: where those beat the row in C++."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vivace.engine.compiled import Bucket
from vivace.models.compiled.sequence import DitSequence
from vivace.models.dit import DiT

KEPT = 8  # arenas and position tables kept, one for each (rows, tokens)


class SequenceRow:
    """Evaluates rows by `DitSequence`; owns its arenas, whose outputs the next run overwrites."""

    def __init__(self, model: DiT) -> None:
        self.model, self.sequence = model, DitSequence(model)
        self._arena = lru_cache(KEPT)(self.sequence.arena)
        self._positions = lru_cache(KEPT)(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, in the order of the library that multiplies."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def reserve(self, branches: int, bucket: Bucket) -> None:
        """Nothing: arenas fit one number of rows and tokens and are made when that is known."""

    def run(
        self, x: Tensor, lanes: Sequence[int], tables: Sequence[Tensor], picks: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[Tensor, ...]:
        """Predictions [n, C, H, W] per branch, in the model's dtype; arguments as of `CppRow.run`."""
        patch, (height, width) = self.model.config.patch, x.shape[2:]
        grid, branches, n = (height // patch, width // patch), len(picks[0]), len(lanes)
        adjacent = list(lanes) == list(range(lanes[0], lanes[0] + n))
        samples = x[lanes[0] : lanes[0] + n] if adjacent else x[torch.tensor(lanes)]
        chosen = [table[pick[b]] for b in range(branches) for table, pick in zip(tables, picks, strict=True)]
        arena = self._arena(branches * n, grid[0] * grid[1])
        return self.sequence.run(samples, torch.stack(chosen), self._positions(grid), branches, arena)

    def _table(self, grid: tuple[int, int]) -> Tensor:
        return self.model.position_table(grid).to(self.model.dtype)
