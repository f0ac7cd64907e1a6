"""Euler and Heun steps of dy/d rho = eps, y = x/alpha, rho = sigma/alpha, with the churn of EDM; Heun on a flow.

Euler  y1 = y + (rho' - rho) eps                Heun  y' = y + (rho' - rho) (eps + eps(y1, rho')) / 2
churn  before a step rho is raised to (1 + gamma) rho by fresh noise of variance (s_noise^2) (rho_hat^2 - rho^2)
Source: Karras, Aittala, Aila and Laine 2022, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.ddim import ends_of
from vivace.engine.solvers.flow_euler import require_flow
from vivace.engine.solvers.rows import (
    Level,
    Update,
    affine,
    assemble,
    first_order_eps,
    first_update,
    levels_of,
    require_number,
)
from vivace.engine.timesteps import Grid

LARGEST_CHURN = math.sqrt(2.0) - 1.0


def euler(
    grid: Grid,
    prediction: str,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
) -> tuple[Step, ...]:
    """Rows of Euler in rho: DDIM, with churn where s_churn > 0.

    Args:
        s_churn: gamma = min(s_churn / N, sqrt(2) - 1) in rows with s_tmin <= rho <= s_tmax (None: no limit).
        s_noise: factor on the churned noise.
    """
    gammas = churn_of("euler", grid, s_churn, s_tmin, s_tmax)
    return churned_rows(grid, prediction, gammas, [False] * grid.steps, require_number("euler", "s_noise", s_noise))


def heun(
    grid: Grid,
    prediction: str,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
) -> tuple[Step, ...]:
    """Rows of Heun's second order method: two evaluations a step, the last step Euler, so 2 N - 1 evaluations.

    A step from alpha = 0 is Euler's. s_churn, s_tmin, s_tmax, s_noise: as in `euler`.
    """
    gammas = churn_of("heun", grid, s_churn, s_tmin, s_tmax)
    corrected = [row + 1 < grid.steps for row in range(grid.steps)]
    return churned_rows(grid, prediction, gammas, corrected, require_number("heun", "s_noise", s_noise))


def churn_of(solver: str, grid: Grid, s_churn: float, s_tmin: float, s_tmax: float | None) -> list[float]:
    """gamma of every row from validated options."""
    most = min(require_number(solver, "s_churn", s_churn) / grid.steps, LARGEST_CHURN)
    low = require_number(solver, "s_tmin", s_tmin)
    high = math.inf if s_tmax is None else require_number(solver, "s_tmax", s_tmax)
    inside = [alpha > 0.0 and low <= sigma / alpha <= high for alpha, sigma in map(grid.level, range(grid.steps))]
    return [most if within else 0.0 for within in inside]


def churned_rows(
    grid: Grid,
    prediction: str,
    gammas: Sequence[float],
    corrected: Sequence[bool],
    s_noise: float = 1.0,
    transform: Transform | None = None,
) -> tuple[Step, ...]:
    """Rows with the churn of every step and whether it has a second, correcting evaluation at its end.

    The churn of a step is part of the row before it; before the first step it is a row without evaluation.
    """
    form = "eps" if any(corrected) else "x0"
    levels, updates = churned_updates(grid, gammas, corrected, s_noise)
    if not gammas[0]:
        return assemble(levels, prediction, updates, transform, form=form)
    steps = assemble(levels, prediction, updates, transform, form=form, first_draw=2)
    churn = _churned(Update(1.0, ()), grid.level(0), levels.level(0), s_noise)
    first = affine("x", ("x", churn.keep), ("noise:1", churn.noise))
    alone = Step(grid.timesteps[0], *grid.level(0), (first,), variant=None)
    return (alone, replace(steps[0], restart=True), *steps[1:])


def churned_updates(
    grid: Grid, gammas: Sequence[float], corrected: Sequence[bool], s_noise: float = 1.0
) -> tuple[Grid, list[Update]]:
    """The levels of the evaluations of `churned_rows`, and their coefficients."""
    form = "eps" if any(corrected) else "x0"
    starts = [_raised(grid, row, gamma) for row, gamma in enumerate(gammas)]
    points: list[tuple[float, Level]] = []
    updates: list[Update] = []
    for row, end in enumerate(ends_of(grid)):
        start = starts[row][1]
        points.append(starts[row])
        if corrected[row] and start[0] and end[1]:
            keep, weight = first_order_eps(start, end)
            points.append((grid.timesteps[row + 1], end))
            updates.append(Update(keep, (weight,), stage=True))
            updates.append(Update(keep, (weight / 2.0, weight / 2.0)))
        else:
            updates.append(first_update(form, start, end))
        if row + 1 < grid.steps and gammas[row + 1]:
            updates[-1] = _churned(updates[-1], end, starts[row + 1][1], s_noise)
    return levels_of(points, grid), updates


def _raised(grid: Grid, row: int, gamma: float) -> tuple[float, Level]:
    """(timestep, level) at which row `row` evaluates: rho raised to (1 + gamma) rho."""
    if gamma == 0.0:
        return grid.timesteps[row], grid.level(row)
    return grid.at_lam(grid.lam(row) - math.log1p(gamma))


def _churned(update: Update, level: Level, raised: Level, s_noise: float) -> Update:
    """The update followed by the step from `level` up to `raised`."""
    factor = raised[0] / level[0]
    variance = raised[1] ** 2 - (factor * level[1]) ** 2
    return replace(
        update,
        keep=factor * update.keep,
        weights=tuple(factor * weight for weight in update.weights),
        x0=factor * update.x0,
        noise=s_noise * math.sqrt(max(variance, 0.0)),
    )


def flow_heun(grid: Grid, prediction: str) -> tuple[Step, ...]:
    """Rows of Heun on a flow: x' = x + (t' - t) (v + v(x1, t')) / 2, x1 = x + (t' - t) v; the last step Euler.

    2 N - 1 evaluations. Raises: ArgumentError on levels that are not a flow's; PlanError for "eps" at pure noise.
    Source: Liu, Gong and Liu 2022, eq. 2 by Heun's method.
    """
    require_flow("flow_heun", grid)
    points: list[tuple[float, Level]] = []
    updates: list[Update] = []
    for row, end in enumerate(ends_of(grid)):
        change = end[1] - grid.sigmas[row]
        last = row + 1 == grid.steps
        points.append((grid.timesteps[row], grid.level(row)))
        updates.append(Update(1.0, (change,), stage=not last))
        if not last:
            points.append((grid.timesteps[row + 1], end))
            updates.append(Update(1.0, (change / 2.0, change / 2.0)))
    return assemble(levels_of(points, grid), prediction, updates, form="flow")
