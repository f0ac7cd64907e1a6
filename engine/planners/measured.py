"""Planners that follow a calibration table: SmoothCache by error curves, MagCache by ratios of magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vivace.engine.plan import Plan
from vivace.engine.planners.base import (
    STEP,
    Planner,
    Schedule,
    Track,
    ends,
    require_count,
    require_share,
    require_sites,
    required,
    times_of,
)
from vivace.engine.planners.tables import Floats, array, check_table, is_table, listed, measured_of, numbers
from vivace.errors import ArgumentError

INNER = ("attn", "cross_attn", "mlp")
CURVES = "error/"  # + site: [evaluations, lags] relative L1 of what a site gives, NaN where the run has ended
RATIOS = "magnitude_ratio"  # [evaluations]: of the trunk's residual to that of the evaluation before; the first is 1


@dataclass(frozen=True, slots=True)
class SmoothCache(Planner):
    """SmoothCache: a site is given again for as long as its measured error curve permits.

    At evaluation i the largest k <= `most` with E_site(i, k) <= `alpha`: i computes, i + 1 .. i + k are given again,
    i + k + 1 is next. E(i, k) = |F_i - F_{i+k}|_1 / |F_i|_1, averaged over depth and samples; one schedule a site.

    table: a calibration table of kind "cache", or site -> E as [evaluations][lags] numbers (None: no such evaluation).
    alpha: threshold, 0 computes always. most: evaluations in a row that may be given again. first, last: evaluations at
        both ends that compute.
    Source: Liu et al. 2024, arXiv 2411.10510, section 3.
    """

    table: Any
    alpha: float = 0.18
    most: int = 3
    first: int = 1
    last: int = 1

    def schedule(self, plan: Plan) -> Schedule:
        """One track a site of the table."""
        alpha, most = require_share("SmoothCache", "alpha", self.alpha), require_count("SmoothCache", "most", self.most)
        if is_table(self.table):
            check_table("SmoothCache", self.table, plan)
        count = plan.nfe
        first = require_count("SmoothCache", "first", self.first, 1)
        full = required(plan) | ends(count, first, require_count("SmoothCache", "last", self.last))
        tracks = []
        for site, curve in self._curves().items():
            if len(curve) != count or curve.shape[1] < min(most, count - 1):
                raise ArgumentError(
                    f"SmoothCache: errors of {site} have {len(curve)} evaluations and {curve.shape[1]} lags; the plan "
                    f"has {count} evaluations, and most={most} lags are needed"
                )
            tracks.append(Track(site, (0, 0), _permitted(curve, alpha, most, full)))
        return Schedule(tuple(tracks), times_of(plan, STEP))

    def _curves(self) -> dict[str, Floats]:
        if is_table(self.table):
            sites = [site for site in INNER if CURVES + site in self.table.arrays]
            return {site: array("SmoothCache", self.table, CURVES + site) for site in sites or INNER[:1]}
        if not isinstance(self.table, Mapping):
            raise ArgumentError(
                f"SmoothCache: table={self.table!r:.40}; a calibration table, or site -> errors, needed"
            )
        named = require_sites("SmoothCache", list(self.table))
        return {site: numbers("SmoothCache", f"errors of {site}", self.table[site], 2) for site in named}

    def arguments(self) -> dict[str, Any]:
        """The curves as numbers, in place of the table."""
        curves = {site: listed(curve) for site, curve in self._curves().items()}
        return {"table": curves, "alpha": self.alpha, "most": self.most, "first": self.first, "last": self.last}

    def measured(self) -> dict[str, Any] | None:
        """Of the table, None for plain numbers."""
        return measured_of(self.table) if is_table(self.table) else None


def _permitted(curve: Floats, alpha: float, most: int, full: set[int] | frozenset[int]) -> tuple[int | None, ...]:
    """0 where the error since the last computed evaluation stays within alpha."""
    orders: list[int | None] = []
    since, reach = 0, 0
    for i in range(len(curve)):
        since += 1
        if i in full or since > reach:
            within = [k for k in range(1, min(most, curve.shape[1]) + 1) if alpha > 0.0 and curve[i, k - 1] <= alpha]
            since, reach = 0, max(within, default=0)
        orders.append(None if since == 0 else 0)
    return tuple(orders)


@dataclass(frozen=True, slots=True)
class MagCache(Planner):
    """MagCache: the residual of the whole trunk is given again while its magnitude is known to have changed little.

    Since the last computed evaluation P = prod gamma_i, E += |1 - P|; an evaluation is given again while E <=
    `threshold` and at most `most` times in a row, not in the first `keep` of the run. gamma_i = mean over tokens of
    |r_i| / |r_{i-1}|. All of it is known beforehand, so the decisions are rows of the plan.

    table: a calibration table of kind "cache", or the ratios, one an evaluation. threshold: 0 computes always.
    keep: share of the run at the noise end that computes. last: evaluations at the clean end that compute.
    Source: Ma et al. 2025, arXiv 2506.09045, eq. 6 to 8 and algorithm 1.
    """

    table: Any
    threshold: float = 0.12
    most: int = 3
    keep: float = 0.2
    last: int = 0

    def schedule(self, plan: Plan) -> Schedule:
        """One track: the residual of all blocks."""
        threshold = require_share("MagCache", "threshold", self.threshold)
        most, keep = require_count("MagCache", "most", self.most), require_share("MagCache", "keep", self.keep, 1.0)
        if is_table(self.table):
            check_table("MagCache", self.table, plan)
        ratios, count = self._ratios(), plan.nfe
        if len(ratios) != count or not (ratios > 0.0).all():
            raise ArgumentError(f"MagCache: {len(ratios)} ratios; one positive ratio for each of {count} is needed")
        full = required(plan) | ends(count, int(keep * count), require_count("MagCache", "last", self.last))
        orders: list[int | None] = []
        product, error, row = 1.0, 0.0, 0
        for i, ratio in enumerate(ratios):
            product *= float(ratio)
            error += abs(1.0 - product)
            row += 1
            if i in full or not threshold or error > threshold or row > most:
                product, error, row = 1.0, 0.0, 0
            orders.append(0 if row else None)
        return Schedule((Track("residual", (0, 0), tuple(orders)),), times_of(plan, STEP))

    def _ratios(self) -> Floats:
        if is_table(self.table):
            return array("MagCache", self.table, RATIOS)
        return numbers("MagCache", "ratios", self.table, 1)

    def arguments(self) -> dict[str, Any]:
        """The ratios as numbers, in place of the table."""
        numbers_of = {"table": listed(self._ratios()), "threshold": self.threshold, "most": self.most}
        return {**numbers_of, "keep": self.keep, "last": self.last}

    def measured(self) -> dict[str, Any] | None:
        """Of the table, None for plain numbers."""
        return measured_of(self.table) if is_table(self.table) else None
