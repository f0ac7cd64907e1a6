"""Slot memory of a session: [slot, lane, ...], the network-input plane, and the kernel rows of the plans in use.

A lane belongs to one sample of one request while it runs; history rotates by slot number and is never copied.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.low_rank import shapes_of
from vivace.engine.lower import Lowered, LowRank
from vivace.engine.plan import Plan
from vivace.errors import UnsupportedError
from vivace.kernels.solver_step.table import DESTINATION_AT, NOISE, SOURCE_AT, TENSOR, TENSORS, StepTable

# Solver steps over the memory of a pool, given row numbers and tokens' classes; None: nothing can be bound to it.
Launch = Callable[[Sequence[int], Tensor | None], object] | None


@dataclass(slots=True, eq=False)
class Entry:
    """A lowered plan in the session's table: `base` is the number of its first kernel row."""

    lowered: Lowered
    base: int = 0
    users: int = 0


@dataclass(slots=True, eq=False)
class Pool:
    """Slots of every lane; grows, never shrinks.

    state [slots, lanes, *shape] in `dtype`; net [lanes, *shape] in `net_dtype`; tensors: side-car tensors [*shape];
    matrices: gains [r] and bases [r, *shape] of low-rank maps; maps: what rows of the table stand for that do nothing.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    net_dtype: torch.dtype
    device: torch.device
    state: Tensor = field(init=False)
    net: Tensor = field(init=False)
    table: StepTable = field(init=False)
    tensors: list[Tensor] = field(default_factory=list)
    _free: list[int] = field(default_factory=list)
    _entries: OrderedDict[Hashable, Entry] = field(default_factory=OrderedDict)
    _tensor_ids: dict[str, int] = field(default_factory=dict)
    _spare: list[int] = field(default_factory=list)  # numbers of tensors that nothing reads any more
    calls: dict[Hashable, Launch] = field(default_factory=dict)
    matrices: list[Tensor] = field(default_factory=list)
    maps: dict[int, LowRank] = field(default_factory=dict)

    kept_calls = 64
    kept_entries = 64  # lowered plans kept although no request uses them

    def __post_init__(self) -> None:
        self.state = torch.zeros((0, 0, *self.shape), dtype=self.dtype, device=self.device)
        self.net = torch.zeros((0, *self.shape), dtype=self.net_dtype, device=self.device)

    def reserve(self, slots: int, lanes: int) -> None:
        """Make room for `slots` slots and `lanes` lanes in all; contents stay."""
        old_slots, old_lanes = self.state.shape[:2]
        slots, lanes = max(slots, old_slots), max(lanes, old_lanes)
        if (slots, lanes) == (old_slots, old_lanes):
            return
        state = torch.zeros((slots, lanes, *self.shape), dtype=self.dtype, device=self.device)
        state[:old_slots, :old_lanes] = self.state
        net = torch.zeros((lanes, *self.shape), dtype=self.net_dtype, device=self.device)
        net[:old_lanes] = self.net
        self.state, self.net = state, net
        self.calls.clear()
        for lane in range(old_lanes, lanes):
            heapq.heappush(self._free, lane)

    def take(self, count: int, slots: int) -> tuple[int, ...]:
        """Lowest free lanes, growing by doubling when there are too few."""
        lanes = self.state.shape[1]
        missing = count - len(self._free)
        self.reserve(slots, lanes if missing <= 0 else max(lanes + missing, 2 * lanes))
        return tuple(heapq.heappop(self._free) for _ in range(count))

    def release(self, lanes: tuple[int, ...]) -> None:
        """Hand lanes back."""
        for lane in lanes:
            heapq.heappush(self._free, lane)

    def tensor(self, sha256: str, array: NDArray[np.floating[Any]]) -> int:
        """Number of a side-car tensor in `tensors`, uploading it once."""
        if sha256 not in self._tensor_ids:
            number = self._spare.pop() if self._spare else len(self.tensors)
            made = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)
            self._tensor_ids[sha256] = number
            self.calls.clear()
            self.tensors[number : number + 1] = [made]
        return self._tensor_ids[sha256]

    def side_car(self, plan: Plan) -> dict[str, int]:
        """Numbers of a plan's tensors by key: of low-rank maps in `matrices`, others in `tensors`. Raises PlanError."""
        mapped = shapes_of(plan, self.shape)
        self._make_room({info.sha256 for info in plan.tensors if info.key not in mapped})
        return {
            info.key: (self.matrix if info.key in mapped else self.tensor)(info.sha256, plan.arrays[info.key])
            for info in plan.tensors
        }

    def _make_room(self, wanted: Set[str]) -> None:
        """When numbers for the tensors `wanted` run short, let go of plans that no request uses, and of their tensors.

        Raises: UnsupportedError when plans under way hold too many.
        """
        spare = TENSORS - len(self.tensors) + len(self._spare)
        if len(wanted - self._tensor_ids.keys()) <= spare:
            return
        for key in [key for key, entry in self._entries.items() if not entry.users]:
            del self._entries[key]
        held = {number for entry in self._entries.values() for number in _tensors_of(entry.lowered.table)}
        for name, number in list(self._tensor_ids.items()):
            if name not in wanted and number not in held and not name.startswith("matrix "):
                del self._tensor_ids[name]
                self._spare.append(number)
        missing = len(wanted - self._tensor_ids.keys()) - (TENSORS - len(self.tensors) + len(self._spare))
        if missing > 0:
            raise UnsupportedError(
                f"plan: its {len(wanted)} tensors are {missing} more than fit beside those of the plans under way "
                f"({TENSORS} in all); finish some requests, or use a session of its own"
            )

    def matrix(self, sha256: str, array: NDArray[np.floating[Any]]) -> int:
        """Number of a tensor in `matrices`, uploading it once."""
        key = f"matrix {array.shape} {sha256}"
        if key not in self._tensor_ids:
            self._tensor_ids[key] = len(self.matrices)
            self.matrices.append(torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype))
        return self._tensor_ids[key]

    def enter(self, key: Hashable, lower: Callable[[], Lowered]) -> Entry:
        """The table entry of a lowered plan, made by `lower` when it is new."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(lower())
            for old_key in [k for k, e in self._entries.items() if not e.users and e is not entry]:
                if len(self._entries) <= self.kept_entries:
                    break
                del self._entries[old_key]
            self._rebuild()
        self._entries.move_to_end(key)
        entry.users += 1
        return entry

    def rewrite(self, entry: Entry, lowered: Lowered) -> None:
        """Other rows in place of those of an entry that one request uses; where their codes fit, only numbers move."""
        old, new = entry.lowered.table, lowered.table
        entry.lowered = lowered
        if len(old) != len(new) or old.facts != new.facts or not np.array_equal(old.facts.reach, new.facts.reach):
            self._rebuild()
            return
        rows = slice(entry.base, entry.base + len(new))
        made = new.to(self.device, self.dtype)
        self.table.ints[rows].copy_(made.ints)
        self.table.floats[rows].copy_(made.floats)

    def _rebuild(self) -> None:
        base = 0
        for entry in self._entries.values():
            entry.base = base
            base += len(entry.lowered.table)
        entries = self._entries.values()
        self.maps = {entry.base + row: made for entry in entries for row, made in entry.lowered.maps.items()}
        table = StepTable.cat([entry.lowered.table for entry in self._entries.values()])
        self.table = table.to(self.device, self.dtype)
        self.calls.clear()

    def call(self, key: Hashable, make: Callable[[], Launch]) -> Launch:
        """A launch over this memory, made by `make` when it is new."""
        if key not in self.calls:
            if len(self.calls) >= self.kept_calls:
                del self.calls[next(iter(self.calls))]
            self.calls[key] = make()
        return self.calls[key]

    @property
    def idle(self) -> bool:
        """No lane is taken."""
        return len(self._free) == self.state.shape[1]

    def lane_bytes(self) -> int:
        """Bytes one lane takes in slots and network input."""
        elements = int(np.prod(self.shape, dtype=np.int64))
        return elements * (self.state.shape[0] * self.state.element_size() + self.net.element_size())


def _tensors_of(table: StepTable) -> set[int]:
    """Numbers of the tensors that the rows of a table read."""
    codes = np.asarray(table.ints)[:, SOURCE_AT:DESTINATION_AT]
    return set((codes[(codes >= TENSOR) & (codes < NOISE)] - TENSOR).tolist())
