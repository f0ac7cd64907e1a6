"""The mean of a network's error over its data: the table of `apply_score_calibration`.

At every log-SNR, mean over data x0 and noise z of out(alpha x0 + sigma z) - target, in the network's own prediction,
target z for eps, alpha z - sigma x0 for v, and so on. For eps this is E[eps], whose true value is 0 (a score has mean 0
over its data), less the mean of the z drawn: the same expectation with much less variance.
Source: Pang et al. 2023 (score calibration), eq. 10 to 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial as partial_of
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.calibrate.problem import BATCH, Problem
from vivace.engine.calibrate.resume import Partial
from vivace.engine.calibrate.states import DATA_STEPS, Level, Noised, data_of, parts_of, told_of
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.calibrate.walk import described, require_count
from vivace.engine.passes import apply_guidance
from vivace.engine.planning import make_plan
from vivace.engine.tables import KIND

METHOD = "score_calibration"

Progress = Callable[[str, int, int], None]


def calibrate_score_calibration(
    problem: Problem,
    *,
    steps: int = 20,
    grid: str | None = None,
    samples: int = 512,
    data: Any = None,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> CalibrationTable:
    """The mean error of every branch at the log-SNRs of a plan of `steps` rows on `grid`; other rows interpolate.

    Args:
        problem: network and prompts; its guidance other than 1 asks for the mean of "uncond" too, whatever the scale.
        samples: data used, each with one noise for all log-SNRs.
        data: x0 [samples, ...], sample j of prompt j mod their number: training data, for which the method is made;
            None: the model's own runs without guidance, 25 evaluations each.
        progress: called with (what, done, in all); resume: file of work under way.
    Cost: steps * samples evaluations of every branch, and the runs.
    Raises: ArgumentError, ShapeError.
    """
    rows = make_plan(problem.schedule, "ddim", steps, prediction=problem.prediction, grid=grid).steps
    finite = sorted((step.lam, step) for step in rows if math.isfinite(step.lam))
    branches = ("cond",) if problem.guidance == 1.0 else ("cond", "uncond")
    arrays: dict[str, NDArray[Any]] = {}
    told = described(problem, METHOD, require_count("score_calibration: samples", samples, 2), arrays)
    told |= {"steps": steps, "grid": grid, "data": told_of(data)}
    work = {name: value for name, value in told.items() if name not in ("guidance", "versions")}
    with Partial(resume, {**work, "branches": branches, "fingerprint": problem.fingerprint}) as partial:
        kept = partial.once("data", lambda: _data(problem, samples, data).cpu().numpy())
        found = Noised(problem, data_of(problem, samples, kept))
        means = []
        for number, (lam, step) in enumerate(finite):
            if progress is not None:
                progress("log-SNRs", number, len(finite))
            at = Level(lam, step.alpha, step.sigma, step.timestep)
            means.append(partial.once(f"mean.{number}", partial_of(_mean, found, at)))
    if progress is not None:
        progress("log-SNRs", len(finite), len(finite))
    arrays["lam"] = np.array([lam for lam, _ in finite])
    arrays |= {branch: np.ascontiguousarray(np.stack(means)[:, n]) for n, branch in enumerate(branches)}
    return CalibrationTable(KIND, problem.fingerprint, arrays, told)


def _data(problem: Problem, samples: int, data: Any) -> Tensor:
    """x0, from runs without guidance where it is not given."""
    if data is not None or problem.guidance == 1.0:
        return data_of(problem, samples, data)
    plan = make_plan(problem.schedule, "unipc", DATA_STEPS, prediction=problem.prediction)
    return problem.run(apply_guidance(plan, 1.0), range(samples))


def _mean(found: Noised, at: Level) -> NDArray[Any]:
    """Mean of out - target of every branch: [branches, ...], dtype of the data."""
    problem = found.problem
    total: Any = 0.0
    for part in parts_of(len(found.data), BATCH):
        x, z, x0 = found.states(at, part), found.noise[part], found.data[part]
        outs = problem.branches(x, [at.timestep] * len(x), found.samples[part])
        target = {"eps": z, "x0": x0, "v": at.alpha * z - at.sigma * x0, "flow": z - x0}[problem.prediction]
        total = total + torch.stack([(out - target).double().sum(0) for out in outs])
    return (total / len(found.data)).to(found.data.dtype).cpu().numpy()  # type: ignore[no-any-return]
