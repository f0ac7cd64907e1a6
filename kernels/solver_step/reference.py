"""The definition of `solver_step`: plain torch, one sample at a time, float32 or float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivace.engine.noise import normals
from vivace.kernels.solver_step import table as t
from vivace.kernels.solver_step.table import StepTable


def solver_step(
    pool: Tensor,
    outs: Sequence[Tensor],
    table: StepTable,
    rows: Tensor,
    index: Tensor,
    *,
    net: Tensor | None = None,
    tensors: Sequence[Tensor] = (),
    seeds: Tensor | None = None,
    pictures: Tensor | None = None,
) -> None:
    """y_k = clamp(sum_j coef[k][j] * source_j * scale_j + sum_{l<k} prev[k][l] * y_l, low_k, high_k), in order."""

    def read(code: int, b: int, lane: int) -> Tensor:
        if code < t.OUT:
            return pool[code, lane]
        if code < t.ONE:
            return outs[code - t.OUT][b].to(pool.dtype)
        if code == t.ONE:
            return torch.ones_like(pool[0, lane])
        if code < t.NOISE:
            return tensors[code - t.TENSOR]
        assert seeds is not None and pictures is not None
        noise = normals(pool.shape[2:], int(seeds[b]), picture=int(pictures[b]), draw=code - t.NOISE)
        return torch.from_numpy(noise).to(pool.device, pool.dtype)

    for b, (r, lane) in enumerate(zip(rows.tolist(), index.tolist(), strict=True)):
        ints, floats = table.ints[r].tolist(), table.floats[r].tolist()
        n, m = ints[:2]
        coef = [floats[t.COEF_AT + k * t.SOURCES :][:n] for k in range(m)]
        prev = [floats[t.PREV_AT + k * t.OUTPUTS :][:k] for k in range(m)]
        values: list[Tensor | None] = [None] * n  # None: not read
        for j in range(n):
            if any(coef[k][j] != 0.0 for k in range(m)):
                scale = ints[t.SCALE_AT + j]
                value = read(ints[t.SOURCE_AT + j], b, lane)
                values[j] = value if scale == t.NONE else value * read(scale, b, lane)
        results: list[Tensor] = []
        for k in range(m):
            total = _sum(list(zip(coef[k], values, strict=True)) + list(zip(prev[k], results, strict=True)))
            y = torch.zeros_like(pool[0, lane]) if total is None else total
            y = torch.where(y < floats[t.LOW_AT + k], floats[t.LOW_AT + k], y)  # false for NaN, which passes
            results.append(torch.where(y > floats[t.HIGH_AT + k], floats[t.HIGH_AT + k], y))
        for destination, y in zip(ints[t.DESTINATION_AT :], results, strict=False):
            if destination == t.NET:
                assert net is not None
                net[lane] = y.to(net.dtype)
            else:
                pool[destination, lane] = y


def _sum(terms: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    """Sum of number * tensor, left to right, each product and each sum rounded; terms with number 0 are left out."""
    total: Tensor | None = None
    for number, tensor in terms:
        if number != 0.0 and tensor is not None:
            term = tensor * number
            total = term if total is None else total + term
    return total
