"""Ratios of DC-Solver: how far the newest value is moved in time, step by step, towards a converged trajectory.

Row i of n: the state after it, x_{i+1}(r), is a polynomial in the ratio r, of degree points - 1, so its mean square
distance to the converged state is a polynomial too and its smallest value is found without an evaluation. Rows
after it start from the best. The published loss looks at the state after its correction, which is "corrected": it costs
an evaluation of the network for each ratio that is tried.
Source: Zhao et al. 2024 (DC-Solver), which searches by AdamW through the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
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
    golden,
    mean_square,
    places_of,
    require_count,
)
from vivace.engine.plan import Step
from vivace.engine.solvers.dc_solver import NAME, base_updates, compensation, dc_rows, regression, ring_of
from vivace.engine.solvers.rows import Level, require_number
from vivace.engine.tables import KIND
from vivace.engine.timesteps import Grid, choose, make_grid
from vivace.errors import ArgumentError

OBJECTIVES = ("predictor", "corrected")
TRIES = 14  # evaluations of a search in one ratio
Rows = Callable[[float], tuple[Step, ...]]  # with a ratio in the row under work


def calibrate_dc_solver(
    problem: Problem,
    *,
    steps: int | Sequence[int] = 10,
    guidances: Sequence[float] | None = None,
    samples: int = 16,
    objective: str = "predictor",
    bound: float = 0.5,
    evaluations: int = EVALUATIONS,
    grid: str | None = None,
    timesteps: Sequence[float] | None = None,
    final: str = "zero",
    base: str = "unipc",
    order: int = 2,
    variant: str | None = None,
    corrector: bool = True,
    disable_corrector: Sequence[int] = (),
    form: str = "x0",
    lower_order_final: bool = True,
    points: int = 3,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> CalibrationTable:
    """The table of `dc_solver`: a ratio per step of every number of steps and guidance, and a polynomial through them.

    Args:
        steps: number of steps, or several; guidances: scales, default the problem's: all are combined.
        samples: trajectories measured on, 0 .. samples - 1 of the problem.
        objective: "predictor" (closed form) or "corrected" (published; about 14 evaluations a step); bound: largest
            distance of a ratio from 1; evaluations: of the converged run, one for each scale.
        grid, timesteps, final: of `make_plan`; base ... points: of `dc_solver`, which takes them from the table.
        progress: called with (what, done, in all); resume: file of work under way.
    Returns: ratios.k and timesteps.k of configuration k, the polynomial; deterministic in the problem's seed.
    Raises: ArgumentError before any work.
    """
    counts, scales = _configurations(problem, steps, guidances)
    choose("calibrate dc_solver: objective", objective, OBJECTIVES)
    require_count("calibrate dc_solver: samples", samples)
    require_number("calibrate dc_solver", "bound", bound)
    options = {
        "base": base, "order": order, "variant": variant, "corrector": corrector, "form": form, "points": points,
        "disable_corrector": list(disable_corrector), "lower_order_final": lower_order_final,
    }  # fmt: skip
    places = places_of("calibrate dc_solver", grid, timesteps, final)
    grids = {count: make_grid(problem.schedule, count, **places) for count in counts}
    for made in grids.values():  # bad options are told before any work
        dc_rows(made, problem.prediction, [1.0] * made.steps, options)
    arrays: dict[str, NDArray[Any]] = {}
    metadata = described(problem, NAME, samples, arrays) | {
        "options": options,
        "grid": places,
        "configurations": [[count, scale] for scale in scales for count in counts],
        "objective": objective,
        "bound": float(bound),
        "evaluations": evaluations,
    }
    told = dict(metadata)
    with Partial(resume, {**told, "fingerprint": problem.fingerprint}) as partial:
        for number, (count, scale) in enumerate(metadata["configurations"]):
            found = _at_scale(replace(problem, guidance=scale), grids, metadata, partial, progress)
            arrays[f"ratios.{number}"] = np.array(found[count])
            arrays[f"timesteps.{number}"] = np.array(grids[count].timesteps)
    fitted = [[float(ratio) for ratio in arrays[f"ratios.{k}"]] for k in range(len(metadata["configurations"]))]
    moved = [ratio for ratios in fitted for ratio in ratios[2:]]
    metadata["range"] = [min(moved, default=1.0), max(moved, default=1.0)]
    arrays["polynomial"] = regression([(count, scale) for scale in scales for count in counts], fitted)
    return CalibrationTable(KIND, problem.fingerprint, arrays, metadata)


def _configurations(
    problem: Problem, steps: int | Sequence[int], guidances: Sequence[float] | None
) -> tuple[list[int], list[float]]:
    """Numbers of steps and scales of guidance. Raises ArgumentError."""
    counts = [require_count("calibrate dc_solver: steps", n) for n in ([steps] if isinstance(steps, int) else steps)]
    scales = [require_number("calibrate dc_solver", "guidances", g) for g in guidances or ()]
    scales = [problem.guidance] if guidances is None else scales
    if not counts or not scales or len(set(counts)) < len(counts) or len(set(scales)) < len(scales):
        raise ArgumentError(
            f"calibrate dc_solver: steps {counts}, guidances {scales}; give different numbers, one each"
        )
    return counts, scales


def _at_scale(
    problem: Problem, grids: Mapping[int, Grid], told: Mapping[str, Any], partial: Partial, progress: Progress | None
) -> dict[int, list[float]]:
    """Ratios by number of steps at the problem's guidance; what was found before is in `partial`."""
    names = {count: f"ratios.{count}.{problem.guidance!r}" for count in grids}
    levels = list(dict.fromkeys(grid.level(row + 1) for grid in grids.values() for row in range(grid.steps)))
    if any(name not in partial for name in names.values()):
        made = partial.once(f"states.{problem.guidance!r}", lambda: _stacked(problem, levels, told, progress))
        states = dict(zip(levels, torch.from_numpy(made).to(problem.noise([0])), strict=True))
        for count, grid in grids.items():
            if names[count] not in partial:
                targets = [states[grid.level(row + 1)] for row in range(grid.steps)]
                found = fitted_ratios(
                    problem, grid, told["options"], targets, told["objective"], told["bound"], progress
                )
                partial[names[count]] = np.array(found)
                partial.save()
    return {count: [float(ratio) for ratio in partial[name]] for count, name in names.items()}


