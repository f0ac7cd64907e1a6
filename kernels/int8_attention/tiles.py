"""Blocks of `int8_attention` on a GPU: queries a program takes, keys it takes at once; how a head is cut.

The number of keys follows from the width alone, since it decides bits; what `tune` chooses among changes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

from vivace.kernels import store
from vivace.kernels.linear.tiles import rows_class, versions

PART = 512  # keys that are added up before their sum is stored
PROGRAMS = 132  # that a launch should have


@dataclass(frozen=True, slots=True)
class Head:
    """Widths of the two parts of a head: the first, and what of the rest is multiplied, as keys and as values."""

    first: int
    rest: int
    rest_values: int

    @classmethod
    def of(cls, width: int) -> Head:
        """The largest power of two within the width, 32 at least, and the least that holds what is left."""
        first = max(32, 1 << (width.bit_length() - 1))
        left = max(0, width - first)
        power = 1 << max(0, left - 1).bit_length()
        return cls(first, max(32, power) if left else 0, max(16, power) if left else 0)

    @property
    def wide(self) -> int:
        """A power of two that holds both parts."""
        return 1 << (self.first + self.rest - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Blocks:
    """Queries of a program, keys at once, warps, loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int

    def shared(self, head: Head) -> int:
        """Bytes of shared memory: keys with their scales and values under way, and the queries."""
        under_way = self.keys * (head.first + head.rest + 2 * (head.first + head.rest_values) + 4)
        return self.stages * under_way + self.queries * (head.first + head.rest)


# By the width of both parts, up to this, largest first; within one width all take the same number of keys.
BLOCKS: Mapping[int, tuple[Blocks, ...]] = {
    96: (Blocks(128, 128, 8, 3), Blocks(128, 128, 8, 2), Blocks(64, 128, 4, 3), Blocks(64, 128, 4, 2)),
    128: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)),
}


def blocks(head: Head, shared: int | None = None) -> tuple[Blocks, ...]:
    """All blocks of heads cut so, of those that fit `shared` bytes of shared memory."""
    found = next(each for widest, each in BLOCKS.items() if head.first + head.rest <= widest)
    return found if shared is None else tuple(each for each in found if each.shared(head) <= shared) or found[-1:]


def table(head: Head, rows: int, queries: int, shared: int | None = None) -> Blocks:
    """The first that fits and gives PROGRAMS programs for so many heads of all samples, else the last."""
    found = blocks(head, shared)
    return next((each for each in found if -(-queries // each.queries) * rows >= PROGRAMS), found[-1])


def blocks_of(head: Head, rows: int, queries: int, keys: int, device: str, shared: int | None = None) -> Blocks:
    """The tuned blocks of this head, shape class and device, else those of the table; rows: heads of all samples."""
    return _blocks_of(head, rows_class(rows), rows_class(queries), rows_class(keys), device, shared)


def key(head: Head, rows: int, queries: int, keys: int, device: str) -> dict[str, Any]:
    """Under which `tune` keeps its choice; rows, queries and keys of a class."""
    shape = [head.first, head.rest, rows, queries, keys]
    return {"what": "attention blocks", "shape": shape, "device": device, "versions": versions()}


def kept(found: Any, head: Head) -> Blocks | None:
    """The blocks of a stored value; None where they are none of today's."""
    if not isinstance(found, dict):
        return None
    return next((each for each in blocks(head) if list(astuple(each)) == found.get("blocks")), None)


def forget() -> None:
    """Look tuned blocks up again."""
    _blocks_of.cache_clear()


@cache
def _blocks_of(head: Head, rows: int, queries: int, keys: int, device: str, shared: int | None) -> Blocks:
    if device != "cpu":  # the interpreter has nothing to tune
        found = store.get(key(head, rows, queries, keys, device))
        if (chosen := kept(found.value, head)) is not None:
            return chosen
    return table(head, rows, queries, shared)
