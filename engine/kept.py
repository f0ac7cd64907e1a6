"""Memory of cached tensors: slabs of a session, lanes of them that belong to a request, and turns that name both.

A request's cells are lanes of slabs, taken when they are first filled (or reserved when it begins) and handed back when
it ends. Nothing hangs on a module, and nothing is allocated in the loop once a session has served its largest mix.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.caching import KEYS, CachePlan, Cell, Use

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_serials = itertools.count()  # of memory that slabs and requests have had, in this process


@dataclass(slots=True, eq=False, weakref_slot=True)
class Slab:
    """Lanes of one shape: values [lanes, planes, *shape] in the dtype of the store; int8 has scales.

    scales: float32 [lanes, planes, *shape[:-1]], None for other stores. Both tensors are replaced when the slab grows,
    so take every place of a call before reading them. serial: of these tensors, no others ever have it.
    """

    shape: tuple[int, ...]
    planes: int
    dtype: torch.dtype
    device: torch.device
    values: Tensor = field(init=False)
    scales: Tensor | None = None
    serial: int = field(init=False)
    _free: list[int] = field(default_factory=list)
    _spare: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.serial = next(_serials)
        self.values = torch.zeros((0, self.planes, *self.shape), dtype=self.dtype, device=self.device)
        if self.dtype == torch.int8:
            self.scales = torch.zeros((0, self.planes, *self.shape[:-1]), dtype=torch.float32, device=self.device)

    def take(self, count: int) -> tuple[int, ...]:
        """Lowest free lanes; the slab doubles when there are too few."""
        lanes = len(self.values)
        if count > len(self._free):
            self._grow(max(lanes + count - len(self._free), 2 * lanes))
        return tuple(heapq.heappop(self._free) for _ in range(count))

    def release(self, lanes: Sequence[int]) -> None:
        """Hand lanes back."""
        for lane in lanes:
            heapq.heappush(self._free, lane)

    def spare(self, count: int) -> tuple[int, ...]:
        """That many lanes of nobody, for rows whose outcome nobody reads; the same ones for everybody who asks."""
        if count > len(self._spare):
            self._spare += self.take(count - len(self._spare))
        return tuple(self._spare[:count])

    def _grow(self, lanes: int) -> None:
        old, self.serial = len(self.values), next(_serials)
        self.values = _longer(self.values, lanes)
        self.scales = None if self.scales is None else _longer(self.scales, lanes)
        for lane in range(old, lanes):
            heapq.heappush(self._free, lane)

    @property
    def idle(self) -> bool:
        """No lane is taken by anybody."""
        return len(self._free) + len(self._spare) == len(self.values)

    @property
    def lane_bytes(self) -> int:
        """Bytes of one lane."""
        size = self.planes * self.values[:0].new_empty(self.shape).nbytes
        return size if self.scales is None else size + 4 * self.planes * int(torch.Size(self.shape[:-1]).numel())

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def _longer(tensor: Tensor, lanes: int) -> Tensor:
    made = tensor.new_zeros((lanes, *tensor.shape[1:]))
    made[: len(tensor)] = tensor
    return made


class KeptMemory:
    """The slabs of a session. Those that nobody uses are dropped beyond `spare`."""

    spare = 8

    def __init__(self) -> None:
        self.slabs: dict[Hashable, Slab] = {}

    def slab(self, shape: tuple[int, ...], planes: int, dtype: torch.dtype, device: torch.device) -> Slab:
        """The slab of that shape, planes and dtype."""
        key = shape, planes, dtype, device
        found = self.slabs.pop(key, None) or Slab(shape, planes, dtype, device)
        self.slabs[key] = found  # the last used comes last
        for other in [k for k, slab in self.slabs.items() if slab.idle and slab is not found]:
            if len(self.slabs) <= self.spare:
                break
            del self.slabs[other]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.nbytes for slab in self.slabs.values())

    @property
    def idle(self) -> bool:
        """No request holds a lane."""
        return all(slab.idle for slab in self.slabs.values())


class Kept:
    """What one request of n pictures keeps: lanes by cell and part, the same from the first use to the end.

    places: (cell, part) -> its slab and the lane of every picture; serial: its own, no other ever has it.
    """

    def __init__(self, memory: KeptMemory, plan: CachePlan, pictures: int) -> None:
        self.memory, self.plan, self.pictures, self.serial = memory, plan, pictures, next(_serials)
        self.places: dict[tuple[Cell, int], tuple[Slab, tuple[int, ...]]] = {}

    def lanes(self, cell: Cell, part: int, shape: tuple[int, ...], like: Tensor) -> tuple[Slab, tuple[int, ...]]:
        """The slab of a cell's part and the lane of every picture, taken when first asked for.

        Raises RuntimeError, our bug, when a cell changes its shape within a request.
        """
        found = self.places.get((cell, part))
        if found is None:
            slab = self.memory.slab(shape, self.plan.planes[cell], self._dtype(cell, like), like.device)
            found = self.places[cell, part] = slab, slab.take(self.pictures)
        if found[0].shape != shape:
            raise RuntimeError(f"cache {cell}: holds {found[0].shape}, a row has {shape}")
        return found

    def _dtype(self, cell: Cell, like: Tensor) -> torch.dtype:
        """What a cell is kept in; where nothing is said keys and values as they are, all else in float32."""
        store = self.plan.stores[cell]
        if store is not None:
            return DTYPES[store]
        return like.dtype if cell.site == "kv" or like.dtype == torch.float64 else torch.float32

    def held(self, cell: Cell, part: int) -> tuple[int, ...]:
        """The shape of a cell's part. Raises RuntimeError, our bug, where nothing was kept."""
        if (cell, part) not in self.places:
            raise RuntimeError(f"cache {cell}: part {part} is read, no row kept it")
        return self.places[cell, part][0].shape

    def reserve(self, shape: tuple[int, ...], like: Tensor) -> None:
        """Take the lanes of all cells whose first part is of this shape; keys and values wait for their first row."""
        for cell in self.plan.planes:
            if cell.site not in KEYS:
                self.lanes(cell, 0, shape, like)

    def release(self) -> None:
        """Hand all lanes back."""
        for slab, lanes in self.places.values():
            slab.release(lanes)
        self.places.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of its lanes."""
        return sum(slab.lane_bytes * len(lanes) for slab, lanes in self.places.values())


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture's side of a turn: whose memory, which picture of it, and the weights on planes."""

    kept: Kept
    picture: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """A use for the samples of a group, in their order."""

    use: Use
    model: str
    samples: tuple[Sample, ...]

    def places(
        self, branch: str, shape: tuple[int, ...] | None, part: int = 0, like: Tensor | None = None
    ) -> tuple[Slab, tuple[int, ...]]:
        """(slab, lane of every sample) of a branch's cell.

        Args:
            shape: of one sample, such as (tokens, width), (tokens, 2 width of heads) of site "kv", (tokens,) of site
                "received": of one block the softmax weight of each image token as a key, mean over heads, summed over
                image queries. None where it is read: whatever was kept.
            part: 0 the image's stream, 1 the text's, 2 and on skips.
            like: a tensor on the device, of the dtype that is kept where the store is not said; None: float32, CPU.
        """
        like = torch.empty(0) if like is None else like
        found = []
        for sample in self.samples:
            cell = self._cell(sample, branch)
            held = sample.kept.held(cell, part) if shape is None or self.use.reads else shape
            found.append(sample.kept.lanes(cell, part, held if shape is None else shape, like))
        return found[0][0], tuple(lanes[sample.picture] for (_, lanes), sample in zip(found, self.samples, strict=True))

    def start(self, branch: str) -> int:
        """The first block of the longest run of ranges that any sample's plan reads with a branch's cell."""
        cells = [(sample.kept.plan, self._cell(sample, branch)) for sample in self.samples]
        return min(plan.starts.get(cell, cell.first) for plan, cell in cells)

    @property
    def weights(self) -> tuple[tuple[float, ...], ...]:
        """Of every sample the weights on planes, `use.terms` of them."""
        return tuple(sample.weights for sample in self.samples)

    def pick(self, positions: Sequence[int]) -> Turn:
        """The turn for some of the samples."""
        return Turn(self.use, self.model, tuple(self.samples[position] for position in positions))

    def _cell(self, sample: Sample, branch: str) -> Cell:
        """The cell that a branch keeps or reads in a sample's plan, which may cut its ranges elsewhere than others."""
        return sample.kept.plan.cells[self.model, self.use.site, self.use.blocks[1], branch]


