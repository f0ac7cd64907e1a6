"""The native DiT in pieces that a graph replays: a fixed sequence of ops, fed samples and hoisted modulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vivace.engine.compiled import Evaluation, Hoisted
from vivace.engine.denoiser import Piece, samples_of
from vivace.engine.plan import Variant
from vivace.models.compiled.hoist import modulation_table
from vivace.models.compiled.linears import Linears
from vivace.models.compiled.sequence import DitSequence
from vivace.models.dit import DiT
from vivace.models.versions import held

Grid = tuple[int, int]


class DitReplay:
    """Pieces of a DiT's evaluations: one a call, whatever the samples, since labels are in the modulation.

    Args:
        label: the class id of a condition in a branch; fed: what the network is fed at timesteps of a plan; sign: of
            its output in the prediction.
        linears: the library that multiplies, None is torch's.
    """

    def __init__(
        self,
        model: DiT,
        label: Callable[[Any, str], int],
        fed: Callable[[Sequence[float]], Sequence[float]] = tuple,
        sign: float = 1.0,
        linears: Linears | None = None,
    ) -> None:
        self.model, self.label, self.fed, self.sign = model, label, fed, sign
        self.sequence = DitSequence(model, linears)
        self._positions: dict[Grid, Tensor] = {}

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        return frozenset()

    def why_not(self, variant: Variant) -> str | None:
        """Nothing stands in the way of whole forwards."""
        return None

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> Hoisted:
        """Modulation vectors [S, B, 6L + 2, D] float32 of rows at `timesteps`, for each branch of a class."""
        table = self._made(timesteps, branches, condition, keep=True)
        return Hoisted((table, tuple(branches)), {"modulation": table.nbytes})

    def _made(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any, keep: bool) -> Tensor:
        labels = [self.label(condition, branch) for branch in branches]
        return modulation_table(self.model, self.fed(timesteps), labels, keep=keep)

    def weights(self) -> list[Tensor]:
        """Parameters and buffers of the model."""
        return held(self.model)

    def report(self) -> dict[str, Any]:
        """Which library multiplies."""
        return {"linears": self.sequence.linears.how}

    def stage(self, call: Evaluation, variant: Variant, bucket: Callable[[int], int] = int) -> tuple[Piece]:
        """The piece of an evaluation, filled up to its bucket by repeating the last sample."""
        count, branches = len(call.lanes), len(variant.branches)
        size = bucket(count)
        samples = [*range(count), *[count - 1] * (size - count)]
        made = [self._modulation(call, n, variant.branches) for n in range(count)]
        inputs = {
            "x": samples_of(call.x, [call.lanes[n] for n in samples]),
            "modulation": tuple(made[n][b] for b in range(branches) for n in samples),
        }
        shape = tuple(call.x.shape[1:])
        places = (b * count + i if i < count else -1 for b in range(branches) for i in range(size))
        key = ("dit", branches, size, shape, call.x.dtype)
        return (Piece(key, inputs, self._forward(branches, size, shape), tuple(places)),)

    def _modulation(self, call: Evaluation, n: int, branches: tuple[str, ...]) -> list[Tensor]:
        """The modulation [1, 6L + 2, D] of sample n for each branch: rows of its table, or of one made now."""
        row, hoisted, known = call.rows[n], call.hoisted[n], branches
        if hoisted is None:
            row, table = 0, self._made(call.timesteps[n : n + 1], branches, call.conditions[n], keep=False)
        else:
            table, known = hoisted.data
        places = (known.index(branch) for branch in branches)
        return [table[row, at : at + 1] for at in places]

    def _forward(self, branches: int, size: int, shape: tuple[int, ...]) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The sequence over memory that belongs to this forward and to others of its size."""
        patch = self.model.config.patch
        grid = (shape[1] // patch, shape[2] // patch)
        positions, arena = self._table(grid), self.sequence.arena(branches * size, grid[0] * grid[1])

        def forward(tensors: Mapping[str, Tensor]) -> Tensor:
            self.sequence.run(tensors["x"], tensors["modulation"], positions, branches, arena)
            out = arena.out if self.sign == 1.0 else arena.out.mul_(self.sign)
            return out.view(branches * size, *shape)

        return forward

    def _table(self, grid: Grid) -> Tensor:
        """Positions [N, D] of a grid, made once."""
        if grid not in self._positions:
            with torch.inference_mode(False):
                self._positions[grid] = self.model.position_table(grid).to(self.model.dtype)
        return self._positions[grid]
