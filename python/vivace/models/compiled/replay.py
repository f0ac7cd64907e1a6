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
from vivace.models.compiled.precisions import Kinds, kinds_of, plain, why_not
from vivace.models.compiled.scales import scale_table
from vivace.models.compiled.sequence import DitSequence
from vivace.models.dit import DiT
from vivace.models.quantized import honoured
from vivace.models.quantized.weights import QuantizedWeights
from vivace.models.versions import held

Grid = tuple[int, int]


class DitReplay:
    """Pieces of a DiT's evaluations: one a call, whatever the samples, since labels are in the modulation.

    Args:
        label: the class id of a condition in a branch; fed: what the network is fed at timesteps of a plan; sign: of
            its output in the prediction.
        linears: the library that multiplies, None is torch's; quantized: the model's weights for rows in their format.
    """

    def __init__(
        self,
        model: DiT,
        label: Callable[[Any, str], int],
        fed: Callable[[Sequence[float]], Sequence[float]] = tuple,
        sign: float = 1.0,
        linears: Linears | None = None,
        quantized: QuantizedWeights | None = None,
    ) -> None:
        self.model, self.label, self.fed, self.sign = model, label, fed, sign
        self.linears, self.quantized = linears, None if quantized is None else quantized.to(model.device)
        self._sequences: dict[Kinds, DitSequence] = {}
        self._scales: dict[Kinds, Tensor | None] = {}
        self.sequence = self._sequence(plain(model))
        self._positions: dict[Grid, Tensor] = {}

    def _sequence(self, kinds: Kinds) -> DitSequence:
        """The sequence in these precisions, made when first needed."""
        if kinds not in self._sequences:
            with torch.inference_mode(False):
                self._sequences[kinds] = DitSequence(self.model, self.linears, kinds, self.quantized)
                table = scale_table(self.quantized, kinds)
                self._scales[kinds] = None if table is None else table.flatten(1).to(self.model.device)
        return self._sequences[kinds]

    sites: frozenset[str] = frozenset()  # graphs name memory by address: rows that keep or reuse run outside of them
    metrics: frozenset[str] = frozenset()

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        return honoured(self.quantized)

    def why_not(self, variant: Variant) -> str | None:
        """Nothing stands in the way of whole forwards, unless a precision does."""
        return why_not(self.model, variant, self.quantized)

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> Hoisted:
        """Modulation vectors [S, B, 6L + 2, D] float32 of rows at `timesteps`, for each branch of a class."""
        table = self._made(timesteps, branches, condition, keep=True)
        return Hoisted((table, tuple(branches)), {"modulation": table.nbytes})

    def _made(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any, keep: bool) -> Tensor:
        labels = [self.label(condition, branch) for branch in branches]
        return modulation_table(self.model, self.fed(timesteps), labels, keep=keep)

    def weights(self) -> list[Tensor]:
        """Parameters and buffers of the model, and its quantized weights."""
        layers = () if self.quantized is None else self.quantized.layers.values()
        return [*held(self.model), *(tensor for layer in layers for tensor in layer.tensors.values())]

    def report(self) -> dict[str, Any]:
        """Which library multiplies in the model's dtype, and bytes of quantized weights."""
        told = {"linears": self.sequence.linears.how}
        return told if self.quantized is None else told | {self.quantized.format: self.quantized.nbytes}

    def stage(self, call: Evaluation, variant: Variant, bucket: Callable[[int], int] = int) -> tuple[Piece]:
        """The piece of an evaluation, filled up to its bucket by repeating the last sample."""
        count, branches = len(call.lanes), len(variant.branches)
        size = bucket(count)
        samples = [*range(count), *[count - 1] * (size - count)]
        kinds = kinds_of(self.model, variant)
        sequence = self._sequence(kinds)
        made = [self._modulation(call, n, variant.branches) for n in range(count)]
        inputs = {
            "x": samples_of(call.x, [call.lanes[n] for n in samples]),
            "modulation": tuple(made[n][b] for b in range(branches) for n in samples),
        }
        if (table := self._scales[kinds]) is not None and self.quantized is not None:
            groups = [self.quantized.group_of(time) for time in call.timesteps]
            inputs["x_scales"] = tuple(table[groups[n]][None] for _ in range(branches) for n in samples)
        shape = tuple(call.x.shape[1:])
        places = (b * count + i if i < count else -1 for b in range(branches) for i in range(size))
        key = ("dit", kinds, branches, size, shape, call.x.dtype)
        return (Piece(key, inputs, self._forward(sequence, branches, size, shape), tuple(places)),)

    def _modulation(self, call: Evaluation, n: int, branches: tuple[str, ...]) -> list[Tensor]:
        """The modulation [1, 6L + 2, D] of sample n for each branch: rows of its table, or of one made now."""
        row, hoisted, known = call.rows[n], call.hoisted[n], branches
        if hoisted is None:
            row, table = 0, self._made(call.timesteps[n : n + 1], branches, call.conditions[n], keep=False)
        else:
            table, known = hoisted.data
        places = (known.index(branch) for branch in branches)
        return [table[row, at : at + 1] for at in places]

    def _forward(
        self, sequence: DitSequence, branches: int, size: int, shape: tuple[int, ...]
    ) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The sequence over memory that belongs to this forward and to others of its size."""
        patch, sign = self.model.config.patch, self.sign
        grid = (shape[1] // patch, shape[2] // patch)
        positions, arena = self._table(grid), sequence.arena(branches * size, grid[0] * grid[1])

        def forward(tensors: Mapping[str, Tensor]) -> Tensor:
            given = tensors.get("x_scales")
            sequence.run(tensors["x"], tensors["modulation"], positions, branches, arena, given)
            out = arena.out if sign == 1.0 else arena.out.mul_(sign)
            return out.view(branches * size, *shape)

        return forward

    def _table(self, grid: Grid) -> Tensor:
        """Positions [N, D] of a grid, made once."""
        if grid not in self._positions:
            with torch.inference_mode(False):
                self._positions[grid] = self.model.position_table(grid).to(self.model.dtype)
        return self._positions[grid]
