"""Times the blocks of `int8_attention` on a device and keeps the fastest for a shape class, as `linear.tune` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vivace.errors import ArgumentError, BackendError
from vivace.kernels import store
from vivace.kernels.int8_attention import MOST_WIDTH, tiles
from vivace.kernels.int8_attention.tiles import Blocks, Head
from vivace.kernels.linear.tiles import rows_class
from vivace.kernels.linear.tune import device_clock, timed
from vivace.kernels.spec import TRITON, missing


@dataclass(frozen=True, slots=True)
class TunedBlocks:
    """What `tune` found: the fastest blocks, those of the table, median ms of each, and what was refused and why.

    shape: heads of all samples, queries, keys, width; not_kept: why the choice could not be stored, None when it was.
    """

    blocks: Blocks
    table: Blocks
    shape: tuple[int, int, int, int]
    device: str
    ms: dict[Blocks, float]
    refused: dict[Blocks, str]
    not_kept: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON; blocks as queries x keys, warps, stages."""
        return {
            "tile": _name(self.blocks), "table": _name(self.table), "shape": list(self.shape), "device": self.device,
            "ms": {_name(blocks): ms for blocks, ms in self.ms.items()},
            "refused": {_name(blocks): why for blocks, why in self.refused.items()}, "not_kept": self.not_kept,
        }  # fmt: skip


def tune(
    rows: int,
    queries: int,
    keys: int,
    width: int,
    *,
    device: str = "cuda",
    clock: Callable[[Callable[[], Any]], float] | None = None,
    folder: Path | None = None,
) -> TunedBlocks:
    """The fastest blocks of `rows` heads (of all samples), bfloat16, for all sizes of the class; kept in the store.

    Args: clock, folder: as of `vivace.kernels.linear.tune.tune`.
    Raises: ArgumentError; BackendError where Triton cannot run.
    """
    if min(rows, queries, keys, width) < 1 or width > MOST_WIDTH:
        raise ArgumentError(f"tune: {rows} heads, {queries} queries, {keys} keys, width {width}; needs 1 or more")
    if (reason := missing(TRITON)) is not None:
        raise BackendError(f"tune: {reason}; blocks are tuned where they run")
    from vivace.kernels.int8_attention.triton_impl import launch
    from vivace.kernels.linear.triton_impl import device_name, shared_bytes

    place, head = torch.device(device), Head.of(width)
    generator = torch.Generator().manual_seed(rows + queries + keys + width)
    sizes = ((1, queries, rows, width), (1, keys, rows, width), (1, keys, rows, width))
    query, key, value = (torch.randn(size, generator=generator).to(place, torch.bfloat16) for size in sizes)
    out = torch.empty_like(query)

    def run(blocks: Blocks) -> Tensor:
        return launch(blocks, query, key, value, None, out)

    classes, shared = (rows_class(rows), rows_class(queries), rows_class(keys)), shared_bytes(place)
    table = tiles.table(head, *classes[:2], shared)
    ms, refused = timed(run, tiles.blocks(head, shared), table, clock or device_clock())
    best, name = min(ms, key=lambda blocks: ms[blocks]), device_name(place)
    value_kept = {"blocks": list(astuple(best)), "ms": ms[best]}
    not_kept = store.put(tiles.key(head, *classes, name), value_kept, folder=folder)
    tiles.forget()
    return TunedBlocks(best, table, (rows, queries, keys, width), name, ms, refused, not_kept)


def _name(blocks: Blocks) -> str:
    return f"{blocks.queries} x {blocks.keys}, {blocks.warps} warps, {blocks.stages} stages"
