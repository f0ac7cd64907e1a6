"""Restart sampling as plan data: parts of the trajectory run again from fresh noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes.guidance import apply_guidance, rename
from vivace.engine.plan import Affine, Args, Plan, Recipe, Step
from vivace.engine.solvers import PER_ROW, solver_options, solver_rows
from vivace.engine.solvers.rows import affine, require_number
from vivace.engine.timesteps import Grid, make_grid
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_restart"
RHO = 7.0  # of the grids between the levels
REFUSED = ("lcm",)


def apply_restart(plan: Plan, levels: Sequence[Sequence[float]], *, s_noise: float = 1.0) -> Plan:
    """x <- k x + s_noise sqrt(sigma_max^2 - k^2 sigma_min^2) z, k = alpha_max/alpha_min, then the solver back; K times.

    Each of `levels` is (N, K, t_min, t_max): when the trajectory has come to t_min, noise is added up to t_max, and
    N - 1 steps of the plan's own solver lead back, K times over. History begins anew behind every jump and behind the
    last return. nfe = nfe of the plan + sum K e (N - 1), e evaluations a step (Heun: 2 steps - 1 + sum 2 K (N - 1)).
    Args:
        plan: of `make_plan`, unbound, with no passes but guidance in all rows; others come later.
        levels: N nodes, both ends counted, at least 2; K repetitions, 0 does nothing; t_min < t_max in units of
            sigma/alpha (EDM: sigma). t_min is moved to the nearest row of the plan; nodes as the grid of Karras, rho 7.
        s_noise: factor on the noise added.
    Returns: the plan with rows without evaluation where it jumps; its recipe names this pass. A tail keeps the levels
        whose t_min lies behind its start, with t_max no higher than its start.
    Raises: ArgumentError; PlanError for plans it cannot make anew (from_diffusers, bound, tables, cached rows, churn).
    Source: Xu et al. 2023 (arXiv 2306.14878), algorithm 1, written for any (alpha, sigma).
    """
    asked = tuple(_level(level) for level in _listed(levels))
    scale = require_number(NAME, "s_noise", s_noise)
    maker = _Maker.of(plan)
    steps = maker.rows(asked, scale)
    assert plan.recipe is not None, "checked by the maker"
    made = replace(plan, steps=steps, recipe=None, results=("x",))
    for _, args in plan.recipe.passes:
        made = apply_guidance(made, **args.to_dict())
    given = {"levels": tuple(tuple(float(v) for v in level) for level in asked), "s_noise": scale}
    recipe = replace(plan.recipe, passes=(*plan.recipe.passes, (NAME, Args.of(given))))
    return verify(replace(made, recipe=recipe))


Level = tuple[int, int, float, float]


def _listed(levels: Any) -> list[Any]:
    if isinstance(levels, (str, bytes)) or not isinstance(levels, (list, tuple)):
        raise ArgumentError(f"{NAME}: levels {levels!r:.60}; a list of (N, K, t_min, t_max) is needed")
    return list(levels)


def _level(level: Any) -> Level:
    """(N, K, t_min, t_max), checked."""
    fits = isinstance(level, (list, tuple)) and len(level) == 4
    fits = fits and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in level)
    if not fits or any(v != int(v) for v in level[:2]) or level[0] < 2 or level[1] < 0 or not 0 < level[2] < level[3]:
        raise ArgumentError(
            f"{NAME}: level {level!r:.60}; (N, K, t_min, t_max), whole N >= 2 and K >= 0, 0 < t_min < t_max, is needed"
        )
    return int(level[0]), int(level[1]), float(level[2]), float(level[3])


@dataclass(frozen=True, slots=True)
class _Maker:
    """What makes the rows of a plan: solver, options, prediction and the grid behind the first `first` rows."""

    solver: str
    options: Mapping[str, Any]
    prediction: str
    grid: Grid
    first: int
    scale: float  # rho of the highest level

    @classmethod
    def of(cls, plan: Plan) -> _Maker:
        """The maker of a plan. Raises PlanError for one that this pass cannot make anew."""
        recipe = plan.recipe
        if recipe is None or recipe.maker != "make_plan":
            raise PlanError(f"{NAME}: it plans rows anew, so it needs a plan of make_plan")
        if plan.binding is not None:
            raise PlanError(f"{NAME}: the plan is bound already; this pass comes before bind")
        _check_passes(recipe)
        values = recipe.arguments.to_dict()
        schedule = NoiseSchedule.restore(Args.of(values.pop("schedule")))
        solver, steps, prediction = (values.pop(name) for name in ("solver", "steps", "prediction"))
        places = {name: values.pop(name) for name in ("grid", "timesteps", "sigmas", "final") if name in values}
        _check_options(solver, values)
        first = 0 if recipe.tail is None else steps - int(steps * recipe.tail)
        grid = make_grid(schedule, steps, **places)
        top = _rho(grid, first) if recipe.tail is not None else _most(schedule)
        return cls(solver, values, prediction, grid, first, top)

    def rows(self, levels: Sequence[Level], s_noise: float) -> tuple[Step, ...]:
        """All rows: the plan's own up to a level, its repetitions, the rest planned anew from there."""
        placed = sorted(((self._nearest(level[2]), level) for level in levels if level[1]), key=lambda pair: pair[0])
        out: list[Step] = []
        start, draw = self.first, 0
        for row, (nodes, times, _, t_max) in placed:
            if row <= self.first:
                continue
            high = min(t_max, self.scale) if self.first else t_max
            again = self._between(row, nodes, high)
            jump = self._jump(row, high, s_noise)
            parts = [_steps(self._main(start), row - start)]
            for _ in range(times):
                parts += [(jump,), (replace(again[0], restart=True), *again[1:])]
            for part in parts:
                renamed, draw = _redrawn(part, draw)
                out += renamed
            start = row
        return (*out, *_redrawn(self._main(start), draw)[0])

    def _main(self, start: int) -> tuple[Step, ...]:
        """The plan's rows from row `start` of the full grid on, history begun anew."""
        values = dict(self.options)
        if start and "disable_corrector" in values:
            values["disable_corrector"] = [row - start for row in values["disable_corrector"]]
        return solver_rows(self.solver, self.grid.tail(start), self.prediction, values).steps

    def _nearest(self, t_min: float) -> int:
        """The row whose level is nearest to t_min."""
        if self.grid.steps < 2:
            raise ArgumentError(f"{NAME}: a plan of one step has no level to restart from")
        return min(range(1, self.grid.steps), key=lambda row: abs(_rho(self.grid, row) - t_min))

    def _between(self, row: int, nodes: int, t_max: float) -> tuple[Step, ...]:
        """The rows from t_max down to the level of `row`."""
        low = _rho(self.grid, row)
        if not low < t_max <= self.scale:
            raise ArgumentError(
                f"{NAME}: t_max {t_max:g} is not between {low:g}, of the row nearest to its t_min, and {self.scale:g}, "
                "the highest level; use another level or more steps"
            )
        roots = t_max ** (1.0 / RHO), low ** (1.0 / RHO)
        rhos = [(roots[0] + k / (nodes - 1) * (roots[1] - roots[0])) ** RHO for k in range(nodes - 1)]
        points = [self.grid.at_lam(-math.log(rho)) for rho in rhos]
        levels = [*(level for _, level in points), self.grid.level(row), self.grid.level(row + 1)]
        timesteps = (*(timestep for timestep, _ in points), self.grid.timesteps[row])
        # One row more than is kept: the step before it ends at a level that is evaluated, as inside of any plan.
        grid = Grid(timesteps, tuple(a for a, _ in levels), tuple(s for _, s in levels), self.grid.schedule)
        values = {name: value for name, value in self.options.items() if name != "disable_corrector"}
        if "lower_order_final" in solver_options(self.solver):
            values["lower_order_final"] = False
        return _steps(solver_rows(self.solver, grid, self.prediction, values).steps, nodes - 1)

    def _jump(self, row: int, t_max: float, s_noise: float) -> Step:
        """The row without evaluation that adds noise up to t_max."""
        (alpha, sigma), (_, (high, noise)) = self.grid.level(row), self.grid.at_lam(-math.log(t_max))
        factor = high / alpha
        fresh = s_noise * math.sqrt(max(noise**2 - (factor * sigma) ** 2, 0.0))
        change = affine("x", ("x", factor), ("noise:1", fresh))
        return Step(self.grid.timesteps[row], alpha, sigma, (change,), variant=None)


