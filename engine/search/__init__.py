"""Searches over plan rows: propose, score against converged latents, refine; what is found is a plan.

`search_usf` decides everything that the solver `usf` has, `search_timesteps` where any solver evaluates. Optimisers are
libraries (`pip install 'vivace[search]'`); ours are the decisions (`spaces`) and the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from vivace.engine.calibrate.problem import Problem, guided
from vivace.engine.calibrate.resume import Partial
from vivace.engine.plan import Plan
from vivace.engine.search.objective import Metric, Objective, converged
from vivace.engine.search.refine import refine
from vivace.engine.search.spaces import Point, Space, TimestepSpace, UsfSpace
from vivace.engine.search.survey import Progress, require, survey
from vivace.errors import ArgumentError

__all__ = ["Found", "Point", "Space", "TimestepSpace", "UsfSpace", "search", "search_timesteps", "search_usf"]

SAMPLES, JUDGED, TRIALS, ROUNDS = 16, 8, 80, 4
SEEDS = 1 << 32  # that the optimisers take
REFERENCES = 8  # converged latents between two savings of work


@dataclass(frozen=True)
class Found:
    """What a search found.

    plan: guided as its problem; error, judged: mean root mean square distance to the converged latents (and metric) on
    the samples of the search and on those that chose among its rounds; even: on the latter, of what the survey begins
    with, a plain rule on the even grid; history: both errors after every round, the survey's first; rows:
    evaluations of the network it took, times samples.
    """

    plan: Plan
    point: Point
    error: float
    judged: float
    even: float
    history: tuple[tuple[float, float], ...] = field(repr=False)
    rows: int = 0


def search_usf(
    problem: Problem,
    evaluations: int = 10,
    *,
    free: bool = True,
    shift: bool = True,
    highest: int = 3,
    **options: Any,
) -> Found:
    """Search the schedule of decisions of the solver `usf` for `evaluations` network evaluations.

    Args:
        free: a first row without evaluation may be tried; shift: the timestep fed is refined apart from the level;
        highest: order tried. options: as in `search`.
    Raises: ArgumentError, PlanError, BackendError (no optimiser library).
    Source: Liu et al. 2023 (S3), section 3.3: their score is FID and their search evolution; see `docs/solvers/usf.md`.
    """
    return search(problem, UsfSpace(problem.schedule, evaluations, free, shift, highest), **options)


def search_timesteps(
    problem: Problem, solver: str, steps: int = 10, *, fixed: Mapping[str, Any] | None = None, **options: Any
) -> Found:
    """Search where a deterministic solver evaluates: `steps` timesteps, everything else as it is.

    Args:
        fixed: options of the solver. options: as in `search`.
    Raises: ArgumentError, PlanError (a solver with noise or tables), BackendError.
    Source: Li et al. 2023 (AutoDiffusion), section 3.2.
    """
    return search(problem, TimestepSpace(solver, problem.schedule, steps, dict(fixed or {})), **options)


def search(
    problem: Problem,
    space: Space,
    *,
    samples: int = SAMPLES,
    judged: int = JUDGED,
    trials: int = TRIALS,
    rounds: int = ROUNDS,
    metric: Metric | None = None,
    weight: float = 1.0,
    reference: Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> Found:
    """The best plan of a space.

    Args:
        samples, judged: samples 0 .. of the problem that are searched on, and those after them that choose the round.
        trials: points of the survey; rounds: of the refinement of the best one, 0: none.
        metric: final latents [n, ...] -> a number, less is better; added to the error with `weight`.
        reference: converged latents [samples + judged, ...]; None: computed, see `objective.converged`.
        seed: of the optimisers. progress: (what, done, in all). resume: file of work under way, see `Partial`;
            a stopped search goes on from it, with more trials or rounds too.
    Raises: ArgumentError, PlanError, BackendError.
    """
    for name, value, low in (
        ("samples", samples, 1),
        ("judged", judged, 1),
        ("trials", trials, 1),
        ("rounds", rounds, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ArgumentError(f"search: {name} is {value!r}; an integer of at least {low} is needed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise ArgumentError(f"search: seed is {seed!r}; an integer from 0 to {SEEDS - 1} is needed")
    told = _description(problem, space, samples, judged, metric, weight, seed)
    with Partial(resume, told) as work:
        if reference is None:
            reference = _reference(problem, samples + judged, work, progress)
        mine, other = range(samples), range(samples, samples + judged)
        one, two = reference[:samples], reference[samples:]
        objective = Objective(problem, space, mine, reference=one, metric=metric, weight=weight)
        judge = Objective(problem, space, other, reference=two, metric=metric, weight=weight)
        point, _ = survey(objective, trials, seed=seed, work=work, progress=progress)
        if work.data.setdefault("begin", list(point.values)) != list(point.values):  # more trials found another point
            work.data.update(begin=list(point.values), refine=[])
        point, history = refine(objective, judge, point, rounds, work=work, progress=progress)
        even = judge.score(space.suggest(require("optuna").trial.FixedTrial(dict(space.known()[0]))))
    error, least = min(history, key=lambda pair: pair[1])
    plan = guided(objective.plan(point), problem.guidance)
    return Found(plan, point, error, least, even, tuple(history), objective.rows + judge.rows)


def _description(
    problem: Problem, space: Space, samples: int, judged: int, metric: Metric | None, weight: float, seed: int
) -> dict[str, Any]:
    """Everything that a search's results depend on."""
    name = None if metric is None else f"{metric.__module__}.{getattr(metric, '__qualname__', type(metric).__name__)}"
    told: dict[str, Any] = {"method": "search", "fingerprint": problem.fingerprint, "space": space.describe()}
    told |= {
        "schedule": problem.schedule.describe().to_dict(),
        "prediction": problem.prediction,
        "guidance": problem.guidance,
    }
    told |= {"prompts": [str(prompt) for prompt in problem.prompts], "problem_seed": problem.seed, "seed": seed}
    return told | {"samples": samples, "judged": judged, "metric": name, "weight": weight}


def _reference(problem: Problem, count: int, work: Partial, progress: Progress | None) -> Tensor:
    """Converged latents, a few at a time, kept with the work under way."""
    parts = []
    for first in range(0, count, REFERENCES):
        some = range(first, min(first + REFERENCES, count))
        name = f"reference.{first}"
        if name not in work:
            work[name] = converged(problem, some).cpu().numpy()
            work.save()
        parts.append(torch.from_numpy(work[name]))
        if progress is not None:
            progress("reference", some[-1] + 1, count)
    return torch.cat(parts).to(problem.noise([0]).device)
