"""The turns of a row laid out for a graph: memory by address, lanes and weights as tensors that a row is written into.

A graph reads and writes memory where it lay when it was captured. So that memory is part of the key of a piece, and a
slab that has grown is another one: what was captured over the old one is never staged again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from vivace.engine.caching import Use
from vivace.engine.kept import Slab, Turn
from vivace.models.caching.planes import Place, one_slab, sendable

LANES, WEIGHTS = "kept lanes", "kept weights"  # inputs of a piece

Shapes = Mapping[int, tuple[int, ...]]  # of one sample, by part of a cell


class LaidOut(NamedTuple):
    """What a piece with caches has besides its inputs without them.

    inputs: of this row; idle: in their place while nothing may be kept; key: what of the memory decides the code;
    bind: from the tensors of a forward the places of every turn by part; stands: whether the memory is where it was.
    """

    inputs: Mapping[str, tuple[Tensor, ...]]
    idle: Mapping[str, tuple[Tensor, ...]]
    key: Hashable
    bind: Callable[[Mapping[str, Tensor]], list[dict[int, Place]]]
    stands: Callable[[], bool]


class _Cell(NamedTuple):
    """One part of a turn's cells: its slab and the lane of every row."""

    turn: int
    part: int
    slab: Slab
    lanes: list[int]


class Layouts:
    """The turns of rows laid out. A request has its lanes for good: they are looked up once, for the last `limit`."""

    limit = 64

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, LaidOut] = OrderedDict()

    def of(
        self,
        turns: Sequence[Turn],
        rows: Sequence[tuple[str, int]],
        filled: Sequence[bool],
        shapes: Sequence[Shapes],
        likes: Sequence[Tensor],
    ) -> LaidOut:
        """The turns of a row for these rows of a forward, whose lanes are taken here.

        rows: branch and position of the sample; filled: of each, whether it only fills a bucket, so that what it keeps
        is nobody's; shapes, likes: of every turn, these on the device and of a dtype as `Turn.places` takes it.
        """
        pictures = tuple([(sample.kept.serial, sample.picture) for sample in turns[0].samples])
        parts = tuple([tuple(shape.items()) for shape in shapes])
        key = tuple([turn.use for turn in turns]), turns[0].model, pictures, tuple(rows), tuple(filled), parts
        found = self._found.get(key)
        if found is None or not found.stands():
            for old in [old for old, laid in self._found.items() if not laid.stands()]:
                del self._found[old]
            found = self._found[key] = _lay_out(turns, rows, filled, shapes, likes)
            if len(self._found) > self.limit:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        weights = [w for turn in turns if turn.use.reads for _, n in rows for w in turn.samples[n].weights]
        if not weights:
            return found
        device, wide = likes[0].device, any(like.dtype == torch.float64 for like in likes)
        sent = sendable(torch.tensor(weights, dtype=torch.float64 if wide else torch.float32), device)
        return found._replace(inputs={**found.inputs, WEIGHTS: (sent,)})


def _lay_out(
    turns: Sequence[Turn],
    rows: Sequence[tuple[str, int]],
    filled: Sequence[bool],
    shapes: Sequence[Shapes],
    likes: Sequence[Tensor],
) -> LaidOut:
    """As `Layouts.of`, without weights, which are of one row."""
    cells = [
        _cell(turn, k, part, shape, rows, like)
        for k, (turn, parts, like) in enumerate(zip(turns, shapes, likes, strict=True))
        for part, shape in parts.items()
    ]
    nobody = {id(cell.slab): cell.slab.spare(len(rows)) for cell in cells}  # slabs are as large now as they will be
    lanes, idle, device = list[int](), list[int](), likes[0].device
    for cell in cells:
        spare = nobody[id(cell.slab)]
        use, own = turns[cell.turn].use, zip(cell.lanes, spare, filled, strict=True)
        writes = not use.reads or use.site == "kv"  # keys and values are read behind those that a row writes there
        lanes += [nobodys if fills and writes else lane for lane, nobodys, fills in own]
        idle += spare
    slabs = {id(cell.slab): cell.slab for cell in cells}
    key = tuple([(_structure(turn.use), *shape) for turn, shape in zip(turns, shapes, strict=True)])
    held = [(ref(slab), slab.serial) for slab in slabs.values()]
    memory = [(cell.turn, cell.part, cell.slab.values, cell.slab.scales) for cell in cells]
    return LaidOut(
        {LANES: (sendable(torch.tensor(lanes), device),)},
        {LANES: (sendable(torch.tensor(idle), device),)},
        (key, tuple([cell.slab.serial for cell in cells])),
        partial(_bound, [turn.use for turn in turns], memory, len(rows)),
        partial(_stands, held),
    )


def _cell(
    turn: Turn, number: int, part: int, shape: tuple[int, ...], rows: Sequence[tuple[str, int]], like: Tensor
) -> _Cell:
    """One part of a turn's cells, for the samples of these rows alone."""
    slabs, lanes = list[Slab](), dict[tuple[str, int], int]()
    for branch in dict.fromkeys(branch for branch, _ in rows):
        samples = tuple(dict.fromkeys(n for other, n in rows if other == branch))
        slab, found = turn.pick(samples).places(branch, shape, part, like)
        slabs.append(slab)
        lanes |= {(branch, n): lane for n, lane in zip(samples, found, strict=True)}
    return _Cell(number, part, one_slab(slabs), [lanes[row] for row in rows])


def _structure(use: Use) -> Hashable:
    """What of a use decides code: neither whose cells they are nor how many bits keep them, which the memory says."""
    return use.site, use.blocks, use.reads, use.made, use.terms


def _bound(
    uses: Sequence[Use],
    memory: Sequence[tuple[int, int, Tensor, Tensor | None]],
    rows: int,
    tensors: Mapping[str, Tensor],
) -> list[dict[int, Place]]:
    """The places of every turn by part, over the tensors of a forward."""
    lanes, places = tensors[LANES].view(len(memory), rows), list[dict[int, Place]]()
    first = 0
    weights = list[Tensor | None]()
    for use in uses:
        last = first + rows * use.terms if use.reads else first
        weights.append(tensors[WEIGHTS][first:last].view(rows, use.terms) if use.reads else None)
        places.append({})
        first = last
    for (turn, part, values, scales), at in zip(memory, lanes, strict=True):
        places[turn][part] = Place(uses[turn], values, scales, at, weights[turn])
    return places


def _stands(held: Sequence[tuple[ref[Slab], int]]) -> bool:
    """Every slab is there, its memory where it was."""
    return all(slab is not None and slab.serial == serial for slab, serial in ((find(), s) for find, s in held))
