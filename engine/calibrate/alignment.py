"""Timestep ratios: what the network is best told of the time of a state that large steps have led to.

Row by row along the solver's own trajectory, one number is searched without gradients:
  "state"       the state after the row nearest to the converged trajectory's
  "prediction"  the noise predicted after the row nearest to the noise predicted before it, as published; the last row
                keeps 1
Rows that end in an inner stage keep 1.
Source: Xia et al. 2023 (TimeTuner), section 3.2, "sequential", which uses Adam through the network and images; here
the trajectories start from noise, which is where images end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
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
    golden,
    mean_square,
    places_of,
    require_count,
    unguided,
)
from vivace.engine.passes.time_alignment import METHOD
from vivace.engine.plan import Plan, Step, writes
from vivace.engine.prediction import to_eps
from vivace.engine.tables import KIND
from vivace.engine.timesteps import choose, make_grid
from vivace.errors import ArgumentError

OBJECTIVES = ("state", "prediction")


def calibrate_time_alignment(
    problem: Problem,
    *,
    solver: str = "ddim",
    steps: int = 10,
    options: dict[str, Any] | None = None,
    grid: str | None = None,
    timesteps: Sequence[float] | None = None,
    final: str = "zero",
    samples: int = 16,
    objective: str = "state",
    bound: float = 0.2,
    tries: int = 14,
    evaluations: int = EVALUATIONS,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> CalibrationTable:
    """The table of `apply_time_alignment` for one plan: a ratio for every evaluation.

    Args:
        solver, steps, options, grid, timesteps, final: of `make_plan`; options: the solver's, by name.
        samples: trajectories measured on, 0 .. samples - 1 of the problem.
        objective: "state" or "prediction"; bound: largest distance of a ratio from 1; no timestep leaves the trained
            range. tries: ratios tried for a row, each an evaluation ("prediction": two); evaluations: of the converged
            run of "state".
        progress: called with (what, done, in all); resume: file of work under way.
    Returns: ratios and timesteps [evaluations]; deterministic in the problem's seed.
    Raises: ArgumentError before any work.
    """
    what = "calibrate time_alignment"
    for name, value, least in (("steps", steps, 1), ("samples", samples, 1), ("tries", tries, 6)):
        require_count(f"{what}: {name}", value, least)
    choose(f"{what}: objective", objective, OBJECTIVES)
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0.0 < bound < 1.0:
        raise ArgumentError(f"{what}: bound must be a number in (0, 1), got {bound!r}")
    places = places_of(what, grid, timesteps, final)
    plan = unguided(problem, solver, steps, **places, **(options or {}))
    if any(step.variant is None or step.x_scale != 1.0 for step in plan.steps):
        raise ArgumentError(f"{what}: {solver} has rows without an evaluation; use another solver")
    arrays: dict[str, NDArray[Any]] = {}
    metadata = described(problem, METHOD, samples, arrays) | {
        "plan": {"solver": solver, "steps": steps, **places, **(options or {})},
        "objective": objective,
        "bound": float(bound),
        "tries": tries,
        "evaluations": evaluations,
    }
    told = dict(metadata)
    with Partial(resume, {**told, "fingerprint": problem.fingerprint}) as partial:
        targets: dict[int, Tensor] = {}
        if objective == "state" and any(f"ratio.{row}" not in partial for row in range(len(plan.steps))):
            final_level = make_grid(problem.schedule, steps, **places).level(steps)
            targets = _targets(problem, plan, final_level, samples, evaluations, progress)
        arrays["ratios"] = _ratios(Walk(problem, range(samples), plan.init), plan, targets, metadata, partial, progress)
    arrays["timesteps"] = np.array([step.timestep for step in plan.steps])
    return CalibrationTable(KIND, problem.fingerprint, arrays, metadata)


def _ratios(
    walk: Walk,
    plan: Plan,
    targets: Mapping[int, Tensor],
    told: Mapping[str, Any],
    partial: Partial,
    progress: Progress | None,
) -> NDArray[np.float64]:
    """One ratio a row, each the best for its own row, from the first on. targets: of the objective "state"."""
    found = []
    for row, step in enumerate(plan.steps):
        following = plan.steps[row + 1] if row + 1 < len(plan.steps) else None

        def search(row: int = row, step: Step = step, following: Step | None = following) -> float:
            if told["objective"] == "state":
                if row not in targets:
                    return 1.0
                distance = _nearest_state(walk, step, targets[row])
            elif following is None or following.x != "x":
                return 1.0
            else:
                distance = _same_noise(walk, step, following, plan.prediction)
            low, high = _range(walk.problem, step.timestep, told["bound"])
            return golden(distance, low, high, 1.0, told["tries"])

        found.append(float(partial.once(f"ratio.{row}", lambda: np.array(search()))))
        walk.slots[step.outs[0]] = walk.predict(step, found[row] * step.timestep)
        walk.apply(step.ops)
        if progress is not None:
            progress("rows", row + 1, len(plan.steps))
    return np.array(found)


def _targets(
    problem: Problem,
    plan: Plan,
    final: tuple[float, float],
    samples: int,
    evaluations: int,
    progress: Progress | None,
) -> dict[int, Tensor]:
    """The converged state after every row that ends in slot x."""
    rows = [row for row, step in enumerate(plan.steps) if any(writes(op) == "x" for op in step.ops)]
    after = [(step.alpha, step.sigma) for step in plan.steps[1:]] + [final]
    levels = [after[row] for row in rows]
    states = converged_states(problem, levels, range(samples), evaluations=evaluations, progress=progress)
    return dict(zip(rows, states, strict=True))


def _range(problem: Problem, timestep: float, bound: float) -> tuple[float, float]:
    """Ratios from 1 - bound to 1 + bound that keep the timestep within the trained range."""
    schedule = problem.schedule
    ends = sorted((schedule.timestep(schedule.data_end), schedule.timestep(schedule.noise_end)))
    if timestep <= 0.0:
        return 1.0, 1.0
    low, high = max(1.0 - bound, ends[0] / timestep), min(1.0 + bound, ends[1] / timestep)
    if low * timestep < ends[0]:  # rounding
        low = math.nextafter(low, 2.0)
    if high * timestep > ends[1]:
        high = math.nextafter(high, 0.0)
    return min(1.0, low), max(1.0, high)


def _nearest_state(walk: Walk, step: Step, target: Tensor) -> Callable[[float], float]:
    """Mean square distance of the state after the row to the target, by ratio."""

    def objective(ratio: float) -> float:
        out = walk.predict(step, ratio * step.timestep)
        return mean_square(walk.tried(step.ops, {step.outs[0]: out})["x"] - target)

    return objective


def _same_noise(walk: Walk, step: Step, following: Step, prediction: str) -> Callable[[float], float]:
    """Mean square change of the predicted noise over the row, by ratio."""

    def noise(x: Tensor, row: Step, out: Tensor) -> Tensor:
        p, q = to_eps(prediction, row.alpha, row.sigma)
        return p * x + q * out

    before = noise(walk.slots[step.x], step, walk.predict(step))

    def objective(ratio: float) -> float:
        out = walk.predict(step, ratio * step.timestep)
        x = walk.tried(step.ops, {step.outs[0]: out})["x"]
        after = Walk(walk.problem, walk.samples, x=x)
        return mean_square(noise(x, following, after.predict(following)) - before)

    return objective
