"""Where the row in C++ finds what it keeps and gives again: memory by use and row, and weights.

Samples keep their memory from row to row, so it is looked up once for rows of one structure and the same samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from vivace import _C
from vivace.engine.kept import Kept, Slab, Turn
from vivace.models.caching.events import APPLY, KEYS, OPEN, events_of, uses_of
from vivace.models.compiled.parts import Part
from vivace.models.tokens.native import check_row

Likes = Sequence[torch.Tensor]  # of each block what the heads of its attention are like
LIKE = torch.empty(0)  # what is kept where a store is not said: float32


class KeptRows(NamedTuple):
    """What `_C.Dit.run` takes beside a plain row: uses, their weights; the block to begin at, and its states by row.

    some: address of the ids of a token row and how many a sample has.
    """

    uses: _C.DitUses | None = None
    weights: Sequence[float] = ()
    first: int = 0
    start: Sequence[int] = ()
    some: tuple[int, int] = (0, 0)


NOTHING = KeptRows()


class _Found(NamedTuple):
    """Memory of the rows of one structure. reads: turns that read planes, in order; slabs: with their serials."""

    uses: _C.DitUses
    reads: tuple[int, ...]
    slabs: tuple[tuple[Slab, int], ...]


class KeptMemories:
    """What parts of calls come to in addresses, as long as a request lives. heads: of each block its attention's."""

    def __init__(self, heads: Likes = ()) -> None:
        self.heads = heads
        self._found: WeakKeyDictionary[Kept, dict[Hashable, _Found]] = WeakKeyDictionary()  # by the first sample's
        self._numbers: WeakKeyDictionary[Kept, int] = WeakKeyDictionary()
        self._next = count()

    def of(self, part: Part, samples: int, shape: tuple[int, int]) -> KeptRows:
        """A part in addresses; shape: of one sample's hidden states."""
        if not part.turns and part.states is None and part.focus is None:
            return NOTHING
        some = (0, 0) if part.focus is None else (part.focus.ids.data_ptr(), part.focus.count)
        rows, start = samples * len(part.branches), []
        if part.states is not None:
            step = part.states.stride(1) * part.states.itemsize
            start = [part.states.data_ptr() + row * step for row in range(rows)]
        if not part.turns:
            return KeptRows(None, (), part.block, start, some)
        found = self._memory(part, rows, shape)
        weights = [
            weight
            for turn in found.reads
            for _ in part.branches
            for sample in part.turns[turn].samples
            for weight in sample.weights
        ]
        return KeptRows(found.uses, weights, part.block, start, some)

    def _memory(self, part: Part, rows: int, shape: tuple[int, int]) -> _Found:
        """The memory of a part, looked up anew where it is of other samples or where a slab has moved."""
        samples = part.turns[0].samples  # those of every turn
        known = self._found.setdefault(samples[0].kept, {})
        whose = tuple([(self._number(sample.kept), sample.picture) for sample in samples])
        key = part.branches, shape, whose, uses_of(part.turns), part.focus is None
        found = known.get(key)
        if found is None or any(slab.serial != serial for slab, serial in found.slabs):
            found = known[key] = _memory(part, rows, shape, self.heads)
        return found

    def _number(self, kept: Kept) -> int:
        """A number that no other request's memory ever has."""
        number = self._numbers.get(kept)
        if number is None:
            number = self._numbers[kept] = next(self._next)
        return number


def _memory(part: Part, rows: int, shape: tuple[int, int], heads: Likes) -> _Found:
    uses = uses_of(part.turns)
    events, told = events_of(uses), []
    taken = [_places(part, turn, shape, heads) for turn in part.turns]
    found = [_addresses(places) for places in taken]  # once all lanes are taken: a slab that grows moves
    nothing = [0] * rows
    values: list[int] = []
    scales: list[int] = []
    for event in events:
        use = uses[event.turn]
        terms = 0 if event.action == KEYS else use.terms
        store = str(taken[event.turn][0][0].dtype).removeprefix("torch.")
        told.append((event.action, event.site, event.at, event.until, use.made, terms, store))
        own = (nothing, nothing) if event.action == OPEN else found[event.turn]
        values += own[0]
        scales += own[1] or nothing
    slabs = {id(slab): slab for places in taken for slab, _ in places}.values()
    reads = tuple(event.turn for event in events if event.action == APPLY)
    kept = _C.DitUses(told, values, scales, rows)
    return _Found(kept, reads, tuple((slab, slab.serial) for slab in slabs))


def _places(part: Part, turn: Turn, shape: tuple[int, int], heads: Likes) -> list[tuple[Slab, Sequence[int]]]:
    """The slab and the lanes of a turn, branch by branch."""
    like = LIKE
    if turn.use.site == "kv":
        check_row(turn, part.focus)
        like, shape = heads[turn.use.blocks[0]], (shape[0], 2 * shape[1])
    return [turn.places(branch, shape, like=like) for branch in part.branches]


def _addresses(places: Sequence[tuple[Slab, Sequence[int]]]) -> tuple[list[int], list[int]]:
    """Of every row the planes and, of int8, the scales."""
    values, scales = [], []
    for slab, lanes in places:
        first, step = slab.values.data_ptr(), slab.values.stride(0) * slab.values.itemsize
        values += [first + lane * step for lane in lanes]
        if slab.scales is not None:
            first, step = slab.scales.data_ptr(), slab.scales.stride(0) * 4
            scales += [first + lane * step for lane in lanes]
    return values, scales