def _check_passes(recipe: Recipe) -> None:
    for name, args in recipe.passes:
        if name != "apply_guidance" or args.to_dict().get("interval", [0.0, 1.0]) != [0.0, 1.0]:
            raise PlanError(f"{NAME}: the plan went through {name}; this pass comes before it, right behind make_plan")


def _check_options(solver: str, values: Mapping[str, Any]) -> None:
    """Raise PlanError for options that hold for the rows of the plan's own grid only."""
    named = [name for name in (*sorted(PER_ROW), "table", "cached") if values.get(name)]
    if named:
        raise PlanError(
            f"{NAME}: {solver} has {named[0]}, which is for the rows of its own grid; make the plan without"
        )
    if solver in REFUSED or values.get("s_churn"):
        what = "adds noise of its own" if values.get("s_churn") else "is of distilled models"
        raise PlanError(f"{NAME}: {solver} {what}; use ddim, heun, dpmpp_2m, unipc or another solver without")


def _rho(grid: Grid, row: int) -> float:
    alpha, sigma = grid.level(row)
    return math.inf if alpha == 0.0 else sigma / alpha


def _most(schedule: NoiseSchedule) -> float:
    """rho of the highest level with a finite one."""
    return float(math.exp(-schedule.lam(schedule.finite_end)))


def _steps(rows: Sequence[Step], count: int) -> tuple[Step, ...]:
    """The rows of the first `count` steps."""
    starts = [i for i, row in enumerate(rows) if row.variant is not None and row.x == "x"]
    return tuple(rows[: starts[count]]) if count < len(starts) else tuple(rows)


def _redrawn(rows: Sequence[Step], drawn: int) -> tuple[list[Step], int]:
    """The rows with draws numbered from `drawn` + 1 on, and the last number."""
    slots = {slot for row in rows for op in row.ops if isinstance(op, Affine) for slot, _ in op.terms}
    numbers = sorted(int(slot.removeprefix("noise:")) for slot in slots if slot.startswith("noise:"))
    names = {f"noise:{number}": f"noise:{drawn + k}" for k, number in enumerate(numbers, 1)}
    made = [replace(row, ops=tuple(rename(op, names) for op in row.ops)) for row in rows] if names else list(rows)
    return made, drawn + len(numbers)
