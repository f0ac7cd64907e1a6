"""The merge maps of one forward's rows: made of branch "cond" where a row makes them anew, kept by the request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivace.engine.merging import MergeSample, Merging
from vivace.models.tokens.merge import (
    Merged,
    MergeMap,
    best_pairs,
    cells,
    drawn_by_importance,
    drawn_per_cell,
    left_of,
    pooled,
)


class Maps:
    """What the rows of a forward merge by. rows: a branch and the position of a sample each."""

    def __init__(self, merging: Merging, rows: Sequence[tuple[str, int]]) -> None:
        assert merging.row is not None, "a row that merges nothing has no maps"
        self.model, self.row, self.rows = merging.model, merging.row, tuple(rows)
        self.samples = [_there(merging.samples[position]) for _, position in rows]
        self._drawn: dict[tuple[int, tuple[int, int]], Tensor] = {}

    @property
    def grids(self) -> dict[int, tuple[int, int]]:
        """Grids by tokens, as far as the request knows them."""
        return self.samples[0].state.grids

    def of(
        self, block: int, layer: int, hidden: Tensor, grid: tuple[int, int], share: float, fresh: bool
    ) -> Merged | None:
        """The maps of a layer's rows, which read hidden [R, N, D]; None where nothing merges.

        fresh: pictures whose branch "cond" is here get a new map, made of its row; others use the one they have.
        """
        left, tokens = left_of(grid, self.row.cell, share), grid[0] * grid[1]
        if left == tokens:
            return None
        key = self.model, block, layer
        for row, (branch, position) in enumerate(self.rows):
            if branch == "cond":
                state, picture = self.samples[row].state, self.samples[row].picture
                if fresh:
                    drawn = self._destinations(row, position, grid, hidden.device)
                    place, origin = best_pairs(hidden[row], drawn, left)
                    state.maps.setdefault(key, {})[picture] = place.int(), origin.int()
                state.made += fresh
                state.used += not fresh
        pairs = [sample.state.maps.get(key, {}).get(sample.picture) for sample in self.samples]
        known = [pair for pair in pairs if pair is not None and len(pair[0]) == tokens]
        if len(known) < len(pairs):
            raise RuntimeError(f"merge: no map of block {block}, layer {layer} for {tokens} tokens")
        places, origins = (torch.stack([pair[k] for pair in known]).long() for k in range(2))
        return Merged(MergeMap(places, origins))

    def _destinations(self, row: int, position: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The destinations of a picture, the same in all layers of a grid."""
        if (position, grid) not in self._drawn:
            sample = self.samples[row]
            self._drawn[position, grid] = destinations(sample, grid, self.row.cell, self.row.guided, device)
        return self._drawn[position, grid]


def destinations(sample: MergeSample, grid: tuple[int, int], cell: int, guided: bool, device: torch.device) -> Tensor:
    """The destinations of a picture in its row: by importance where there is any and it is asked for, else per cell."""
    state, number = sample.state, (sample.state.seeds[sample.picture], sample.state.pictures[sample.picture])
    known = state.importance.get(sample.picture) if guided else None
    if known is not None:
        return drawn_by_importance(pooled(known, grid), cells(grid, cell), *number, sample.row)
    drawn = drawn_per_cell(grid, cell, *number, sample.row)
    return drawn if device.type == "cpu" else drawn.pin_memory().to(device, non_blocking=True)


def _there(sample: MergeSample | None) -> MergeSample:
    assert sample is not None, "rows that merge have a request that keeps maps"
    return sample
