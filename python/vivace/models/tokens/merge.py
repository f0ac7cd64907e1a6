"""Tokens merged by similarity: the map from hidden states, the mean of what merges, and its result copied back.

Sizes: N tokens of a grid (h, w), T destinations, one per cell x cell, r tokens merged away, M = N - r left. Every
picture has a map of its own, made of its own hidden states by products of one size, so that it does not depend on what
else is in the batch. What is left stands in the order of the grid.
Source: Bolya and Hoffman 2023 (ToMe for Stable Diffusion), section 4; Wu et al. 2024, arXiv 2411.16720 (importance).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vivace.engine.merge_rows import merged_count
from vivace.engine.noise import philox_words

DRAWS = 1 << 31  # draws of noise lie below
POOL = 2  # destinations by importance are drawn from this many times as many tokens
CHUNK = 1 << 24  # similarities held at a time


class MergeMap(NamedTuple):
    """The maps of rows. place: int64 [R, N], the merged token of each token; origin: int64 [R, M], the token that each
    merged one stands for, ascending."""

    place: Tensor
    origin: Tensor


def cells(grid: tuple[int, int], cell: int) -> int:
    """Destinations of a grid: its whole cells."""
    return (grid[0] // cell) * (grid[1] // cell)


def left_of(grid: tuple[int, int], cell: int, share: float) -> int:
    """Tokens left, M = N - min(int(share N), N - T); N where the grid has no whole cell."""
    tokens, drawn = grid[0] * grid[1], cells(grid, cell)
    return tokens - min(merged_count(tokens, share), tokens - drawn) if drawn else tokens


def drawn_per_cell(grid: tuple[int, int], cell: int, seed: int, picture: int, row: int) -> Tensor:
    """One token of each whole cell, int64 [T] ascending: word k of philox(seed, picture, 2^31 + row) chooses in cell k.

    Tokens of the last rows and columns that make no whole cell are never drawn.
    """
    high, wide = grid[0] // cell, grid[1] // cell
    words = philox_words(seed, picture, DRAWS + row, high * wide).astype(np.uint64)
    within = ((words * np.uint64(cell * cell)) >> np.uint64(32)).astype(np.int64)
    y, x = np.divmod(np.arange(high * wide), wide)
    tokens = (y * cell + within // cell) * grid[1] + x * cell + within % cell
    return torch.from_numpy(np.sort(tokens))


def drawn_by_importance(importance: Tensor, count: int, seed: int, picture: int, row: int) -> Tensor:
    """`count` of the 2 count tokens of largest importance [N], those with the smallest words. int64 [T], ascending."""
    size = len(importance)
    words = torch.from_numpy(philox_words(seed, picture, DRAWS + row, size).astype(np.int64)).to(importance.device)
    pool = torch.argsort(importance, descending=True, stable=True)[: min(size, POOL * count)]
    return pool[torch.argsort(words[pool], stable=True)[:count]].sort().values


def pooled(importance: Tensor, grid: tuple[int, int]) -> Tensor:
    """Importance [H, W], or [N] of packed tokens, as its mean over each token of a grid; [N]."""
    if importance.dim() == 1:
        return importance
    return torch.nn.functional.adaptive_avg_pool2d(importance[None, None], grid).flatten()


def best_pairs(hidden: Tensor, destinations: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """place, origin: the N - left tokens most like a destination are merged into it; others stay.

    similarity(s, d) = <h_s, h_d> / (|h_s| |h_d|); a token takes its best destination (the first of equal ones), and
    the tokens with the highest similarity merge (of equal ones those that come first).

    Args:
        hidden: [N, D] of one picture; destinations: int64 [T], ascending, on its device; left: M.
    Returns: int64 [N] and [M], see `MergeMap`.
    """
    tokens, device = len(hidden), hidden.device
    unit = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(unit.dtype).tiny)
    others = torch.ones(tokens, dtype=torch.bool, device=device).index_fill_(0, destinations, False)
    sources = torch.argsort(~others, stable=True)[: tokens - len(destinations)]
    wanted = unit[destinations].T.contiguous()
    found = [(unit[part] @ wanted).max(dim=-1) for part in sources.split(max(1, CHUNK // len(destinations)))]
    likeness = torch.cat([each.values for each in found])
    partner = torch.cat([each.indices for each in found])
    best = torch.argsort(likeness, descending=True, stable=True)[: tokens - left]
    gone = sources[best]
    stays = torch.ones(tokens, dtype=torch.int64, device=device).index_fill_(0, gone, 0)
    place = stays.cumsum(0) - 1
    place[gone] = place[destinations[partner[best]]]
    origin = torch.argsort(stays, descending=True, stable=True)[:left]
    return place, origin


class Merged:
    """The maps of a forward's rows, as its blocks use them: what is gathered and summed, in which order."""

    def __init__(self, maps: MergeMap) -> None:
        rows, self.tokens = maps.place.shape
        self.left = maps.origin.shape[1]
        self.origin = maps.origin
        base = torch.arange(rows, device=maps.place.device)[:, None]
        self._place = (maps.place + base * self.left).flatten()
        self._order = (torch.argsort(maps.place, dim=1, stable=True) + base * self.tokens).flatten()
        ends = torch.zeros(rows * self.left + 1, dtype=torch.int64, device=maps.place.device)
        counts = torch.zeros_like(ends[1:]).scatter_add_(0, self._place, torch.ones_like(self._place))
        torch.cumsum(counts, 0, out=ends[1:])
        self._ends = ends

    def merge(self, x: Tensor) -> Tensor:
        """Means of what merges, added up in the order of the grid, in float32 at least; [R, N, D] -> [R, M, D]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1).index_select(0, self._order)
        means = torch.segment_reduce(wide, "mean", offsets=self._ends, axis=0, unsafe=True)
        return means.to(x.dtype).unflatten(0, (-1, self.left))

    def unmerge(self, y: Tensor) -> Tensor:
        """Every token with what its merged one became; [R, M, D] -> [R, N, D]."""
        return y.flatten(0, 1).index_select(0, self._place).unflatten(0, (-1, self.tokens))
