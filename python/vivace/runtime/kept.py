"""What calls keep for later rows: planes of one request, each [branches, pictures, ...], handed to graphs as they lie.

No graph writes what it reads: a plane that is both is written beside and takes the other's place afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.errors import PackError

Array: TypeAlias = NDArray[Any]


class Place(NamedTuple):
    """A plane: of which network, values ("kept") or their scales, of which kept thing, part and plane."""

    model: str
    source: str
    key: str
    part: int
    plane: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a batch: row b * n + s is sample `pictures[s]` in branch `branches[b]`, both by number."""

    branches: tuple[int, ...]
    pictures: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.branches) * len(self.pictures)

    def of(self, array: Array) -> Array:
        """Those rows of an array [B, n, ...] as [rows, ...], C-contiguous: a view where they lie side by side."""
        lying = self._lying(array)
        if lying is not None:
            return lying
        return np.ascontiguousarray(array[np.ix_(self.branches, self.pictures)]).reshape(len(self), *array.shape[2:])

    def put(self, array: Array, values: Array) -> None:
        """Write values [rows, ...] into those rows of an array [B, n, ...]."""
        lying = self._lying(array)
        if lying is None:
            each = len(self.branches), len(self.pictures)
            array[np.ix_(self.branches, self.pictures)] = values.reshape(*each, *array.shape[2:])
        elif lying.ctypes.data != values.ctypes.data:
            lying[...] = values

    def whole(self, array: Array) -> bool:
        """They are all rows of an array [B, n, ...], in order."""
        lying = self._lying(array)
        return lying is not None and len(lying) == array.shape[0] * array.shape[1]

    def _lying(self, array: Array) -> Array | None:
        """A view of the rows where they lie side by side."""
        b, s = self.branches[0], self.pictures[0]
        beside = self.branches == tuple(range(b, b + len(self.branches)))
        beside &= self.pictures == tuple(range(s, s + len(self.pictures)))
        if not beside or (len(self.branches) > 1 and len(self.pictures) < array.shape[1]):
            return None
        first = b * array.shape[1] + s
        return array.reshape(-1, *array.shape[2:])[first : first + len(self)]


class KeptPlanes:
    """The planes of one request, made when they are first written."""

    def __init__(self, branches: Sequence[str], pictures: int) -> None:
        self.branches, self.pictures = tuple(branches), pictures
        self._planes: dict[Place, Array] = {}
        self._spare: dict[Place, Array] = {}

    def read(self, place: Place, rows: Rows) -> Array:
        """Rows of a plane, as it is now. Raises PackError where nothing was kept."""
        if place not in self._planes:
            raise PackError(f"a graph reads {place}, and no row before kept it; export the pack again")
        return rows.of(self._planes[place])

    def room(self, place: Place, rows: Rows, shape: tuple[int, ...], dtype: np.dtype[Any], read: bool) -> Array:
        """Memory for rows of a plane to be written into, before `took`. shape: of the rows; read: the call reads it."""
        if place not in self._planes:
            self._planes[place] = np.zeros((len(self.branches), self.pictures, *shape[1:]), dtype)
        if not read:
            return rows.of(self._planes[place])
        if place not in self._spare:
            self._spare[place] = np.zeros_like(self._planes[place])
        return rows.of(self._spare[place])

    def took(self, place: Place, rows: Rows, values: Array, read: bool) -> None:
        """The plane's rows are now `values`, which a call wrote into its room or into memory of its own."""
        if place not in self._planes:
            self._planes[place] = np.zeros((len(self.branches), self.pictures, *values.shape[1:]), values.dtype)
        spare = self._spare.get(place)
        if read and spare is not None and rows.whole(spare) and rows.of(spare).ctypes.data == values.ctypes.data:
            self._planes[place], self._spare[place] = spare, self._planes[place]
        else:
            rows.put(self._planes[place], values)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, those written beside included."""
        return sum(plane.nbytes for planes in (self._planes, self._spare) for plane in planes.values())
