"""Slot memory of a session: [slot, lane, ...], the network-input plane, and the kernel rows of the plans in use.

A lane belongs to one sample of one request while it runs; history rotates by slot number and is never copied.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.lower import Lowered
from vivace.kernels.solver_step.table import StepTable

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

    state [slots, lanes, *shape] in `dtype`; net [lanes, *shape] in `net_dtype`; tensors: side-car tensors [*shape].
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
    calls: dict[Hashable, Launch] = field(default_factory=dict)

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
            self._tensor_ids[sha256] = len(self.tensors)
            self.calls.clear()
            self.tensors.append(torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype))
        return self._tensor_ids[sha256]

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

    def _rebuild(self) -> None:
        base = 0
        for entry in self._entries.values():
            entry.base = base
            base += len(entry.lowered.table)
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
