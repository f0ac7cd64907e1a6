"""Numbers of IIA: what has to be added to a coarse step so that it lands where many small steps land.

Row by row, from the state that the fitted rows before it reached: target - base(x) is regressed on x and the values
that the row reads, over all samples and elements. The target is the end of `substeps` small steps from the same state
("local", as published), or the converged trajectory's state ("trajectory"), which also undoes what was lost before.
Source: Zhang, Niwa and Kleijn 2023 (IIA), section 3.2 (the least squares), section 4 (DDIM and DPM-Solver).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.resume import Partial
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.calibrate.walk import (
    EVALUATIONS,
    Progress,
    Walk,
    converged_states,
    described,
    places_of,
    require_count,
)
from vivace.engine.plan import Step
from vivace.engine.solvers import SOLVERS, solver_options, solver_rows
from vivace.engine.solvers.iia import NAME, base_rows, fitting, iia_rows
from vivace.engine.solvers.rows import Level, Update, require_number
from vivace.engine.tables import KIND
from vivace.engine.timesteps import Grid, choose, make_grid

TARGETS = ("local", "trajectory")


def calibrate_iia(
    problem: Problem,
    *,
    steps: int = 10,
    samples: int = 32,
    target: str = "local",
    substeps: int = 10,
    fine: str | None = None,
    evaluations: int = EVALUATIONS,
    ridge: float = 0.0,
    grid: str | None = None,
    timesteps: Sequence[float] | None = None,
    final: str = "zero",
    base: str = "ddim",
    depth: int | None = None,
    state: bool = False,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> CalibrationTable:
    """The table of `iia` for one number of steps.

    Args:
        steps: N; samples: trajectories measured on, 0 .. samples - 1 of the problem.
        target: "local", the published one, or "trajectory", which was mostly the nearer to converged pictures where we
            measured; substeps: M of "local", taken by the solver `fine`, default the base; evaluations: of the
            converged run of "trajectory".
        ridge: added to the diagonal of the normal equations, as a share of its mean; keeps the numbers small.
        grid, timesteps, final: of `make_plan`; base, depth, state: of `iia`, which takes them from the table.
        progress: called with (what, done, in all); resume: file of work under way.
    Returns: shifts [rows, depth + 2] and errors [rows, 2], the root mean square distance to the target before and
        after; deterministic in the problem's seed.
    Raises: ArgumentError before any work.
    """
    count = require_count("calibrate iia: steps", steps)
    choose("calibrate iia: target", target, TARGETS)
    require_count("calibrate iia: samples", samples)
    require_count("calibrate iia: substeps", substeps)
    require_number("calibrate iia", "ridge", ridge)
    finer = choose("calibrate iia: fine", base if fine is None else fine, tuple(SOLVERS))
    places = places_of("calibrate iia", grid, timesteps, final)
    made = make_grid(problem.schedule, count, **places)
    made_rows = base_rows(made, {"base": base, "depth": depth, "state": state})
    work = _Work(problem, made, made_rows, state, samples, target == "local", substeps, finer, evaluations, ridge)
    arrays: dict[str, NDArray[Any]] = {}
    metadata = described(problem, NAME, samples, arrays) | {
        "options": {"base": base, "depth": work.depth, "state": state},
        "grid": places,
        "steps": count,
        "target": target,
        "substeps": substeps,
        "fine": finer,
        "evaluations": evaluations,
        "ridge": float(ridge),
    }
    told = dict(metadata)
    with Partial(resume, {**told, "fingerprint": problem.fingerprint}) as partial:
        found = work.numbers(partial, progress)
    arrays |= {"shifts": found[:, :-2], "errors": found[:, -2:], "timesteps": np.array(work.levels.timesteps)}
    return CalibrationTable(KIND, problem.fingerprint, arrays, metadata)


class _Work:
    """The rows of a base on a grid, and how to fit what they lack."""

    def __init__(
        self,
        problem: Problem,
        grid: Grid,
        rows: tuple[Grid, str, list[Update], int],
        state: bool,
        samples: int,
        local: bool,
        substeps: int,
        fine: str,
        evaluations: int,
        ridge: float,
    ) -> None:
        self.problem, self.grid, self.state, self.samples = problem, grid, state, samples
        self.levels, self.form, self.updates, self.depth = rows
        self.local, self.substeps, self.fine, self.evaluations, self.ridge = local, substeps, fine, evaluations, ridge
        self.ring = max(self.depth + 1, *(len(update.weights) for update in self.updates))
        self.ends = [row for row, update in enumerate(self.updates) if not update.stage]

    def row(self, row: int, numbers: NDArray[np.float64]) -> Step:
        """A row with its numbers, whatever the others have: history slots are the same for all."""
        shifts = [[0.0] * (self.depth + 2)] * len(self.updates)
        shifts[row] = [float(number) for number in numbers]
        return iia_rows(self.levels, self.problem.prediction, self.form, self.updates, shifts, self.ring)[row]

    def numbers(self, partial: Partial, progress: Progress | None) -> NDArray[np.float64]:
        """Of every row its numbers, then the error before and after: [rows, depth + 4]."""
        walk = Walk.on(self.problem, range(self.samples), self.grid)
        states: list[Tensor] = []
        if not self.local and any(f"row.{row}" not in partial for row in self.ends):
            wanted = [self.levels.level(row + 1) for row in self.ends]
            states = converged_states(
                self.problem, wanted, range(self.samples), evaluations=self.evaluations, progress=progress
            )
        start, begun = walk.x, 0
        found = np.zeros((len(self.updates), self.depth + 4))
        for row, update in enumerate(self.updates):
            plain = self.row(row, found[row, :-2])
            walk.evaluate(plain)
            mask = fitting(update, row, self.depth, self.state)
            if mask.any():
                if f"row.{row}" not in partial:
                    goal = self.fine_state(begun, row, start) if self.local else states[self.ends.index(row)]
                    partial[f"row.{row}"] = _fit(walk, plain, row, self.ring, goal, mask, self.ridge)
                    partial.save()
                found[row] = partial[f"row.{row}"]
            walk.apply(self.row(row, found[row, :-2]).ops)
            if not update.stage:
                start, begun = walk.x, row + 1
            if progress is not None:
                progress("rows", row + 1, len(self.updates))
        return found

    def fine_state(self, first: int, row: int, x: Tensor) -> Tensor:
        """The state after `row` by small steps from x, the state before row `first`."""
        start = self.levels.timesteps[first], self.levels.level(first)
        return _fine(self.problem, self.grid, start, self.levels.level(row + 1), x, self.fine, self.substeps)


def _fit(
    walk: Walk, plain: Step, row: int, ring: int, goal: Tensor, mask: NDArray[np.bool_], ridge: float
) -> NDArray[np.float64]:
    """Least squares of goal - base on x and the values of a row: its numbers, then the error before and after."""
    after = walk.tried(plain.ops)
    names = ["x", *(f"m{(row - age) % ring}" for age in range(len(mask) - 1))]
    inside = {**after, "x": walk.x}
    gap = (goal - after["x"]).double().flatten()
    columns = torch.stack([inside[name].double().flatten() for name, used in zip(names, mask, strict=True) if used])
    gram, moment = (columns @ columns.T).cpu().numpy(), (columns @ gap).cpu().numpy()
    gram += ridge * float(np.trace(gram)) / len(gram) * np.eye(len(gram))
    numbers = np.zeros(len(mask))
    numbers[mask] = np.linalg.lstsq(gram, moment, rcond=1e-13)[0]
    left = gap - torch.from_numpy(numbers[mask]).to(gap) @ columns
    rms = [float(part.square().mean().sqrt()) for part in (gap, left)]
    return np.array([*numbers, *rms])


def _fine(
    problem: Problem, grid: Grid, start: tuple[float, Level], end: Level, x: Tensor, solver: str, parts: int
) -> Tensor:
    """The state at `end` by `parts` steps of a solver, even in lam, from x at `start`, a (timestep, level)."""
    points = [start, *(grid.at_lam(lam) for lam in _lams(problem, start[1], end, parts)[1:])]
    options = {"lower_order_final": False} if "lower_order_final" in solver_options(solver) else {}
    alphas, sigmas = zip(*(level for _, level in points), end, strict=True)
    finer = Grid(tuple(timestep for timestep, _ in points), alphas, sigmas, grid.schedule)
    walk = Walk(problem, range(len(x)), x=x)
    for step in solver_rows(solver, finer, problem.prediction, options).steps:
        walk.evaluate(step)
        walk.apply(step.ops)
    return walk.x


def _lams(problem: Problem, start: Level, end: Level, parts: int) -> list[float]:
    """The lam of `parts` steps from `start` to `end`; an end at infinite lam counts as the schedule's last finite one.

    The last step of a run to sigma = 0 starts at the smallest trained level, the first from alpha = 0 ends at the
    noisiest finite one.
    """
    schedule = problem.schedule
    low = schedule.lam(schedule.finite_end) if start[0] == 0.0 else math.log(start[0] / start[1])
    high = schedule.lam(schedule.data_end) if end[1] == 0.0 else math.log(end[0] / end[1])
    if end[1] == 0.0:
        if high <= low:
            return [low]
        return [float(lam) for lam in np.linspace(low, high, parts)]
    return [float(lam) for lam in np.linspace(low, high, parts + 1)[:-1]]
