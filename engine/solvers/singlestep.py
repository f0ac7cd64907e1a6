"""Singlestep DPM-Solver and DPM-Solver++: one to three evaluations inside a step, none of the step before.

With H, S, a as in `dpmpp`, r = (lam_stage - lam)/(lam' - lam), m the value at the start of the step:
  order 2  u = first order to r1;  x' = a x - S (expm1(H) m + c1 (m1 - m)/r1),  c1 = expm1(H)/2 ("midpoint") or psi_1(H)
  order 3  u1 = first order to r1; u2 = order 2 to r2;  x' = a x - S (expm1(H) m + psi_1(H) (m2 - m)/r2) ("midpoint"),
           or with both differences and psi_2(H) ("heun", exact for a quadratic prediction)
Source: Lu et al. 2022 (DPM-Solver), algorithms 1 and 2; Lu et al. 2022 (DPM-Solver++), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.ddim import ends_of
from vivace.engine.solvers.dpmpp import VARIANTS, dpmpp_rows
from vivace.engine.solvers.quadrature import psi
from vivace.engine.solvers.rows import (
    Level,
    Update,
    assemble,
    falling_orders,
    first_update,
    levels_of,
    planned_ages,
    require_flag,
    require_number,
    require_order,
)
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

KINDS = ("multistep", "singlestep")


def dpmpp_2s(grid: Grid, prediction: str, *, r1: float = 0.5, variant: str = "midpoint") -> tuple[Step, ...]:
    """Rows of DPM-Solver++ 2S: two evaluations a step, one in a step from alpha = 0 or to sigma = 0.

    r1: place of the inner evaluation in lam, in (0, 1]; variant: "midpoint" or "heun".
    """
    return _on_grid("dpmpp_2s", grid, prediction, 2, variant, (_place("dpmpp_2s", r1),), "x0")


def dpm_solver(
    grid: Grid,
    prediction: str,
    *,
    order: int = 2,
    variant: str = "multistep",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of DPM-Solver, eps form.

    Args:
        order: 1..3. variant: "multistep", one evaluation a step, or "singlestep", `order` evaluations a step (one in a
            step from alpha = 0 or to sigma = 0).
        solver_type: "midpoint" or "heun" (exact for an eps linear in lam); third-order multistep rows are exact for a
            quadratic eps with either.
        lower_order_final: of multistep: order <= rows left, at any number of steps.
        history, cached: of multistep: what rows that did not compute everything mean to later ones, see
            `rows.planned_ages`.
    """
    require_order("dpm_solver", order, 3)
    choose("dpm_solver: variant", variant, KINDS)
    choose("dpm_solver: solver_type", solver_type, VARIANTS)
    orders = falling_orders(grid.steps, order, require_flag("dpm_solver", "lower_order_final", lower_order_final))
    ages = planned_ages("dpm_solver", grid.steps, orders, history, cached)
    if variant == "multistep":
        return dpmpp_rows(grid, prediction, orders, solver_type, form="eps", third="third_order", ages=ages)
    if history != "own":
        raise ArgumentError(
            f"dpm_solver: history {history!r} is of variant 'multistep'; singlestep reads no step before"
        )
    places = {1: (), 2: (0.5,), 3: (1.0 / 3.0, 2.0 / 3.0)}[order]
    return _on_grid("dpm_solver", grid, prediction, order, solver_type, places, "eps")


def _place(solver: str, r1: float) -> float:
    if require_number(solver, "r1", r1, 0.0, 1.0) == 0.0:
        raise ArgumentError(f"{solver}: r1 must be above 0, got {r1!r}")
    return float(r1)


def _on_grid(
    solver: str, grid: Grid, prediction: str, order: int, variant: str, places: tuple[float, ...], form: str
) -> tuple[Step, ...]:
    """Rows on a grid of steps: inner evaluations at these shares of every step, in lam."""
    choose(f"{solver}: variant", variant, VARIANTS)
    points: list[tuple[float, Level]] = []
    groups = []
    for row, (start, end) in enumerate(zip(map(grid.level, range(grid.steps)), ends_of(grid), strict=True)):
        points.append((grid.timesteps[row], start))
        if start[0] == 0.0 or end[1] == 0.0:
            groups.append(1)
            continue
        lam, h = grid.lam(row), grid.lam(row + 1) - grid.lam(row)
        points += [grid.at_lam(lam + place * h) for place in places]
        groups.append(order)
    return singlestep_rows(levels_of(points, grid), prediction, groups, variant, form=form)


def singlestep_rows(
    grid: Grid,
    prediction: str,
    groups: Sequence[int],
    variant: str,
    transform: Transform | None = None,
    *,
    form: str = "x0",
    inner: str = "heun",
) -> tuple[Step, ...]:
    """Rows on a grid of evaluations, `groups` of 1 to 3 of which make one step each.

    A group of size p that starts at row i ends at level i + p; its inner evaluations are at the levels between.
    Args:
        variant: "midpoint" or "heun", of the step's last row; inner: the same of the second inner stage of order 3.
    """
    if sum(groups) != grid.steps or any(size not in (1, 2, 3) for size in groups):
        raise ArgumentError(f"singlestep: groups {tuple(groups)} must be 1 to 3 and add up to {grid.steps} evaluations")
    updates: list[Update] = []
    row = 0
    for size in groups:
        for stage in range(1, size + 1):
            rule = variant if stage == size else inner
            updates.append(stage_update(grid, row, stage, rule, form, last=stage == size))
        row += size
    return assemble(grid, prediction, updates, transform, form=form)


def stage_update(grid: Grid, row: int, stage: int, variant: str, form: str, *, last: bool) -> Update:
    """From the start of the step at `row` to the level after `stage` evaluations; last: it ends the step."""
    start, end = grid.level(row), grid.level(row + stage)
    first = first_update(form, start, end)
    if stage == 1:
        return Update(first.keep, first.weights, x0=first.x0, stage=not last)
    h = grid.lam(row + stage) - grid.lam(row)
    exponent, unit = (-h, -end[0]) if form == "x0" else (h, -end[1])
    shares = [(grid.lam(row + k) - grid.lam(row)) / h for k in range(1, stage)]
    slope, weight = unit * psi(1, exponent), first.weights[0]
    if stage == 2:
        rise = (weight / 2.0 if variant == "midpoint" else slope) / shares[0]
        return Update(first.keep, (rise, _rest(weight, rise)), stage=not last)
    if variant == "midpoint":
        rise = slope / shares[1]
        return Update(first.keep, (rise, 0.0, _rest(weight, rise)), stage=not last)
    # m ~ m0 + D1 r + D2 r^2 / 2 through both inner values.
    r1, r2 = shares
    bend = 2.0 * unit * psi(2, exponent)
    inner = (slope * r2 - bend) / (r1 * (r2 - r1))
    outer = (bend - slope * r1) / (r2 * (r2 - r1))
    return Update(first.keep, (outer, inner, weight - outer - inner), stage=not last)


def _rest(weight: float, used: float) -> float:
    """weight - used, 0 where that is rounding: with r1 = 1/2 only the inner value enters."""
    return 0.0 if math.isclose(weight, used, rel_tol=1e-13) else weight - used
