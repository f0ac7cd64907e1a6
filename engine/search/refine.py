"""The second stage: the numbers of a point, all together.

Distance to converged latents is a sum of squares, so `scipy`'s trust-region least squares refines it; a row's number is
differentiated by running the rows behind it. With a user's metric there are no squares: `cma`'s evolution strategy.
Both work in rounds from the best numbers so far; a round's result is kept, so a stopped refinement goes on.
Source: Branch, Coleman and Li 1999 (trust region reflective); Hansen and Ostermeier 2001 (CMA-ES).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from vivace.engine.calibrate.resume import Partial
from vivace.engine.noise_schedule import FloatArray
from vivace.engine.search.objective import WORST, Objective
from vivace.engine.search.spaces import Point
from vivace.engine.search.survey import Progress, require
from vivace.errors import ArgumentError, PlanError

DIFFERENCE = 0.02  # of a derivative, in units of the knobs
TRIES = 4  # points that a round of least squares may run, derivatives apart
GENERATIONS = TRIES  # of a round of the evolution strategy
SPREAD = 0.3  # of its first generation, in units of the knobs
PATIENCE = 2  # rounds without gain on the judging samples


def refine(
    objective: Objective,
    judge: Objective,
    point: Point,
    rounds: int,
    *,
    work: Partial,
    progress: Progress | None = None,
) -> tuple[Point, list[tuple[float, float]]]:
    """The round's point that is best on the samples of `judge`, and (score, score there) after every round.

    A round without change, or two without gain on the judging samples, end it.
    """
    history = [(objective.score(point), judge.score(point))]
    best, found, waited = point, history[0][1], 0
    told: list[list[float]] = work.data.setdefault("refine", [])
    for number in range(rounds):
        if number == len(told):
            told.append(_round(objective, point, number, _within(progress, number, rounds)))
            work.save()
        moved = replace(point, values=tuple(told[number]))
        if progress is not None:
            progress("refine", (number + 1) * TRIES, rounds * TRIES)
        if moved == point:
            break
        point = moved
        history.append((objective.score(point), judge.score(point)))
        better = history[-1][1] < found
        best, found, waited = (point, history[-1][1], 0) if better else (best, found, waited + 1)
        if waited == PATIENCE:
            break
    return best, history


def _within(progress: Progress | None, number: int, rounds: int) -> Callable[[int], None]:
    """Progress inside of a round, in tries."""
    if progress is None:
        return lambda done: None
    return lambda done: progress("refine", number * TRIES + min(done, TRIES), rounds * TRIES)


def _round(objective: Objective, point: Point, number: int, told: Callable[[int], None]) -> list[float]:
    """Values after one round from those of a point; the same where nothing is gained."""
    scales = np.array([knob.scale for knob in objective.space.knobs(point)])
    if objective.metric is None:
        return [float(value) for value in _squares(objective, point, scales, told)]
    return [float(value) for value in _evolved(objective, point, scales, number, told)]


def _squares(objective: Objective, point: Point, scales: FloatArray, told: Callable[[int], None]) -> FloatArray:
    """Values after some steps of least squares."""
    optimize = require("scipy.optimize")
    origin = np.array(point.values)
    knobs = objective.space.knobs(point)
    last: dict[str, FloatArray] = {}
    tried = 0

    def residuals(z: FloatArray, first: int | None = None) -> FloatArray:
        try:
            return objective.residuals(_at(point, origin + scales * z), first)
        except (PlanError, ArgumentError):
            return np.full_like(last["r"], np.sqrt(WORST))

    def at(z: FloatArray) -> FloatArray:
        nonlocal tried
        tried += 1
        last["r"] = residuals(z)
        last["z"] = z.copy()
        return last["r"]

    def derivative(z: FloatArray) -> FloatArray:
        if tried == TRIES:  # it is asked for once more, and not looked at
            return last["J"]
        if not np.array_equal(last["z"], z):
            at(z)  # the run that reruns go on from
        made = np.empty((len(last["r"]), len(z)))
        for i, knob in enumerate(knobs):
            moved = z.copy()
            moved[i] += DIFFERENCE
            made[:, i] = (residuals(moved, knob.first) - last["r"]) / DIFFERENCE
        told(tried)
        last["J"] = made
        return made

    found = optimize.least_squares(at, np.zeros(len(origin)), jac=derivative, method="trf", max_nfev=TRIES)
    values: FloatArray = origin + scales * np.asarray(found.x, dtype=np.float64)
    return values


def _evolved(
    objective: Objective, point: Point, scales: FloatArray, number: int, told: Callable[[int], None]
) -> FloatArray:
    """Values after some generations of CMA-ES."""
    cma = require("cma")
    origin = np.array(point.values)
    options = {"seed": number + 1, "maxiter": GENERATIONS, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(np.zeros(len(origin)), SPREAD, options)
    best: FloatArray = origin
    low = objective.score(point)
    while not strategy.stop():
        asked: Sequence[FloatArray] = strategy.ask()
        scores = [_score(objective, _at(point, origin + scales * z)) for z in asked]
        strategy.tell(asked, scores)
        told(int(strategy.countiter))
        first = int(np.argmin(scores))
        if scores[first] < low:
            low = scores[first]
            best = np.asarray(origin + scales * asked[first], dtype=np.float64)
    return best


def _score(objective: Objective, point: Point) -> float:
    try:
        return objective.score(point)
    except (PlanError, ArgumentError):
        return WORST


def _at(point: Point, values: FloatArray) -> Point:
    return replace(point, values=tuple(float(value) for value in values))
