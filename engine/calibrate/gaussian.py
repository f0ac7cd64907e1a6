"""Mean and low-rank covariance of data, or of what a model makes: the table of `passes.apply_teleport`.

Of n samples: mean m, the r largest eigenpairs (v_k, u_k) of the covariance S, and the mean of the other eigenvalues,
rest = (tr S - sum_k v_k) / (D - r): the most likely Gaussian with D - r equal variances (Tipping and Bishop 1999).
With `per_prompt` also the mean of every prompt's samples, and the same of the covariance about these means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.resume import Partial
from vivace.engine.calibrate.states import data_of
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.calibrate.walk import described, require_count
from vivace.engine.plan import Plan
from vivace.engine.tables import KIND
from vivace.errors import ArgumentError

METHOD = "teleport"
CHUNK = 64  # samples made between two writings of the work under way
Progress = Callable[[str, int, int], None]


def calibrate_teleport(
    problem: Problem,
    *,
    samples: int = 256,
    rank: int = 16,
    per_prompt: bool = False,
    data: Any = None,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> CalibrationTable:
    """The Gaussian of a problem's pictures, guided as it is.

    Args:
        samples: n, at least 2: final latents of the problem's own runs, or rows of `data`.
        rank: r, fewer than n; directions whose variance is known one by one.
        per_prompt: a mean for every prompt, each with two samples or more.
        data: x0 [n, *latent] in place of runs, sample j of prompt j mod their number.
    Returns: a table of method "teleport"; arrays `means` [1 + prompts, *latent] (first that of all), and for "all" and
        "within" `basis` [r, *latent], orthonormal, `variances` [r], `rest` [1].
    Raises: ArgumentError, ShapeError; ModelError for work under way of something else.
    """
    count, prompts = require_count("calibrate_teleport: samples", samples, 2), len(problem.prompts)
    most = min(count - (prompts if per_prompt else 1), int(np.prod(problem.shape)))
    if not 0 < require_count("calibrate_teleport: rank", rank) <= most:
        raise ArgumentError(f"calibrate_teleport: rank {rank} of {count} samples; at most {most} directions show")
    if per_prompt and count < 2 * prompts:
        raise ArgumentError(
            f"calibrate_teleport: {count} samples of {prompts} prompts; per_prompt needs two of each, {2 * prompts}"
        )
    x0 = _data(problem, count, data, progress, resume).double()
    centre = x0.mean(0)
    means, found = [centre], _spread(x0 - centre, 1, rank, "all")
    if per_prompt:
        owners = torch.arange(count) % prompts
        own = [x0[owners == k].mean(0) for k in range(prompts)]
        means += own
        found |= _spread(x0 - torch.stack(own)[owners], prompts, rank, "within")
    arrays: dict[str, NDArray[Any]] = {"means": torch.stack(means).float().cpu().numpy(), **found}
    metadata = described(problem, METHOD, count, arrays)
    metadata |= {"rank": rank, "per_prompt": per_prompt, "of": "runs" if data is None else "data"}
    return CalibrationTable(KIND, problem.fingerprint, arrays, metadata)


def _data(
    problem: Problem, count: int, data: Any, progress: Progress | None, resume: str | PathLike[str] | None
) -> Tensor:
    """x0 [n, ...]: given, or runs of the problem."""
    if data is not None:
        return data_of(problem, count, data)
    plan = problem.plan("unipc", 25)
    about = {
        "method": METHOD, "fingerprint": problem.fingerprint, "plan": plan.hash, "seed": problem.seed,
        "prompts": [str(prompt) for prompt in problem.prompts],
    }  # fmt: skip
    parts = []
    with Partial(resume, about) as work:
        for first in range(0, count, CHUNK):
            chunk = range(first, min(first + CHUNK, count))
            made = work.once(f"{first}-{chunk.stop}", partial(_run, problem, plan, chunk))
            parts.append(torch.from_numpy(made))
            if progress is not None:
                progress("pictures", chunk.stop, count)
    return torch.cat(parts)


def _run(problem: Problem, plan: Plan, samples: Sequence[int]) -> NDArray[Any]:
    return problem.run(plan, samples).cpu().numpy()


def _spread(offsets: Tensor, means: int, rank: int, name: str) -> dict[str, NDArray[Any]]:
    """Eigenpairs of the covariance of offsets [n, ...] from so many means, unbiased, and the mean of the others."""
    flat = offsets.reshape(len(offsets), -1)
    _, roots, vectors = torch.linalg.svd(flat, full_matrices=False)
    variances = roots**2 / (len(flat) - means)
    others = flat.shape[1] - rank
    rest = float(variances[rank:].sum()) / others if others else 0.0
    basis = vectors[:rank].reshape(rank, *offsets.shape[1:])
    return {
        f"basis.{name}": basis.float().cpu().numpy(),
        f"variances.{name}": variances[:rank].cpu().numpy(),
        f"rest.{name}": np.array([rest]),
    }
