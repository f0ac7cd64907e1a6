"""`cache_update` on the CPU: csrc/ops/cache_update.*, one pass over memory with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.cache_update.check import KEPT_AS
from vivace.kernels.norm_modulate import cpu_impl as over_rows
from vivace.kernels.norm_modulate.cpu_impl import rows, vector

if TYPE_CHECKING:
    from torch import Tensor

STORES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
NO_IDS = 0, 1, 0
Planes = tuple[int, int, int, int, int]  # address, dtype, lanes, planes, address of the scales or 0


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot run on rows and a store of these dtypes on `device`; None when it can."""
    return over_rows.why_not(device, dtype.partition(KEPT_AS)[0])


def cache_update(
    kept: Tensor,
    lanes: Tensor,
    fresh: Tensor,
    *,
    base: Tensor | None = None,
    made: int = 0,
    hidden: Tensor | None = None,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor | None:
    """D_0' = fresh - base, D_{j+1}' = D_j' - D_j; hidden + gate * (fresh - base).

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    if hidden is not None and out is None:
        out = torch.empty_like(hidden)
    _C.cache_update(
        planes(kept, scales),
        lanes.tolist(),
        rows(fresh),
        None if base is None else rows(base),
        made,
        None if hidden is None else rows(hidden),
        None if gate is None else vector(gate),
        None if out is None else rows(out),
        some(ids, kept),
        fresh.shape,
        torch.get_num_threads(),
    )
    return out


def some(ids: Tensor | None, kept: Tensor) -> tuple[int, int, int]:
    """Which tokens of kept [L, P, N, W] a call is about, ids [n, M] in one piece, as C++ takes it."""
    return NO_IDS if ids is None else (ids.data_ptr(), ids.shape[0], kept.shape[2])


def planes(kept: Tensor, scales: Tensor | None) -> Planes:
    """[L, P, N, W] as C++ takes it."""
    address = 0 if scales is None else scales.data_ptr()
    return kept.data_ptr(), STORES[kept.dtype], kept.shape[0], kept.shape[1], address
