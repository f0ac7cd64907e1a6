"""The first stage: draw points, run each on a few samples, drop those that are behind, learn where to draw.

The library is `optuna`: its tree-structured Parzen estimator draws, its percentile pruner stops. All draws follow from
the seed and from earlier results, so a stopped survey is told its results again and goes on as if it had not stopped.
Source: Bergstra et al. 2011 (TPE); successive halving of budgets: Jamieson and Talwalkar 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vivace.engine.calibrate.resume import Partial
from vivace.engine.search.objective import WORST, Objective
from vivace.engine.search.spaces import Point
from vivace.errors import ArgumentError, BackendError, PlanError

Progress = Callable[[str, int, int], None]
START = 16  # points drawn blindly before the estimator is asked
KEPT = 40.0  # percent of earlier points that a point must not be behind


def survey(
    objective: Objective, trials: int, *, seed: int, work: Partial, progress: Progress | None = None
) -> tuple[Point, float]:
    """The best of `trials` points that were run on all samples, and its score.

    Raises: BackendError without the library; PlanError, ArgumentError when no point could be run.
    """
    optuna = require("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=START)
    pruner = optuna.pruners.PercentilePruner(KEPT, n_startup_trials=START // 2)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    for known in objective.space.known():
        study.enqueue_trial(dict(known))
    told: list[list[float]] = work.data.setdefault("survey", [])
    best: tuple[Point, float] | None = None
    for number in range(trials):
        trial = study.ask()
        point = objective.space.suggest(trial)
        if number == 0:
            objective.check(point)
        if number == len(told):
            told.append(_climbed(objective, point, trial))
            work.save()
        else:
            for rung, error in enumerate(told[number]):
                trial.report(error, rung)
        complete = len(told[number]) == objective.rungs
        score = told[number][-1]
        state = optuna.trial.TrialState
        study.tell(trial, score if complete else None, state=state.COMPLETE if complete else state.PRUNED)
        if complete and (best is None or score < best[1]):
            best = point, score
        if progress is not None:
            progress("survey", number + 1, trials)
    if best is None or best[1] >= WORST:
        raise ArgumentError(f"search: none of {trials} candidates could be run to its end; raise trials")
    return best


def _climbed(objective: Objective, point: Point, trial: Any) -> list[float]:
    """Errors of a point, rung by rung, as far as it is worth it."""
    found: list[float] = []
    try:
        for rung, error in enumerate(objective.climb(point)):
            found.append(error)
            trial.report(error, rung)
            if rung + 1 < objective.rungs and (error >= WORST or math.isnan(error) or trial.should_prune()):
                break
    except (PlanError, ArgumentError):  # a grid that is too dense for its schedule
        found = [WORST]
    return found


def require(name: str) -> Any:
    """An optimiser library. Raises BackendError saying how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise BackendError(f"search: {name} is not installed; pip install 'vivace[search]'") from None
