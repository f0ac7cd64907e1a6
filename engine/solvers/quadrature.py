"""One rule that yields most multistep solvers: history interpolated by a polynomial, integrated exactly.

With lam = log(alpha/sigma), rho = e^-lam, kappa = e^lam, and L_j the Lagrange basis in u over u_i, u_{i-1}, ...
  eps form:  x' = (alpha'/alpha) x + sum_j b_j eps_{i-j},   b_j = alpha' int L_j(u) d rho
  x0 form:   x' = (sigma'/sigma) x + sum_j b_j x0_{i-j},    b_j = sigma' int L_j(u) d kappa
eps in u = t: DEIS tAB; in u = rho: Adams-Bashforth (rhoAB, LMS); in u = lam: DPM-Solver multistep. x0 in u = lam:
DPM-Solver++ 2M (Taylor) and the true third order. The integrals are Gauss-Legendre sums in lam, in rho where that
makes them exact.
Source: Zhang and Chen 2022 (DEIS), eq. 14 and 15; Lu et al. 2022 (DPM-Solver++), eq. 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vivace.engine.noise_schedule import FloatArray
from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.rows import (
    Level,
    Update,
    assemble,
    first_order,
    first_order_eps,
    first_update,
    spread,
    usable_ages,
)
from vivace.engine.timesteps import Grid, choose

VARIABLES = ("lam", "rho", "t")
PANEL = 3.0  # length of a panel in lam
NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)  # of a panel

TimeOf = Callable[[FloatArray], FloatArray]


def lagrange_weights(
    form: str,
    variable: str,
    levels: Sequence[Level],
    end: Level,
    time_of: TimeOf | None = None,
    kinks: FloatArray | None = None,
    start: Level | None = None,
) -> tuple[float, tuple[float, ...]]:
    """(a, (b_0, b_1, ...)) of the row from levels[0] to `end` with values at `levels`, newest first.

    A step from alpha = 0, or in x0 form or with u other than rho to sigma = 0, has the first-order row only: one level.
    Args:
        form: "eps" or "x0"; variable: u, "lam", "rho" or "t".
        time_of: t of lam [n], for "t"; kinks: lam where it is not smooth.
        start: where the row starts when that is not levels[0]: a corrector's newest value is at `end`.
    """
    start = levels[0] if start is None else start
    first = first_order if form == "x0" else first_order_eps
    keep, whole = first(start, end)
    if len(levels) == 1:
        return keep, (whole,)
    lams = np.array([math.log(alpha / sigma) for alpha, sigma in levels])
    if form == "eps" and variable == "rho":
        nodes = np.exp(-lams)
        points, masses = _panels(0.0, 1.0)
        begin = nodes[0] if start == levels[0] else start[1] / start[0]
        change = end[1] / end[0] - begin
        points, masses = begin + change * points, end[0] * change * masses
    else:
        stop = math.log(end[0] / end[1])
        lam, masses = _panels(math.log(start[0] / start[1]), stop, kinks)
        masses = end[0] * np.exp(lam - stop) * masses if form == "x0" else -end[1] * np.exp(stop - lam) * masses
        nodes, points = (_in_variable(variable, values, time_of) for values in (lams, lam))
    older = [float(masses @ _basis(nodes, j, points)) for j in range(1, len(nodes))]
    return keep, (whole - math.fsum(older), *older)


def lagrange_rows(
    grid: Grid,
    prediction: str,
    orders: Sequence[int],
    *,
    form: str,
    variable: str,
    transform: Transform | None = None,
    to_zero: bool = False,
    ages: Sequence[Sequence[int]] | None = None,
) -> tuple[Step, ...]:
    """Rows with the number of values asked of each; lowered where history is missing and to 1 at sigma = 0.

    to_zero: keep the order in a step to sigma = 0, which is finite in eps form and rho only.
    ages: of every row the rows that it reads, see `rows.planned_ages`, in place of `orders`.
    """
    updates = lagrange_updates(grid, [range(n) for n in orders] if ages is None else ages, form, variable, to_zero)
    return assemble(grid, prediction, updates, transform, form=form)


def lagrange_updates(
    grid: Grid, ages: Sequence[Sequence[int]], form: str, variable: str, to_zero: bool = False
) -> list[Update]:
    """The coefficients of `lagrange_rows`."""
    choose("form", form, ("x0", "eps"))
    choose("variable", variable, VARIABLES)
    time_of, kinks = time_of_lam(grid) if variable == "t" else (None, None)
    updates = []
    for row in range(grid.steps):
        read = usable_ages(grid, row, ages[row], to_zero=to_zero and (form, variable) == ("eps", "rho"))
        if len(read) == 1:
            updates.append(first_update(form, grid.level(row), grid.level(row + 1)))
            continue
        levels = [grid.level(row - age) for age in read]
        keep, weights = lagrange_weights(form, variable, levels, grid.level(row + 1), time_of, kinks)
        updates.append(Update(keep, spread(read, weights)))
    return updates


def psi(k: int, x: float) -> float:
    """psi_k(x) = sum_{j >= 1} x^j / (j + k)!: psi_1 = (e^x - 1)/x - 1, psi_{k+1} = psi_k / x - 1/(k+1)!."""
    if abs(x) < 1.0:
        return math.fsum(x**j / math.factorial(j + k) for j in range(1, 22))
    value = math.expm1(x) / x - 1.0
    for j in range(1, k):
        value = value / x - 1.0 / math.factorial(j + 1)
    return value


def _basis(nodes: FloatArray, j: int, points: FloatArray) -> FloatArray:
    """L_j at `points`."""
    value = np.ones_like(points)
    for k, node in enumerate(nodes):
        if k != j:
            value *= (points - node) / (nodes[j] - node)
    return value


def _in_variable(variable: str, lam: FloatArray, time_of: TimeOf | None) -> FloatArray:
    """u of lam."""
    if variable == "t":
        assert time_of is not None
        return time_of(lam)
    return lam if variable == "lam" else np.exp(-lam)


def time_of_lam(grid: Grid) -> tuple[TimeOf, FloatArray | None]:
    """t of lam, and the kinks of VP's: t is piecewise smooth between training timesteps."""
    schedule = grid.known_schedule()
    if schedule.kind != "vp":
        return schedule.t_of_lam, None
    return schedule.t_of_lam, schedule.lam(np.arange(len(schedule.log_alphas), dtype=np.float64))


def _panels(start: float, stop: float, kinks: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Gauss-Legendre points and weights of int_start^stop, on panels of at most `PANEL` without kinks inside."""
    edges = np.linspace(start, stop, max(1, math.ceil(abs(stop - start) / PANEL)) + 1)
    if kinks is not None:
        inside = kinks[(kinks > start) & (kinks < stop)]
        edges = np.unique(np.concatenate((edges, inside)))
    half = 0.5 * np.diff(edges)[:, None]
    return (edges[:-1, None] + half * (NODES + 1.0)).ravel(), (half * WEIGHTS).ravel()
