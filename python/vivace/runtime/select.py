"""Which image tokens of a picture a row computes: the ids that every kernel of the engine gives, in numpy.

Arithmetic is float32; every product, sum, quotient and root is rounded alone and sums run in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.integer[Any]]


def select_tokens(
    scores: Array,
    ages: Ints,
    keep: int,
    *,
    drop_high: float = 1.0,
    factors: Array | None = None,
    bound: int = -1,
    least: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """ids of the F oldest tokens and of the keep - F others smallest by (|2 r - (2 lo + keep - 1)| factors[age], p).

    r is the rank of token p by (score, p), NaN last; lo of the tokens left out have the lowest ranks; F is as many as
    must be computed now so that none waits for more than `bound` rows of `least` tokens.

    Args:
        scores: float32 [n, N]; ages: int32 [n, N], rows since each was computed; factors: float32 by age, the last for
            all beyond; bound: -1 for any number; least: None for keep.
    Returns: ids int64 [n, keep], ascending, and ages behind the row, int32 [n, N].
    Source: `vivace.kernels.select_tokens`.
    """
    tokens = ages.shape[1]
    dropped = tokens - keep
    lowest = dropped - math.floor(drop_high * dropped + 0.5)
    effective = np.abs(2 * ranks(scores) - (2 * lowest + keep - 1)).astype(np.float32)
    if factors is not None:
        effective = effective * factors[np.clip(ages, 0, len(factors) - 1)]
    place = ranks(effective)  # 0 is computed first
    forced = ranks(place - ages.astype(np.int64) * tokens) < _must(ages, keep, bound, keep if least is None else least)
    chosen = ranks(np.where(forced, -1, place)) < keep
    ids = np.stack([np.flatnonzero(row) for row in chosen])
    return ids.astype(np.int64), np.where(chosen, 0, ages + 1).astype(np.int32)


def ranks(keys: NDArray[Any]) -> NDArray[np.int64]:
    """Rank of every column of keys [n, N] in its row, by (key, column), NaN last."""
    order = np.argsort(keys, axis=1, kind="stable")
    found = np.empty(keys.shape, np.int64)
    np.put_along_axis(found, order, np.broadcast_to(np.arange(keys.shape[1]), keys.shape), axis=1)
    return found


def scores_of(planes: Sequence[Array], weights: Sequence[float], patch: Sequence[int], metric: str) -> Array:
    """[n, N]: the mean over a token's pixels of the metric of sum_j weights[j] planes[j].

    planes: [n, C, *spatial] each; patch: edges of a token by spatial axis; metric: "deviation" | "norm" over channels.
    """
    mixed = _in_order([np.float32(w) * plane.astype(np.float32) for w, plane in zip(weights, planes, strict=True)])
    pixels = _metric(mixed, metric)
    n, rank = len(pixels), len(patch)
    parts = [part for size, edge in zip(pixels.shape[1:], patch, strict=True) for part in (size // edge, edge)]
    split = pixels.reshape(n, *parts).transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))
    edge = math.prod(patch)
    in_tokens = split.reshape(n, -1, edge)
    return _in_order([in_tokens[:, :, k] for k in range(edge)]) / np.float32(edge)


def _must(ages: Ints, keep: int, bound: int, least: int) -> NDArray[np.int64]:
    """F of every picture [n, 1]."""
    due = [(ages > bound - d).sum(axis=1, keepdims=True) - least * (d - 1) for d in range(1, bound + 2)]
    none = np.zeros((len(ages), 1), np.int64)
    found: NDArray[np.int64] = np.minimum(np.max([none, *due], axis=0), keep)
    return found


def _metric(v: Array, metric: str) -> Array:
    """[n, C, *spatial] -> [n, *spatial]."""
    channels = [v[:, c] for c in range(v.shape[1])]
    if metric == "norm":
        size: Array = np.sqrt(_in_order([c * c for c in channels]))
        return size
    if len(channels) == 1:
        return np.abs(channels[0])
    mean = _in_order(channels) / np.float32(len(channels))
    parts = [c - mean for c in channels]
    squares = _in_order([part * part for part in parts])
    deviation: Array = np.sqrt(squares / np.float32(len(channels) - 1))
    return deviation


def _in_order(terms: Sequence[Array]) -> Array:
    """Their sum, from the first to the last."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
