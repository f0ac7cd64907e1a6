"""Noised data at any log-SNR: what statistics of a model over its own trajectories are measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.walk import require_count
from vivace.engine.noise import normals
from vivace.engine.prediction import to_x0
from vivace.errors import ShapeError

DRAW_NOISE, DRAW_PROBE = 1, 2  # draws of the problem's seed; 0 starts its runs
DATA_STEPS = 25  # evaluations of the runs that stand for data


@dataclass(frozen=True, slots=True)
class Level:
    """alpha, sigma and the timestep fed, at a log-SNR."""

    lam: float
    alpha: float
    sigma: float
    timestep: float


@dataclass(frozen=True)
class Noised:
    """x = alpha x0 + sigma z over samples 0 .. n - 1 of a problem; z and the probe are fixed, whatever the level.

    data: x0 [n, ...]: given, or the problem's own runs (`data_of`).
    """

    problem: Problem
    data: Tensor

    @property
    def samples(self) -> range:
        """Their numbers."""
        return range(len(self.data))

    @cached_property
    def noise(self) -> Tensor:
        """z [n, ...]."""
        return self._draw(DRAW_NOISE)

    @cached_property
    def probe(self) -> Tensor:
        """Signs [n, ...], 1 or -1 with equal chance."""
        return torch.where(self._draw(DRAW_PROBE) < 0.0, -1.0, 1.0).to(self.data.dtype)

    def _draw(self, draw: int) -> Tensor:
        drawn = [normals(self.problem.shape, self.problem.seed, picture=j, draw=draw) for j in self.samples]
        return torch.from_numpy(np.stack(drawn)).to(self.data.device, self.data.dtype)

    def level(self, lam: float) -> Level:
        """The level at a log-SNR within the trained range (beyond it: the range's end)."""
        schedule = self.problem.schedule
        low, high = span_of(self.problem)
        lam = min(max(lam, low), high)
        t = schedule.t_of_lam(lam)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Level(math.log(alpha / sigma), alpha, sigma, schedule.timestep(t))

    def states(self, at: Level, part: slice) -> Tensor:
        """x of some samples."""
        return at.alpha * self.data[part] + at.sigma * self.noise[part]

    def x0(self, x: Tensor, at: Level, part: slice) -> Tensor:
        """The guided prediction at x as x0."""
        p, q = to_x0(self.problem.prediction, at.alpha, at.sigma)
        return p * x + q * self.problem.predict(x, at.timestep, self.samples[part])


def span_of(problem: Problem) -> tuple[float, float]:
    """(lowest, highest) finite log-SNR of the trained range."""
    schedule = problem.schedule
    return schedule.lam(schedule.finite_end), schedule.lam(schedule.data_end)


def data_of(problem: Problem, samples: int, data: Any = None) -> Tensor:
    """x0 [samples, ...]: `data` where given, else final latents of the problem's own runs, guided as it is.

    Raises: ArgumentError, ShapeError.
    """
    require_count("calibrate: samples", samples, 2)
    if data is None:
        return problem.run(problem.plan("unipc", DATA_STEPS), range(samples))
    x0 = torch.as_tensor(data)
    if x0.shape != (samples, *problem.shape):
        raise ShapeError(
            f"calibrate: data has shape {tuple(x0.shape)}; {samples} samples of this model are "
            f"{(samples, *problem.shape)}, sample j with prompt j mod {len(problem.prompts)}"
        )
    return x0.to(problem.session.pool.device, problem.dtype)


def told_of(data: Any) -> str:
    """What a description says of data: SHA-256 of its bytes, or that the model's own runs stand for it."""
    return (
        "own runs" if data is None else sha256(torch.as_tensor(data).cpu().contiguous().numpy().tobytes()).hexdigest()
    )


def parts_of(count: int, size: int) -> Sequence[slice]:
    """Slices of at most `size` samples."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
