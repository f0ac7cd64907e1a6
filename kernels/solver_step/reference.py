"""The definition of `solver_step`: plain torch, the samples of one row together, float32 or float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vivace.engine.noise import normals
from vivace.kernels.solver_step import table as t
from vivace.kernels.solver_step.check import token_axes
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
    adjust: Tensor | None = None,
    classes: Tensor | None = None,
    patch: Sequence[int] = (),
) -> None:
    """y_k = clamp(sum_j coef[k][j] * source_j * scale_j + sum_{l<k} prev[k][l] * y_l, low_k, high_k), in order."""
    for r, samples, here in _by_class(rows, None if classes is None else element_classes(classes, patch, pool.shape)):
        ints, floats = table.ints[r].tolist(), table.floats[r].tolist()
        lanes = index[samples].to(pool.device)

        def limit(
            k: int, y: Tensor, samples: Tensor = samples, ints: list[int] = ints, floats: list[float] = floats
        ) -> Tensor:
            if ints[t.ADJUSTED_AT] >> k & 1:
                assert adjust is not None
                low, high, gain = adjust[samples].view(-1, 3, *[1] * (y.dim() - 1)).unbind(1)
                return clamp(y, low, high) * gain
            return clamp(y, floats[t.LOW_AT + k], floats[t.HIGH_AT + k])

        results = combine(pool, outs, tensors, seeds, pictures, ints, floats, samples, lanes, limit)
        for destination, y in zip(ints[t.DESTINATION_AT :], results, strict=False):
            if destination == t.NET:
                assert net is not None
                net[lanes] = y.to(net.dtype) if here is None else torch.where(here, y.to(net.dtype), net[lanes])
            else:
                pool[destination, lanes] = y if here is None else torch.where(here, y, pool[destination, lanes])


def element_classes(classes: Tensor, patch: Sequence[int], shape: Sequence[int]) -> Tensor:
    """From the class of every token [B, N] to that of every element of a pool: [B, 1, *spatial], or [B, *all axes]."""
    spatial = token_axes(shape, patch)
    first = (1,) * (len(shape) - 2 - len(patch))
    out = classes.reshape(len(classes), *first, *[size // edge for size, edge in zip(spatial, patch, strict=True)])
    for axis, edge in enumerate(patch):
        out = out.repeat_interleave(edge, axis + 1 + len(first))
    return out


def _by_class(rows: Tensor, classes: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(row, samples at it, which of their elements [n, 1, *spatial] or None: all) of every row in use."""
    for row, samples in by_row(rows):
        if classes is None:
            yield row, samples, None
            continue
        mine = classes[samples.to(classes.device)]
        for number in sorted(set(mine.flatten().tolist())):
            yield row + number, samples, mine == number


def by_row(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(row, samples at it int64 [n]) of every row in use."""
    for row in sorted(set(rows.tolist())):
        yield row, (rows == row).nonzero().flatten()


def combine(
    pool: Tensor,
    outs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seeds: Tensor | None,
    pictures: Tensor | None,
    ints: Sequence[int],
    floats: Sequence[float],
    samples: Tensor,
    lanes: Tensor,
    limit: Callable[[int, Tensor], Tensor] = lambda k, y: y,
) -> list[Tensor]:
    """The y_k [n, *L] of one row for n samples, each passed through `limit(k, y)` before the next reads it."""

    def read(code: int) -> Tensor:
        if code < t.OUT:
            return pool[code, lanes]
        if code < t.ONE:
            return outs[code - t.OUT][samples].to(pool.dtype)
        if code == t.ONE:
            return torch.ones_like(pool[0, lanes])
        if code < t.NOISE:
            return tensors[code - t.TENSOR].expand(len(samples), *pool.shape[2:])
        assert seeds is not None and pictures is not None
        draws = [
            torch.from_numpy(normals(pool.shape[2:], int(seeds[b]), picture=int(pictures[b]), draw=code - t.NOISE))
            for b in samples.tolist()
        ]
        return torch.stack(draws).to(pool.device, pool.dtype)

    n, m = ints[:2]
    coef = [floats[t.COEF_AT + k * t.SOURCES :][:n] for k in range(m)]
    prev = [floats[t.PREV_AT + k * t.OUTPUTS :][:k] for k in range(m)]
    values: list[Tensor | None] = [None] * n  # None: not read
    for j in range(n):
        if any(coef[k][j] != 0.0 for k in range(m)):
            scale = ints[t.SCALE_AT + j]
            value = read(ints[t.SOURCE_AT + j])
            values[j] = value if scale == t.NONE else value * read(scale)
    results: list[Tensor] = []
    for k in range(m):
        total = _sum(list(zip(coef[k], values, strict=True)) + list(zip(prev[k], results, strict=True)))
        results.append(limit(k, torch.zeros_like(pool[0, lanes]) if total is None else total))
    return results


def clamp(y: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """y limited to [low, high]; comparisons are false for NaN, which passes."""
    y = torch.where(y < low, low, y)
    return torch.where(y > high, high, y)


def _sum(terms: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    """Sum of number * tensor, left to right, each product and each sum rounded; terms with number 0 are left out."""
    total: Tensor | None = None
    for number, tensor in terms:
        if number != 0.0 and tensor is not None:
            term = tensor * number
            total = term if total is None else total + term
    return total
