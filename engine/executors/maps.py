"""Low-rank maps of slots, run between kernel rows: slot <- sum_k gains[k] <basis[k], slot> basis[k].

Every sample alone and every sum in one order, so a result has the same bits whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivace.engine.pool import Pool


def low_rank(x: Tensor, gains: Tensor, basis: Tensor) -> Tensor:
    """sum_k gains[k] <basis[k], x> basis[k] of a sample x [...], gains [r], basis [r, ...]; float64 inner products."""
    flat, rows = x.reshape(1, -1), basis.flatten(1)
    products = rows * flat
    if len(rows) == 1:
        products = torch.cat((products, products))  # a lone sum would be split among threads
    shares = gains * products.sum(1, dtype=torch.float64)[: len(rows)].to(x.dtype)
    total = torch.zeros_like(rows[0])
    for share, row in zip(shares, rows, strict=True):
        total += share * row
    return total.view(x.shape)


def run_maps(pool: Pool, rows: Sequence[int], lanes: Sequence[int]) -> None:
    """The maps that kernel rows `rows` of the pool's table stand for, each on its sample's lane, in place."""
    for row, lane in zip(rows, lanes, strict=True):
        made = pool.maps[row]
        x = pool.state[made.slot, lane]
        x.copy_(low_rank(x, pool.matrices[made.gains], pool.matrices[made.basis]))
