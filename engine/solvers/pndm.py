"""PNDM and iPNDM: Adams-Bashforth weights of equal steps, times the DDIM step.

  x' = (alpha'/alpha) x + alpha' (rho' - rho) e,   e = sum_j w_j eps_{i-j}
  w = (1), (3, -1)/2, (23, -16, 5)/12, (55, -59, 37, -9)/24
The weights are those of steps equal in rho: on other grids the methods are of second order.
Source: Liu, Ren, Lin and Zhao 2022 (PNDM), eq. 9 to 13; Zhang and Chen 2022, appendix (iPNDM).
"""

from __future__ import annotations

from collections.abc import Sequence

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.ddim import ends_of
from vivace.engine.solvers.rows import (
    Level,
    Update,
    assemble,
    first_order_eps,
    first_update,
    levels_of,
    planned_ages,
    require_flag,
    require_order,
    usable_order,
)
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError

ADAMS = {
    1: (1.0,),
    2: (3.0 / 2.0, -1.0 / 2.0),
    3: (23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0),
    4: (55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0),
}
WARM_UP = 3


def ipndm(
    grid: Grid, prediction: str, *, order: int = 4, history: str = "own", cached: Sequence[int] = ()
) -> tuple[Step, ...]:
    """Rows of iPNDM: orders 1, 2, .. up to `order` (1..4), no other warm-up; order 1 to sigma = 0.

    history, cached: see `rows.planned_ages`; "computed" is refused, since the weights are those of equal steps.
    """
    require_order("ipndm", order, 4)
    if history == "computed":
        raise ArgumentError("ipndm: history 'computed' leaves gaps, and its weights presume equal steps; use deis")
    ages = planned_ages("ipndm", grid.steps, [order] * grid.steps, history, cached)
    return ipndm_rows(grid, prediction, [len(read) for read in ages])


def ipndm_rows(
    grid: Grid, prediction: str, orders: Sequence[int], transform: Transform | None = None, *, to_zero: bool = False
) -> tuple[Step, ...]:
    """Rows with the number of values asked of each; to_zero: not lowered in a step to sigma = 0."""
    updates = []
    for row, end in enumerate(ends_of(grid)):
        order = usable_order(grid, row, orders[row], to_zero=to_zero)
        updates.append(_adams(grid.level(row), end, ADAMS[order]))
    return assemble(grid, prediction, updates, transform, form="eps")


def pndm(grid: Grid, prediction: str, *, skip_prk: bool = False) -> tuple[Step, ...]:
    """Rows of PNDM: three Runge-Kutta steps of four evaluations, then the multistep rows of order 4.

    skip_prk: the first step is Euler's, corrected by a second evaluation at its end; then orders 2, 3, 4. So N + 1
    evaluations, and N + 9 otherwise (fewer at N < 4). A step from alpha = 0 or to sigma = 0 is of order 1.
    """
    skip = require_flag("pndm", "skip_prk", skip_prk)
    points: list[tuple[float, Level]] = []
    updates: list[Update] = []
    slots: list[int] = []
    starts: list[int] = []  # evaluation at the start of every step so far
    for row, (start, end) in enumerate(zip(map(grid.level, range(grid.steps)), ends_of(grid), strict=True)):
        starts.append(len(points))
        points.append((grid.timesteps[row], start))
        slots.append(row % 4)
        if start[0] == 0.0 or end[1] == 0.0:
            updates.append(first_update("eps", start, end))
        elif skip and row == 0:
            points.append((_timestep(grid, 1), end))
            slots.append(4)
            updates += [_adams(start, end, (1.0,), stage=True), _adams(start, end, (0.5, 0.5))]
        elif not skip and row < WARM_UP:
            points += _inner(grid, row)
            slots += [4, 5, 6]
            updates += _runge_kutta(start, points[-2][1], end)
        else:
            updates.append(_adams(start, end, _spread(ADAMS[min(4, row + 1)], starts)))
    return assemble(levels_of(points, grid), prediction, updates, form="eps", slots=slots)


def _adams(start: Level, end: Level, weights: Sequence[float], *, stage: bool = False) -> Update:
    """The DDIM step on a weighted sum of values."""
    if start[0] == 0.0:
        return first_update("eps", start, end)
    keep, weight = first_order_eps(start, end)
    return Update(keep, tuple(weight * w for w in weights), stage=stage)


def _runge_kutta(start: Level, middle: Level, end: Level) -> list[Update]:
    """Four rows: e1 at x; e2, e3 at the middle; e4 at the end; the step on (e1 + 2 e2 + 2 e3 + e4)/6."""
    return [
        _adams(start, middle, (1.0,), stage=True),
        _adams(start, middle, (1.0, 0.0), stage=True),
        _adams(start, end, (1.0, 0.0, 0.0), stage=True),
        _adams(start, end, (1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0)),
    ]


def _inner(grid: Grid, row: int) -> list[tuple[float, Level]]:
    """(timestep, level) of e2, e3 and e4: the middle of the step in t twice, and its end."""
    schedule = grid.known_schedule()
    times = [float(schedule.t_of_lam(grid.lam(index))) for index in (row, row + 1)]
    middle = 0.5 * (times[0] + times[1])
    point = schedule.timestep(middle), (schedule.alpha(middle), schedule.sigma(middle))
    return [point, point, (_timestep(grid, row + 1), grid.level(row + 1))]


def _timestep(grid: Grid, index: int) -> float:
    """Timestep of level `index`, the last one included."""
    if index < grid.steps:
        return grid.timesteps[index]
    return grid.at_lam(grid.lam(index))[0]


def _spread(weights: Sequence[float], starts: Sequence[int]) -> tuple[float, ...]:
    """Weights of the values at the starts of steps, newest first, with zeros for the evaluations between."""
    spread = [0.0] * (starts[-1] - starts[-len(weights)] + 1)
    for weight, index in zip(weights, reversed(starts), strict=False):
        spread[starts[-1] - index] = weight
    return tuple(spread)
