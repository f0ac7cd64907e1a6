"""The fastest matrix product of this machine: what "percent of roofline" is a share of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from vivace.kernels.int8_linear import int8_linear
from vivace.kernels.linear import linear, pack_weight
from vivace.kernels.spec import CPU, missing

ROWS, DEPTH, COLUMNS = 1024, 1152, 4608
SPAN = 0.2  # seconds for each candidate


@cache
def gemm_peak(dtype: str) -> float:
    """Operations per second of the best product: torch's, oneDNN's prepacked, ours."""
    return max(_rate(call) for call in _products(dtype))


def _rate(call: Callable[[], object]) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + SPAN
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return 2 * ROWS * DEPTH * COLUMNS / best


def _products(dtype: str) -> Iterator[Callable[[], Any]]:
    """x W^T in every way that runs here."""
    if dtype == "int8":
        a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((ROWS, DEPTH), (COLUMNS, DEPTH)))
        yield lambda: torch._int_mm(a, b.t())
        if missing(CPU) is None:
            panels, by_row, by_column = pack_weight(b), torch.ones(ROWS), torch.ones(COLUMNS)
            yield lambda: int8_linear(a, panels, by_row, by_column)
        return
    x, weight = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in ((ROWS, DEPTH), (COLUMNS, DEPTH)))
    yield lambda: F.linear(x, weight)
    if torch.backends.mkldnn.is_available():
        ops: Any = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(weight, ROWS)
        yield lambda: ops._linear_pointwise(x, packed, None, "none", [], "")
    if missing(CPU) is None:
        ours = pack_weight(weight)
        yield lambda: linear(x, ours)