def _stacked(
    problem: Problem, levels: Sequence[Level], told: Mapping[str, Any], progress: Progress | None
) -> NDArray[Any]:
    samples = range(told["samples"])
    states = converged_states(problem, levels, samples, evaluations=told["evaluations"], progress=progress)
    return torch.stack(states).cpu().numpy()


def fitted_ratios(
    problem: Problem,
    grid: Grid,
    options: Mapping[str, Any],
    targets: Sequence[Tensor],
    objective: str = "predictor",
    bound: float = 0.5,
    progress: Progress | None = None,
) -> list[float]:
    """One ratio a row, each the best for its own step, from the first row on.

    targets: the converged state [n, ...] after every row, of samples 0 .. n - 1.
    """
    ratios = [1.0] * grid.steps
    walk = Walk.on(problem, range(len(targets[0])), grid)
    updates, plain = base_updates(grid, options)
    ring = ring_of(updates, options["points"])
    for row, target in enumerate(targets):

        def rows(ratio: float, row: int = row) -> tuple[Step, ...]:
            tried = [*ratios[:row], ratio, *ratios[row + 1 :]]
            return dc_rows(grid, problem.prediction, tried, options, same_slots=True)

        walk.evaluate(rows(1.0)[row])
        if compensation(grid, row, 0.5, options["points"]):
            low, high = 1.0 - bound, 1.0 + bound
            keep = updates[row + 1].keep if row + 1 < grid.steps else 0.0
            if objective == "predictor" or keep == 0.0:  # the last state has no correction
                ratios[row] = _closed(walk, rows, row, target, options["points"], low, high)
            else:
                wide = zip_longest(updates[row + 1].weights, plain[row + 1].weights, fillvalue=0.0)
                delta = [(merged - alone) / keep for merged, alone in wide]
                ratios[row] = golden(_corrected(walk, rows, row, target, delta, ring), low, high, 1.0, TRIES)
        walk.apply(rows(ratios[row])[row].ops)
        if progress is not None:
            progress(f"ratios of {grid.steps} steps", row + 1, grid.steps)
    return ratios


def _closed(walk: Walk, rows: Rows, row: int, target: Tensor, points: int, low: float, high: float) -> float:
    """The ratio in [low, high] of the state nearest to the target, from states at `points` ratios."""
    nodes = (1.0, 0.0, 2.0)[:points]
    gaps = torch.stack([(walk.tried(rows(node)[row].ops)["x"] - target).double().flatten() for node in nodes])
    gram = (gaps @ gaps.T).cpu().numpy()
    basis = []  # polynomials L_j of the nodes, lowest power first
    for own in nodes:
        others = [node for node in nodes if node != own]
        basis.append(np.polynomial.polynomial.polyfromroots(others) / math.prod(own - node for node in others))
    total = np.zeros(2 * points - 1)
    for j, one in enumerate(basis):
        for k, other in enumerate(basis):
            total += gram[j, k] * np.polynomial.polynomial.polymul(one, other)
    slope = np.polynomial.polynomial.polyder(total)
    turns = np.polynomial.polynomial.polyroots(np.trim_zeros(slope, "b")) if slope.any() else np.zeros(0)
    places = [1.0, low, high, *(float(turn.real) for turn in turns if abs(turn.imag) < 1e-9 and low < turn.real < high)]
    return min(places, key=lambda ratio: float(np.polynomial.polynomial.polyval(ratio, total)))


def _corrected(
    walk: Walk, rows: Rows, row: int, target: Tensor, delta: Sequence[float], ring: int
) -> Callable[[float], float]:
    """The mean square distance of the corrected state, by ratio; delta: weights of the correction, newest first."""

    def objective(ratio: float) -> float:
        made = rows(ratio)
        after = Walk(walk.problem, walk.samples, x=walk.x)
        after.slots = walk.tried(made[row].ops)
        after.evaluate(made[row + 1])
        after.apply(made[row + 1].ops[:1])  # keeps the value
        state = after.x
        for age, weight in enumerate(delta):
            if weight:
                state = state + weight * after.slots[f"m{(row + 1 - age) % ring}"]
        return mean_square(state - target)

    return objective