def split(branches: Sequence[str], turns: Sequence[Turn]) -> list[tuple[tuple[str, ...], tuple[Turn, ...]]]:
    """Branches that do the same with the caches, each such set with its turns: one forward of the network each."""
    if all(turn.use.branches == tuple(branches) for turn in turns):
        return [(tuple(branches), tuple(turns))]
    said: dict[tuple[Turn, ...], list[str]] = {}
    for branch in branches:
        mine = tuple(turn for turn in turns if branch in turn.use.branches)
        said.setdefault(mine, []).append(branch)
    return [(tuple(names), mine) for mine, names in said.items()]


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a look at the first blocks left, for the run that follows it.

    signal: float32 [branches, n, ...] that a guard measures; branches: of signal and states, in their order; block:
    blocks [0, block) are done; states: what the run starts from, opaque to the engine; samples: which of the samples
    of the look are meant, in order; apart: states are looks at one sample each.
    """

    signal: Tensor
    branches: tuple[str, ...]
    block: int
    states: Any
    samples: tuple[int, ...]
    apart: bool = False

    def pick(self, positions: Sequence[int]) -> Seen:
        """The same for some of the samples, by position among those that are meant now."""
        samples = tuple(self.samples[position] for position in positions)
        if self.apart and len(samples) == 1:
            alone: Seen = self.states[samples[0]]
            return alone
        return replace(self, samples=samples)

    @classmethod
    def of_each(cls, looks: Sequence[Seen]) -> Seen:
        """Looks at one sample each as one, for samples that must not share a forward."""
        signal = torch.cat([look.signal for look in looks], dim=1)
        return cls(signal, looks[0].branches, looks[0].block, tuple(looks), tuple(range(len(looks))), True)
