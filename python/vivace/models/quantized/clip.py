"""Where to clip before 8 bits: the largest number, a percentile, or the threshold of least L_p error.

    threshold_i = i / 100 * max |x|,  i = 1 .. 100
    error(i) = sum |x - fake(x, threshold_i / most)|^p,  the least wins, of equals the largest threshold

Source: Shang et al. 2023 (PTQ4DM), section 3.5, and its code: p = 2.4, 100 candidates. p = 2 is the mean squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.errors import ArgumentError
from vivace.models.quantized.formats import fake, most_of, scale_of

CANDIDATES = 100
AT_ONCE = 1 << 22  # elements; temporaries stay small
HOW = "max, percentile:Q (0 < Q <= 100) or lp:P (P >= 1)"


def clip_scale(x: Tensor, how: str, format: str = "int8") -> Tensor:
    """The scale of every row of x [rows, n] by a named rule: float32 [rows].

    how: "max"; "percentile:99.9", of |x|; "lp:2.4". Rows of zeros take 1. Raises ArgumentError.
    """
    name, _, number = how.partition(":")
    try:
        value = float(number) if number else 0.0
    except ValueError:
        value = -1.0
    wide = x.float()
    if how == "max":
        return scale_of(wide.abs().amax(1), format)
    if name == "percentile" and 0.0 < value <= 100.0:
        return scale_of(_percentile(wide.abs(), value), format)
    if name == "lp" and value >= 1.0:
        rows = max(1, AT_ONCE // max(1, x.shape[1]))
        return torch.cat([_least_error(part, value, format) for part in torch.split(wide, rows)])
    raise ArgumentError(f"clip {how!r} is unknown; use {HOW}")


def _percentile(size: Tensor, percent: float) -> Tensor:
    """The smallest number of each row that `percent` of it do not exceed."""
    rank = max(1, -(-round(percent * size.shape[1] * 1e6) // 100_000_000))
    return size.kthvalue(min(rank, size.shape[1]), dim=1).values


def _least_error(x: Tensor, p: float, format: str) -> Tensor:
    """The scale of least L_p error, candidates from the largest threshold down.

    A row is done when clipping alone costs as much as its best: every lower threshold clips more.
    """
    largest, most = x.abs().amax(1), most_of(format)
    best_scale = scale_of(largest, format)
    best = torch.full_like(largest, torch.inf)
    left = torch.arange(len(x), device=x.device)
    for i in range(CANDIDATES, 0, -1):
        scale = scale_of(largest[left] * (i / CANDIDATES), format)
        part = x[left]
        error = _power(part - fake(part, scale[:, None], format), p).sum(1)
        better = error < best[left]
        best_scale[left] = torch.where(better, scale, best_scale[left])
        best[left] = torch.where(better, error, best[left])
        clipped = _power((part.abs() - most * scale[:, None]).clamp_(min=0.0), p).sum(1)
        left = left[clipped < best[left]]
        if not len(left):
            break
    return best_scale


def _power(x: Tensor, p: float) -> Tensor:
    """|x|^p."""
    return x.square() if p == 2.0 else x.abs().pow(p)
