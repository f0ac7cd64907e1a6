"""What a row does beyond sums: clamp, dynamic threshold, guidance rescale and low-rank maps, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]


def clamp(x: Array, low: Any, high: Any) -> Array:
    """x limited to [low, high]; NaN passes."""
    limited = np.where(x < low, low, x)
    return np.where(limited > high, high, limited).astype(np.float32)


def dynamic_threshold(x: Array, ratio: float, largest: float) -> Array:
    """clamp(x, -s, s) / s with s = min(max(quantile(|x|, ratio), 1), largest). x: [n, E], each sample by itself."""
    made = []
    for sample in x:
        s = quantile(np.abs(sample), ratio)
        s = s if np.isnan(s) else np.float32(min(max(float(s), 1.0), largest))
        made.append(clamp(sample, -s, s) * (np.float32(1.0) / s))
    return np.stack(made).astype(np.float32)


def cfg_rescale(x: Array, cond: Array, phi: float) -> Array:
    """x * (phi std(cond) / std(x) + 1 - phi). x, cond: [n, E]; deviations are unbiased, in float64."""
    with np.errstate(all="ignore"):
        made = [
            sample * np.float32(phi * (_deviation(other) / _deviation(sample)) + (1.0 - phi))
            for sample, other in zip(x, cond, strict=True)
        ]
    return np.stack(made).astype(np.float32)


def low_rank(x: Array, gains: Array, basis: Array) -> Array:
    """sum_k gains[k] <basis[k], x> basis[k]. x: [n, E]; gains [r]; basis [r, E]; inner products in float64."""
    made = []
    for sample in x:
        products = (basis * sample).sum(axis=1, dtype=np.float64).astype(np.float32)
        total = np.zeros_like(sample)
        for share, row in zip(gains * products, basis, strict=True):
            total += share * row
        made.append(total)
    return np.stack(made)


def quantile(values: Array, ratio: float) -> np.float32:
    """Linear between the neighbours of rank ratio * (n - 1), which is rounded to float32 up to 2^24 elements. NaN
    where one of `values` [n] is."""
    if np.isnan(values).any():
        return np.float32(np.nan)
    wide = np.float32 if values.size <= 1 << 24 else np.float64
    rank = wide(ratio) * wide(values.size - 1)
    lower, upper = int(np.floor(rank)), int(np.ceil(rank))
    ordered = np.partition(values, sorted({lower, upper}))
    a, b, weight = ordered[lower], ordered[upper], np.float32(rank - lower)
    return np.float32(a + weight * (b - a) if weight < 0.5 else b - (b - a) * (np.float32(1.0) - weight))


def adjusted(kind: str, x: Array, reads: Sequence[Array], numbers: Sequence[float], tensors: Sequence[Array]) -> Array:
    """A transform of slot values x [n, E] with what it reads: see `engine.plan.Transform`."""
    if kind == "clamp":
        return clamp(x, *numbers)
    if kind == "dynamic_threshold":
        return dynamic_threshold(x, *numbers)
    if kind == "cfg_rescale":
        return cfg_rescale(x, reads[0], *numbers)
    gains, basis = tensors
    return low_rank(x, gains, basis.reshape(len(gains), -1))


def _deviation(values: Array) -> float:
    return float(values.std(dtype=np.float64, ddof=1)) if values.size > 1 else float("nan")
