"""Run-time caches: what is measured in a row, and when it lets the row give its blocks' residual again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from vivace.engine.plan import Plan
from vivace.engine.planners.base import Configured, ends, require_count, require_share, required
from vivace.engine.planners.tables import array, check_table, is_table, measured_of, numbers
from vivace.errors import ArgumentError

COEFFICIENTS = "teacache/coefficients"  # [5], highest power first


@dataclass(frozen=True, slots=True)
class Test:
    """What guards of a plan look like: `Guard`'s fields, blocks that may be given again, evaluations that may."""

    metric: str
    rule: str
    threshold: float
    params: tuple[float, ...]
    blocks: tuple[int, int]
    allowed: frozenset[int]


class Guarded(Configured, ABC):
    """A rule by which rows decide at run time."""

    @abstractmethod
    def test(self, plan: Plan) -> Test:
        """What the guards of `plan` look like; a threshold of 0 allows none."""


def _allowed(name: str, plan: Plan, threshold: float, first: int, last: int) -> frozenset[int]:
    """Evaluations that may be given again: none of the required, of the first and the last ones."""
    count = plan.nfe
    kept = required(plan) | ends(count, require_count(name, "first evaluations", first), last)
    return frozenset(set(range(count)) - kept) if threshold > 0.0 else frozenset()


@dataclass(frozen=True, slots=True)
class FirstBlockCache(Guarded):
    """First-Block-Cache: the first block always runs; if its residual changed little, those of the others are kept.

    h = x_1 - x_0; below `threshold`: mean|h - h_ref| / mean|h_ref| with h_ref of the last computed evaluation.

    threshold: relative L1, 0 computes always. warm_up, last: evaluations at both ends that compute.
    most: evaluations in a row that may be given again, 0: no limit.
    Source: ParaAttention (chengzeyi), `first_block_cache`; diffusers, `hooks/first_block_cache.py`.
    """

    threshold: float = 0.08
    warm_up: int = 1
    last: int = 0
    most: int = 0

    def test(self, plan: Plan) -> Test:
        """Blocks [1, L) behind the residual of block 0."""
        threshold = require_share("FirstBlockCache", "threshold", self.threshold)
        most, last = (require_count("FirstBlockCache", n, getattr(self, n)) for n in ("most", "last"))
        allowed = _allowed("FirstBlockCache", plan, threshold, self.warm_up, last)
        return Test("first_block", "below", threshold, (1.0, float(most)), (1, 0), allowed)


@dataclass(frozen=True, slots=True)
class DBCache(Guarded):
    """DBCache: as First-Block-Cache, with `first` probing blocks in front and `last` repairing blocks behind.

    threshold: relative L1 of the residual of the first blocks, 0 computes always. warm_up: evaluations at the noise end
    that compute. most: evaluations in a row that may be given again, 0: no limit.
    Source: cache-dit (vipshop), `DBCacheConfig`.
    """

    first: int = 8
    last: int = 0
    threshold: float = 0.08
    warm_up: int = 8
    most: int = 0

    def test(self, plan: Plan) -> Test:
        """Blocks [first, L - last) behind the residual of the first ones."""
        threshold = require_share("DBCache", "threshold", self.threshold)
        first, last = require_count("DBCache", "first", self.first, 1), require_count("DBCache", "last", self.last)
        params = (float(first), float(require_count("DBCache", "most", self.most)))
        allowed = _allowed("DBCache", plan, threshold, self.warm_up, 0)
        return Test("first_block", "below", threshold, params, (first, -last), allowed)


@dataclass(frozen=True, slots=True)
class TeaCache(Guarded):
    """TeaCache: the change of block 0's modulated input, through a polynomial, adds up until it passes a threshold.

    d_i = mean|m_i - m_{i-1}| / mean|m_{i-1}|, a += p(d_i); a < `threshold`: the residual of all blocks is given again;
    else everything runs and a = 0. The first and the last evaluation always run.

    table: a calibration table of kind "cache", or the coefficients of p, highest power first.
    threshold: on a, 0 computes always. warm_up, last: evaluations at both ends that compute.
    Source: Liu et al. 2024, arXiv 2411.19108, eq. 4 to 7.
    """

    table: Any
    threshold: float = 0.2
    warm_up: int = 1
    last: int = 1

    def test(self, plan: Plan) -> Test:
        """All blocks behind the modulated input of block 0."""
        threshold = require_share("TeaCache", "threshold", self.threshold)
        if is_table(self.table):
            check_table("TeaCache", self.table, plan)
        allowed = _allowed("TeaCache", plan, threshold, self.warm_up, require_count("TeaCache", "last", self.last))
        return Test("modulated_input", "accumulated_below", threshold, self._coefficients(), (0, 0), allowed)

    def _coefficients(self) -> tuple[float, ...]:
        """Of p, highest power first."""
        values = array("TeaCache", self.table, COEFFICIENTS) if is_table(self.table) else None
        values = numbers("TeaCache", "coefficients", self.table, 1) if values is None else values
        if not 1 <= values.size <= 8 or values.ndim != 1:
            raise ArgumentError(f"TeaCache: {values.size} coefficients; 1 to 8 are needed, highest power first")
        return tuple(map(float, values))

    def arguments(self) -> dict[str, Any]:
        """The coefficients as numbers, in place of the table."""
        ends_of = {"threshold": self.threshold, "warm_up": self.warm_up, "last": self.last}
        return {"table": list(self._coefficients()), **ends_of}

    def measured(self) -> dict[str, Any] | None:
        """Of the table, None for plain numbers."""
        return measured_of(self.table) if is_table(self.table) else None
