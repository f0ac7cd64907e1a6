"""Tiles of the Triton linears: which block of the result a program makes, from the shape class and the dtype alone.

The shape class is the number of rows rounded up to a power of two, with N and K. So the tile, and with it every bit of
a result, stays the same however many rows of a class there are. The table below serves until `tune` has timed the
alternatives on a device and kept its choice in the store; a choice that changes one bit of a result is not taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

from vivace.kernels import store

ROWS = (64, 1 << 16)  # least and most rows of a class; more rows belong to the last
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
PROGRAMS = 132  # that run at a time: multiprocessors of the H100
GROUP = 8  # row blocks whose programs run side by side, so that they find the weights in the L2 cache
REUSE = 64.0  # products a number loaded, by the model of `table`, at which a tile runs at half of the full rate
SCRATCH = 8 << 10  # bytes of shared memory of an epilogue that runs beside the next tile's loads


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the result a program makes, depth it reads at once, warps of it, loads under way.

    programs: on a multiprocessor, each taking one tile after another; 0: a program a tile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0

    def shared(self, dtype: str) -> int:
        """Bytes of shared memory that it takes."""
        loads = (self.rows + self.columns) * self.depth * self.stages * ITEM_BYTES[dtype]
        return loads + (SCRATCH if self.programs else 0)


# By dtype of x, largest first; of the same size, the one that stands without tuning first. Sums of floats run in one
# order: every tile of such a dtype has the depth of the others. Integers have one sum in any order.
TILES: Mapping[str, tuple[Tile, ...]] = {
    "bfloat16": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 4, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 5),
        Tile(64, 32, 64, 4, 6),
    ),
    "int8": (
        Tile(128, 256, 128, 8, 4, 1),
        Tile(128, 256, 128, 8, 3, 1),
        Tile(128, 256, 64, 8, 6, 1),
        Tile(256, 128, 128, 8, 4, 1),
        Tile(128, 128, 128, 8, 3, 2),
        Tile(128, 128, 64, 8, 6, 2),
        Tile(128, 64, 128, 4, 4, 2),
        Tile(64, 128, 128, 4, 4, 2),
        Tile(64, 64, 128, 4, 5),
        Tile(64, 32, 128, 4, 6),
    ),
    "float8_e4m3fn": (
        Tile(128, 128, 128, 8, 5, 1),
        Tile(128, 128, 128, 8, 3, 1),
        Tile(128, 64, 128, 4, 4, 2),
        Tile(64, 128, 128, 4, 4, 2),
        Tile(64, 64, 128, 4, 5),
        Tile(64, 32, 128, 4, 6),
    ),
    "float32": (
        Tile(64, 128, 16, 8, 3),
        Tile(64, 64, 16, 4, 3),
        Tile(64, 32, 16, 4, 3),
    ),
}


def tiles(dtype: str, shared: int | None = None) -> tuple[Tile, ...]:
    """All tiles of a dtype of x, of those that fit `shared` bytes of shared memory; float16 has those of bfloat16."""
    found = TILES["bfloat16" if dtype == "float16" else dtype]
    return found if shared is None else tuple(tile for tile in found if tile.shared(dtype) <= shared) or found[-1:]


def rows_class(rows: int) -> int:
    """`rows` rounded up to a power of two within ROWS."""
    least, most = ROWS
    return min(max(least, 1 << max(0, rows - 1).bit_length()), most)


def table(rows: int, columns: int, dtype: str, shared: int | None = None) -> Tile:
    """The tile that fits and wastes least by a model of PROGRAMS multiprocessors; `rows` of a class.

    The model: a tile at a time each, edges and the last round as dear as the others, and a rate of r / (r + REUSE) of
    the full one for r products a number loaded.
    """

    def rate(tile: Tile) -> float:
        programs = -(-rows // tile.rows) * -(-columns // tile.columns)
        computed = -(-programs // PROGRAMS) * PROGRAMS * tile.rows * tile.columns
        reuse = tile.rows * tile.columns / (tile.rows + tile.columns)
        return rows * columns / computed * reuse / (reuse + REUSE)

    return max(tiles(dtype, shared), key=rate)


def tile_of(rows: int, columns: int, depth: int, dtype: str, device: str, shared: int | None = None) -> Tile:
    """The tile of x [rows, depth] W [columns, depth] on this device: the tuned one, else that of the table.

    device: its name, under which choices are kept; shared: bytes of shared memory a program may have, None: enough.
    """
    return _tile_of(rows_class(rows), columns, depth, dtype, device, shared)


def key(rows: int, columns: int, depth: int, dtype: str, device: str, versions: Mapping[str, Any]) -> dict[str, Any]:
    """Under which `tune` keeps its choice; `rows` of a class."""
    shape = [rows, columns, depth]
    return {"what": "linear tile", "shape": shape, "dtype": dtype, "device": device, "versions": dict(versions)}


def kept(found: Any, dtype: str) -> Tile | None:
    """The tile of a stored value; None where it is none of today's."""
    if not isinstance(found, dict):
        return None
    return next((tile for tile in tiles(dtype) if list(astuple(tile)) == found.get("tile")), None)


def forget() -> None:
    """Look tuned tiles up again."""
    _tile_of.cache_clear()


@cache
def _tile_of(rows: int, columns: int, depth: int, dtype: str, device: str, shared: int | None) -> Tile:
    if device != "cpu":  # the interpreter has nothing to tune
        found = store.get(key(rows, columns, depth, dtype, device, versions()))
        if (tile := kept(found.value, dtype)) is not None:
            return tile
    return table(rows, columns, dtype, shared)


@cache
def versions() -> dict[str, str]:
    """Of what decides the machine code."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "vivace"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
