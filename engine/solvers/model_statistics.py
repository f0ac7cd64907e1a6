"""Empirical model statistics l, s, b of DPM-Solver-v3, and the integrals over a step that they decide.

With f = (sigma eps - l x) / alpha, elementwise, the probability-flow ODE is d(e^L x / alpha)/d lam = -e^L f, L' = l;
s, b are the elementwise best f' = s f + b. So g = e^-S f - int e^-S b, S' = s, is nearly constant in lam; it is what a
solver extrapolates. l, s, b are linear in lam between the nodes of a table and constant beyond its ends. Integrals are
Gauss-Legendre sums on panels between nodes. What differs from l = 1, s = b = 0 (DPM-Solver++) is summed apart, so these
values give exactly its coefficients.
Source: Zheng et al. 2023 (DPM-Solver-v3), eq. 5 to 11.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.engine.solvers.quadrature import psi
from vivace.errors import ModelError

Array = NDArray[np.float64]
POINTS, MASSES = np.polynomial.legendre.leggauss(6)  # of a panel
PANEL = 0.25  # longest in lam
# INNER[q, r]: integral from -1 to POINTS[q] of the Lagrange polynomial that is 1 at POINTS[r].
_POWERS = np.arange(len(POINTS))
INNER = ((POINTS[:, None] ** (_POWERS + 1) - (-1.0) ** (_POWERS + 1)) / (_POWERS + 1)) @ np.linalg.inv(
    POINTS[:, None] ** _POWERS
)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Tables over lam. lam: [N] increasing; lean = l - 1, s, b: [N, *shape] float64, shape () for plain numbers.

    dtype: of coefficients made from them.
    """

    lam: Array
    lean: Array
    s: Array
    b: Array
    dtype: str = "float64"
    integrals: dict[str, Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        steps = np.diff(self.lam).reshape(-1, *(1,) * (self.s.ndim - 1))
        made = {}
        for name in ("lean", "s"):
            values = getattr(self, name)
            sums = np.cumsum(0.5 * steps * (values[1:] + values[:-1]), axis=0)
            made[name] = np.concatenate((np.zeros_like(values[:1]), sums))
        object.__setattr__(self, "integrals", made)

    @classmethod
    def of_numbers(cls, l: float, s: float, b: float) -> Statistics:  # noqa: E741
        """The same everywhere; l = 1, s = b = 0: DPM-Solver++, l = 0, s = -1, b = 0: DPM-Solver."""
        return cls(np.zeros(1), np.full(1, l - 1.0), np.full(1, s), np.full(1, b))

    @classmethod
    def of_table(cls, what: str, arrays: Any) -> Statistics:
        """Those of a calibration table: "lam" [N], "l", "s", "b" [N, ...]. Raises ModelError, naming `what`."""
        if missing := [name for name in ("lam", "l", "s", "b") if name not in arrays]:
            raise ModelError(f"{what}: the table has no array {missing[0]!r}; calibrate again")
        lam = np.asarray(arrays["lam"], dtype=np.float64)
        l, s, b = (np.asarray(arrays[name], dtype=np.float64) for name in ("l", "s", "b"))  # noqa: E741
        if lam.ndim != 1 or not len(lam) or not l.shape == s.shape == b.shape or l.shape[:1] != lam.shape:
            shapes = ", ".join(f"{name} {np.shape(arrays[name])}" for name in ("lam", "l", "s", "b"))
            raise ModelError(f"{what}: the table's arrays do not fit one another ({shapes}); calibrate again")
        if not all(np.isfinite(values).all() for values in (lam, l, s, b)) or (np.diff(lam) <= 0.0).any():
            raise ModelError(
                f"{what}: the table holds NaN or infinity, or log-SNRs that do not rise; calibrate again, with more "
                "samples"
            )
        dtype = np.asarray(arrays["l"]).dtype.name
        return cls(lam, l - 1.0, s, b, "float32" if dtype == "float16" else dtype)

    @cached_property
    def drifts(self) -> bool:
        """b is not zero everywhere."""
        return bool(self.b.any())

    @cached_property
    def neutral(self) -> bool:
        """l = 1, s = b = 0 everywhere."""
        return not (self.lean.any() or self.s.any() or self.drifts)

    def value(self, name: str, lam: float) -> Array:
        """lean, s or b at lam: [*shape]."""
        values = getattr(self, name)
        at = int(np.searchsorted(self.lam, lam)) - 1
        if at < 0 or at + 1 == len(self.lam):
            return np.asarray(values[max(at, 0)])
        share = (lam - self.lam[at]) / (self.lam[at + 1] - self.lam[at])
        return np.asarray((1.0 - share) * values[at] + share * values[at + 1])

    def integral(self, name: str, lam: float) -> Array:
        """The integral of lean or s from the first node to lam: [*shape]."""
        values = getattr(self, name)
        at = min(max(int(np.searchsorted(self.lam, lam)) - 1, 0), len(self.lam) - 1)
        mean = 0.5 * (values[at] + self.value(name, lam)) if lam > self.lam[0] else values[0]
        return np.asarray(self.integrals[name][at] + (lam - self.lam[at]) * mean)

    def panels(self, start: float, stop: float) -> Iterator[Array]:
        """Gauss-Legendre points of panels from start to stop, which may lie below start, without a node inside."""
        low, high = min(start, stop), max(start, stop)
        inside = self.lam[(self.lam > low) & (self.lam < high)]
        edges = np.concatenate(([low], inside, [high]))
        parts = [np.linspace(a, b, math.ceil((b - a) / PANEL) + 1)[1:] for a, b in zip(edges, edges[1:], strict=False)]
        edges = np.concatenate(([low], *parts))
        edges = edges if start <= stop else edges[::-1]
        for a, b in zip(edges, edges[1:], strict=False):
            yield 0.5 * (a + b) + 0.5 * (b - a) * POINTS


@dataclass(frozen=True, eq=False)
class Weights:
    """x' = keep * x + sum_k of[k] * D_k + bias, D = -f; numbers or [*shape]."""

    keep: Any
    of: list[Any]
    bias: Any


class Interval:
    """The integrals of one step from lam `start` to lam `end`.

    fade: e^(start to end of 1 - l); moments[n]: int e^(lam - end) (e^p - 1) (lam - start)^n d lam with p = (from end to
    lam of l - 1) + (from start to lam of s); drift: int e^(lam - end) e^p B d lam, B = int_start e^-S b.
    """

    def __init__(self, statistics: Statistics, start: float, end: float, count: int) -> None:
        self.statistics, self.start, self.end = statistics, start, end
        zero = np.zeros(statistics.s.shape[1:])
        self.moments = [zero] * count
        self.drift = zero
        self.lean_end, self.s_start = statistics.integral("lean", end), statistics.integral("s", start)
        self.fade = np.exp(statistics.integral("lean", start) - self.lean_end)
        if not statistics.neutral:
            self._sum(count)

    def _sum(self, count: int) -> None:
        sums, drift = self.moments, self.drift
        sofar: Any = 0.0  # B at the panel's start
        for points in self.statistics.panels(self.start, self.end):
            column = (-1, *(1,) * (self.statistics.s.ndim - 1))
            half = (points[-1] - points[0]) / (POINTS[-1] - POINTS[0])
            grown = np.stack([self.statistics.integral("s", point) for point in points]) - self.s_start
            power = np.stack([self.statistics.integral("lean", point) for point in points]) - self.lean_end + grown
            masses = (half * MASSES * np.exp(points - self.end)).reshape(column)
            change = masses * np.expm1(power)
            along = (points - self.start).reshape(column)
            sums = [total + (change * along**n).sum(0) for n, total in zip(range(count), sums, strict=True)]
            if self.statistics.drifts:
                pull = np.stack([self.statistics.value("b", point) for point in points]) * np.exp(-grown)
                inner = sofar + half * np.tensordot(INNER, pull, 1)
                drift = drift + (masses * np.exp(power) * inner).sum(0)
                sofar = sofar + half * np.tensordot(MASSES, pull, 1)
        self.moments, self.drift = sums, drift

    def shift(self, lam: float) -> tuple[Any, Any]:
        """(e^-S, B) at lam, S and B the integrals from the step's start: what turns f into g."""
        own = np.exp(self.s_start - self.statistics.integral("s", lam))
        pulled: Any = np.zeros_like(self.drift)
        if self.statistics.drifts and lam != self.start:
            for points in self.statistics.panels(self.start, lam):
                half = (points[-1] - points[0]) / (POINTS[-1] - POINTS[0])
                for point, mass in zip(points, MASSES, strict=True):
                    decay = np.exp(self.s_start - self.statistics.integral("s", point))
                    pulled = pulled + half * mass * decay * self.statistics.value("b", point)
        return own, pulled

    def weights(self, alpha: float, keep: float, base: Sequence[float], lams: Sequence[float], rule: Array) -> Weights:
        """The update with D at `lams`, the step's start first.

        alpha: at the end; keep, base: the update of l = 1, s = b = 0; rule[n, k]: g is interpolated by
        sum_n (lam - start)^n sum_k rule[n, k] g_k.
        """
        of, bias = [], -alpha * self.drift
        for k, (lam, plain) in enumerate(zip(lams, base, strict=True)):
            moved = sum(float(rule[n, k]) * moment for n, moment in enumerate(self.moments[: len(lams)]))
            weight = plain + alpha * moved
            own, pulled = self.shift(lam)
            of.append(weight * own)
            bias = bias + weight * pulled
        return Weights(keep * self.fade, of, bias)


def interpolation(lams: Sequence[float], pseudo: bool) -> Array:
    """rule[n, k]: sum_n (lam - lams[0])^n sum_k rule[n, k] g_k interpolates g at `lams`, see `Interval.weights`.

    pseudo: the n-th coefficient is the divided difference over the first n + 1 nodes.
    Source: Zheng et al. 2023, section 3.2 and algorithm 4 (pseudo-order).
    """
    nodes = np.asarray(lams) - lams[0]
    count = len(nodes)
    if not pseudo:
        return np.asarray(np.linalg.inv(nodes[:, None] ** np.arange(count)), dtype=np.float64)
    rule = np.zeros((count, count))
    for n in range(count):
        for k in range(n + 1):
            rule[n, k] = 1.0 / math.prod(nodes[k] - nodes[j] for j in range(n + 1) if j != k)
    return rule


def plain_moments(alpha: float, h: float, count: int) -> list[float]:
    """alpha int_0^h e^(u - h) u^n du, n = 0 .. count - 1: alpha h^(n+1) n! phi_(n+1)(-h)."""
    phis = [psi(n + 1, -h) + 1.0 / math.factorial(n + 1) for n in range(count)]
    return [alpha * h ** (n + 1) * math.factorial(n) * phi for n, phi in enumerate(phis)]
