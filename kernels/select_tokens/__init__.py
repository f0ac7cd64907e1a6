"""Which image tokens of a picture a row computes: ranked by a score, old ones first where they must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vivace.kernels.select_tokens.check import check
from vivace.kernels.spec import choose, define, load

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["select_tokens"]


def select_tokens(
    planes: Sequence[Tensor],
    weights: Tensor | None,
    ages: Tensor,
    keep: int,
    *,
    patch: Sequence[int] = (),
    metric: str = "deviation",
    scores: Tensor | None = None,
    drop_high: float = 1.0,
    factors: Tensor | None = None,
    bound: int = -1,
    least: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """ids of the F oldest tokens and of the keep - F others smallest by (|2 r - (2 lo + keep - 1)| factors[age], p).

    r is the rank of token p by (score, p), NaN last. Of the D = N - keep tokens that are dropped, top = floor(drop_high
    D + 0.5) are those of the highest ranks and lo = D - top those of the lowest, as long as no factor says otherwise.
    F = max over d = 1 .. bound + 1 of (number of ages above bound - d) - least (d - 1), 0 at least, keep at most: so
    many have to be computed now that no later row of `least` tokens or more comes too late. Oldest: by age, then by the
    same order as others. Where least (bound + 1) >= N and ages begin at 0, no age ever exceeds the bound.

    Score of a token: the mean over its pixels, in row-major order, of their metric on v_c = sum_j weights[j] plane_j of
    their C channels. "deviation": sqrt(sum_c (v_c - mean)^2 / (C - 1)), |v| where C = 1; "norm": sqrt(sum_c v_c^2).
    Arithmetic is float32, float64 for float64; every product, sum, quotient and root is rounded alone and sums run in
    order, so every backend gives the same ids. Nothing is read on the host.

    Args:
        planes: 1 to 4 tensors [B, C, *spatial] of one dtype, float32 | bfloat16 | float16 (float64 in the reference);
            none where scores are given.
        weights: float32 [B, P], P planes; None where scores are given.
        ages: int32 [B, N], rows since each was computed, 0 or more; written: 0 for those selected, others + 1.
        keep: tokens selected of every picture, 0 .. N.
        patch: edge of a token along every spatial axis; tokens are numbered in row-major order of their grid.
        metric: "deviation" | "norm".
        scores: float32 [B, N] instead of planes.
        drop_high: share of the dropped tokens that is taken from the top of the ranking, 0 .. 1.
        factors: float32 [A], A of 1 or more, 0 or more each, by age, the last for all beyond; None: 1.
        bound: rows a token may go without, up to 4095; -1: any number, and F = 0.
        least: fewest tokens that a later row selects, 0 .. keep; None: keep.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: int32 [B, keep], ascending. No gradients.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Liu et al. 2025 (RAS), section 3.3, for "deviation" and starvation.
    """
    dtype = check(planes, weights, ages, keep, patch, metric, scores, drop_high, factors, bound, least)
    choice = choose(SPEC, ages.device.type, dtype, backend)
    if not ages.numel():
        return ages.new_empty(len(ages), keep)
    result: Tensor = load(SPEC, choice.backend)(
        planes, weights, ages, keep, patch=patch, metric=metric, scores=scores, drop_high=drop_high, factors=factors,
        bound=bound, least=keep if least is None else least,
    )  # fmt: skip
    return result


def lowest(tokens: int, keep: int, drop_high: float) -> int:
    """Tokens dropped from the bottom of the ranking."""
    dropped = tokens - keep
    return dropped - math.floor(drop_high * dropped + 0.5)


SPEC = define("select_tokens")
