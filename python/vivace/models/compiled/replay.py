"""The native DiT in pieces that a graph replays: a fixed sequence of ops, fed samples and hoisted modulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.compiled import Evaluation, Hoisted
from vivace.engine.denoiser import Piece, samples_of
from vivace.engine.plan import Variant
from vivace.engine.tokens import Focus
from vivace.models.caching.events import SITES
from vivace.models.caching.laid_out import LaidOut, Layouts
from vivace.models.caching.planes import Place
from vivace.models.compiled.hoist import modulation_table
from vivace.models.compiled.linears import Linears
from vivace.models.compiled.parts import Part
from vivace.models.compiled.precisions import Kinds, kinds_of, plain, why_not
from vivace.models.compiled.scales import scale_table
from vivace.models.compiled.sequence import DitSequence
from vivace.models.dit import DiT
from vivace.models.quantized import honoured
from vivace.models.quantized.weights import QuantizedWeights
from vivace.models.versions import held

Grid = tuple[int, int]
Bind = Callable[[Mapping[str, Tensor]], list[dict[int, Place]]]


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
        self._layouts = Layouts()

    def _sequence(self, kinds: Kinds) -> DitSequence:
        """The sequence in these precisions, made when first needed."""
        if kinds not in self._sequences:
            with torch.inference_mode(False):
                self._sequences[kinds] = DitSequence(self.model, self.linears, kinds, self.quantized)
                table = scale_table(self.quantized, kinds)
                self._scales[kinds] = None if table is None else table.flatten(1).to(self.model.device)
        return self._sequences[kinds]

    sites: frozenset[str] = SITES
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
        """The piece of an evaluation, filled up to its bucket by repeating the last sample.

        Its turns are those of all its branches.
        """
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
        places = tuple(b * count + i if i < count else -1 for b in range(branches) for i in range(size))
        key, focus, laid = ("dit", kinds, branches, size, shape, call.x.dtype), call.focus, None
        if focus is not None:
            key, inputs["ids"] = (*key, focus.tokens, focus.count), samples_of(focus.ids, samples)
        if call.turns:
            laid = self._laid_out(call, variant, samples, places, sequence)
        tokens = None if focus is None else (focus.tokens, focus.count)
        piece = Piece(key, inputs, self._forward(sequence, branches, size, shape, laid and laid.bind, tokens), places)
        if laid is None:
            return (piece,)
        inputs |= laid.inputs
        return (replace(piece, key=(*key, laid.key), inputs=inputs, idle=laid.idle, stands=laid.stands),)

    def _laid_out(
        self,
        call: Evaluation,
        variant: Variant,
        samples: Sequence[int],
        places: Sequence[int],
        sequence: DitSequence,
    ) -> LaidOut:
        """The turns of an evaluation for the rows of its piece; a DiT's cells have one part, with all tokens."""
        patch, (height, width), uses = self.model.config.patch, call.x.shape[2:], [turn.use for turn in call.turns]
        tokens, wide = height // patch * (width // patch), self.model.config.width
        keys = [use.site == "kv" for use in uses]
        likes = [
            call.x.new_empty(0, dtype=sequence.key_dtype(use.blocks[0])) if of_keys else call.x[:0]
            for use, of_keys in zip(uses, keys, strict=True)
        ]
        shapes = [{0: (tokens, 2 * wide if of_keys else wide)} for of_keys in keys]
        rows = [(branch, n) for branch in variant.branches for n in samples]
        return self._layouts.of(call.turns, rows, [place < 0 for place in places], shapes, likes)

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
        self,
        sequence: DitSequence,
        branches: int,
        size: int,
        shape: tuple[int, ...],
        bind: Bind | None,
        tokens: tuple[int, int] | None,
    ) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The sequence over memory that belongs to this forward and to others of its size.

        bind: of what is laid out; tokens: of a token row, all and those that it computes.
        """
        patch, sign = self.model.config.patch, self.sign
        grid = (shape[1] // patch, shape[2] // patch)
        count = grid[0] * grid[1] if tokens is None else tokens[1]
        positions, arena = self._table(grid), sequence.arena(branches * size, count)

        def forward(tensors: Mapping[str, Tensor]) -> Tensor:
            turns = () if bind is None else tuple([parts[0] for parts in bind(tensors)])
            focus = None if tokens is None else Focus(tensors["ids"], tokens[0])
            part, scales = Part(("",) * branches, turns, focus=focus), tensors.get("x_scales")
            outs = sequence.run(tensors["x"], tensors["modulation"], positions, branches, arena, scales, part=part)
            out = arena.out if focus is None else torch.cat(outs)
            return (out if sign == 1.0 else out.mul_(sign)).view(branches * size, *shape)

        return forward

    def _table(self, grid: Grid) -> Tensor:
        """Positions [N, D] of a grid, made once."""
        if grid not in self._positions:
            with torch.inference_mode(False):
                self._positions[grid] = self.model.position_table(grid).to(self.model.dtype)
        return self._positions[grid]
