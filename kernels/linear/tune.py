"""Times the tiles of the Triton linears on a device and keeps the fastest for a shape class.

Only speed is chosen: a tile whose result differs in one bit from that of the table's tile is refused, so a result is
the same before and after tuning, and on a machine where the choice was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from vivace.errors import ArgumentError, BackendError
from vivace.kernels import store
from vivace.kernels.linear import tiles
from vivace.kernels.linear.tiles import Tile
from vivace.kernels.spec import TRITON, missing

Choice = TypeVar("Choice")
EIGHT_BITS = ("int8", "float8_e4m3fn")
WARM_UP, REPEATS = 3, 15
FLUSH_BYTES = 256 << 20  # written between calls: more than an L2 cache holds


@dataclass(frozen=True, slots=True)
class Tuned:
    """What `tune` found, for a shape class.

    table: the tile that stands without tuning; ms: median time of each tile; refused: tiles that change bits or cannot
    run, and why; not_kept: why the choice could not be stored, None when it was.
    """

    tile: Tile
    table: Tile
    shape: tuple[int, int, int]
    dtype: str
    device: str
    ms: dict[Tile, float]
    refused: dict[Tile, str]
    not_kept: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; tiles as rows x columns x depth, warps, stages."""
        return {
            "tile": _name(self.tile), "table": _name(self.table),
            "shape": list(self.shape), "dtype": self.dtype, "device": self.device,
            "ms": {_name(tile): ms for tile, ms in self.ms.items()},
            "refused": {_name(tile): why for tile, why in self.refused.items()}, "not_kept": self.not_kept,
        }  # fmt: skip


def tune(
    rows: int,
    columns: int,
    depth: int,
    dtype: str = "bfloat16",
    *,
    device: str = "cuda",
    clock: Callable[[Callable[[], Any]], float] | None = None,
    folder: Path | None = None,
) -> Tuned:
    """The fastest tile of x [rows, depth] W [columns, depth], for all numbers of rows of the class; kept in the store.

    Args:
        dtype: of x and W, "bfloat16" | "float16" | "float32" | "int8" | "float8_e4m3fn".
        clock: milliseconds of one call; None: the median between events, caches cold.
        folder: of the store; None: the user's cache, where the linears look.
    Raises: ArgumentError; BackendError where Triton cannot run.
    """
    if min(rows, columns, depth) < 1 or dtype not in (*tiles.TILES, "float16"):
        raise ArgumentError(f"tune: {rows} rows, N {columns}, K {depth}, {dtype}; needs 1 or more and a dtype of tiles")
    if (reason := missing(TRITON)) is not None:
        raise BackendError(f"tune: {reason}; tiles are tuned where they run")
    from vivace.kernels.linear.triton_impl import device_name, shared_bytes

    shape = tiles.rows_class(rows), columns, depth
    run = _problem(*shape, dtype, torch.device(device))
    clock = clock or device_clock()
    shared = shared_bytes(torch.device(device))
    table = tiles.table(shape[0], columns, dtype, shared)
    ms, refused = timed(run, tiles.tiles(dtype, shared), table, clock)
    best = min(ms, key=lambda tile: ms[tile])
    name = device_name(torch.device(device))
    key = tiles.key(*shape, dtype, name, tiles.versions())
    not_kept = store.put(key, {"tile": list(astuple(best)), "ms": ms[best]}, folder=folder)
    tiles.forget()
    return Tuned(best, table, shape, dtype, name, ms, refused, not_kept)


def timed(
    run: Callable[[Choice], Tensor],
    choices: Iterable[Choice],
    table: Choice,
    clock: Callable[[Callable[[], Any]], float],
) -> tuple[dict[Choice, float], dict[Choice, str]]:
    """Milliseconds of every choice, and why the others are refused: they cannot run, or change bits of the table's."""
    wanted, ms, refused = run(table).clone(), dict[Choice, float](), dict[Choice, str]()
    for choice in choices:
        if (why := _refusal(run, choice, wanted)) is None:
            ms[choice] = clock(partial(run, choice))
        else:
            refused[choice] = why
    return ms, refused


def _problem(rows: int, columns: int, depth: int, dtype: str, device: torch.device) -> Callable[[Tile], Tensor]:
    """A call of the kernel with a given tile, on random numbers, into one and the same memory."""
    eight = dtype in EIGHT_BITS
    launch = import_module(f"vivace.kernels.{'int8_linear' if eight else 'linear'}.triton_impl").launch
    generator = torch.Generator().manual_seed(rows + columns + depth)

    def draw(*shape: int) -> Tensor:
        if dtype == "int8":
            return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)
        return torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))

    x, weight = draw(rows, depth), draw(columns, depth)
    scales = [torch.rand(size, generator=generator).to(device) if eight else None for size in (rows, columns)]
    bias = torch.randn(columns, generator=generator).to(device)
    out = torch.empty(rows, columns, dtype=torch.bfloat16 if eight else x.dtype, device=device)

    def run(tile: Tile) -> Tensor:
        result: Tensor = launch(tile, x, weight, scales[0], scales[1], bias, "gelu_tanh", None, None, out)
        return result

    return run


def _refusal(run: Callable[[Choice], Tensor], choice: Choice, wanted: Tensor) -> str | None:
    """Why one is not taken, None when it may be."""
    from vivace.kernels.linear.triton_impl import FAILURES

    try:
        result = run(choice)
    except FAILURES as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None if torch.equal(result, wanted) else "changes bits"


def device_clock() -> Callable[[Callable[[], Any]], float]:
    """Median milliseconds between events, with a written buffer between calls so that caches are cold."""
    event: Any = partial(torch.cuda.Event, enable_timing=True)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def milliseconds(call: Callable[[], Any]) -> float:
        marks = []
        for _ in range(WARM_UP + REPEATS):
            begin, end = event(), event()
            flush.zero_()
            begin.record()
            call()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return median(float(begin.elapsed_time(end)) for begin, end in marks[WARM_UP:])

    return milliseconds


def _name(tile: Tile) -> str:
    kept = f", {tile.programs} a multiprocessor" if tile.programs else ""
    return f"{tile.rows} x {tile.columns} x {tile.depth}, {tile.warps} warps, {tile.stages} stages{kept}"
