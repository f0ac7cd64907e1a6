"""Weights of LinearAG: ordinary least squares of the unconditional prediction on what is known when its row begins.

Row by row along trajectories of the solver, over all elements of all samples. On "own" trajectories a row's estimate
takes the place of its unconditional prediction at once, so that later rows are fitted to the states that such runs
visit; on "guided" ones, as published, runs are those of full guidance and only the history holds the estimates.
Source: Castillo et al. 2023 (Adaptive Guidance), section 5.
"""

from __future__ import annotations

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
from vivace.engine.calibrate.walk import Progress, Walk, described, require_count, unguided
from vivace.engine.passes.linear_ag import METHOD, MOST
from vivace.engine.plan import Step
from vivace.engine.tables import KIND
from vivace.engine.timesteps import choose
from vivace.errors import ArgumentError

TRAJECTORIES = ("own", "guided")
Branches = tuple[Tensor, Tensor]


def calibrate_linear_ag(
    problem: Problem,
    *,
    solver: str = "unipc",
    steps: int = 20,
    options: dict[str, Any] | None = None,
    grid: str | None = None,
    final: str = "zero",
    samples: int = 32,
    every: int = 3,
    first: int = 2,
    rows: Sequence[int] | None = None,
    history: int = 2,
    trajectories: str = "own",
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> CalibrationTable:
    """The table of `apply_linear_ag` for one plan: the evaluations that are estimated, and their weights.

    Args:
        solver, steps, options, grid, final: of `make_plan`; options: the solver's, by name.
        samples: trajectories fitted on, 0 .. samples - 1 of the problem, which must be guided.
        every, first: evaluations i >= first with i mod every != 0 are estimated; rows: these in their place.
        history: earlier evaluations that an estimate reads, fewer where there are not as many.
        trajectories: "own" or "guided".
        progress: called with (what, done, in all); resume: file of work under way.
    Returns: timesteps [evaluations] and weights.i [2n + 1] of every estimated evaluation i, and their errors
        |estimate - uncond| / |cond - uncond| as errors [evaluations], 0 where nothing is estimated; deterministic in
        the problem's seed.
    Raises: ArgumentError before any work.
    """
    what = "calibrate linear_ag"
    for name, value, least in (("steps", steps, 2), ("samples", samples, 1), ("every", every, 2), ("first", first, 1)):
        require_count(f"{what}: {name}", value, least)
    if require_count(f"{what}: history", history) > MOST:
        raise ArgumentError(f"{what}: history must be at most {MOST}, got {history}")
    choose(f"{what}: trajectories", trajectories, TRAJECTORIES)
    if problem.guidance == 1.0:
        raise ArgumentError(f"{what}: guidance 1 runs no unconditional branch; give a problem with guidance")
    places = {"final": final} if grid is None else {"grid": grid, "final": final}
    plan = unguided(problem, solver, steps, **places, **(options or {}))
    chosen = _rows(what, plan.nfe, rows, every, first)
    arrays: dict[str, NDArray[Any]] = {}
    metadata = described(problem, METHOD, samples, arrays) | {
        "plan": {"solver": solver, "steps": steps, **places, **(options or {})},
        "rows": chosen,
        "history": history,
        "trajectories": trajectories,
    }
    told = dict(metadata)
    with Partial(resume, {**told, "fingerprint": problem.fingerprint}) as partial:
        walk, past = Walk(problem, range(samples), plan.init), list[Branches]()
        errors = np.zeros(plan.nfe)
        evaluation = 0
        for step in plan.steps:
            if step.variant is not None:
                cond, uncond = _branches(problem, walk, step)
                known = uncond
                if evaluation in chosen:
                    read = _regressors(cond, past[-history:])

                    def fit(read: Sequence[Tensor] = read, uncond: Tensor = uncond) -> NDArray[Any]:
                        return least_squares(read, uncond)

                    weights = arrays[f"weights.{evaluation}"] = partial.once(f"weights.{evaluation}", fit)
                    known = _sum(weights, read)
                    errors[evaluation] = float((known - uncond).norm() / (cond - uncond).norm())
                past.append((cond, known))
                own = known if trajectories == "own" else uncond
                walk.slots[step.outs[0]] = own + problem.guidance * (cond - own)
                evaluation += 1
                if progress is not None:
                    progress("evaluations", evaluation, plan.nfe)
            walk.apply(step.ops)
    arrays["timesteps"] = np.array([step.timestep for step in plan.steps if step.variant is not None])
    arrays["errors"] = errors
    return CalibrationTable(KIND, problem.fingerprint, arrays, metadata)


def _rows(what: str, evaluations: int, rows: Sequence[int] | None, every: int, first: int) -> list[int]:
    """Evaluations that are estimated, in order. Raises ArgumentError."""
    if rows is None:
        return [i for i in range(first, evaluations) if i % every]
    given = list(rows)
    if any(isinstance(row, bool) or not isinstance(row, int) or not 0 < row < evaluations for row in given):
        raise ArgumentError(f"{what}: rows {given!r:.60}; evaluations from 1 to {evaluations - 1} are needed")
    return sorted(set(given))


def _branches(problem: Problem, walk: Walk, step: Step) -> Branches:
    cond, uncond = problem.branches(
        step.x_scale * walk.slots[step.x], [step.timestep] * len(walk.samples), walk.samples
    )
    return cond, uncond


def _regressors(cond: Tensor, past: Sequence[Branches]) -> list[Tensor]:
    """What an estimate reads, newest first: cond, then earlier conds, then earlier unconds."""
    newest = past[::-1]
    return [cond, *(branches[0] for branches in newest), *(branches[1] for branches in newest)]


def least_squares(read: Sequence[Tensor], wanted: Tensor) -> NDArray[Any]:
    """b that makes |sum b_k read_k - wanted|^2 smallest, float64 [k], of smallest norm where several do.

    By QR and singular values of the columns themselves: their products would cost half of the digits.
    """
    columns = torch.stack([column.double().flatten() for column in read], dim=1)
    scale = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.qr(torch.cat((columns / scale, wanted.double().reshape(-1, 1)), dim=1), mode="r").R
    solved = np.linalg.lstsq(factor[:, :-1].cpu().numpy(), factor[:, -1].cpu().numpy(), rcond=1e-10)[0]
    found: NDArray[Any] = solved / scale.cpu().numpy()
    return found


def _sum(weights: NDArray[Any], read: Sequence[Tensor]) -> Tensor:
    total = float(weights[0]) * read[0]
    for weight, column in zip(weights[1:], read[1:], strict=True):
        total = total + float(weight) * column
    return total
