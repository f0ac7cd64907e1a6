"""What candidates are judged by: distance to the converged latents of the same noise, and a user's metric if given.

The error of a sample is the root mean square of its final latent's difference, in units of the latent; a candidate's is
the mean over samples. Every candidate sees the same samples, so that differences of errors are differences of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.engine.calibrate.problem import Problem
from vivace.engine.noise_schedule import FloatArray
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.search.rollout import Rollout, check_runnable
from vivace.engine.search.spaces import Point, Space
from vivace.errors import ArgumentError

Metric = Callable[[Tensor], float]
CONVERGED = 200  # evaluations of the plan that stands for the solution
PARTS = (1, 2, 4)  # quarters of the samples that a candidate of the survey has been run on after every rung
RESIDUALS = 4096  # elements of a sample that the refinement looks at
WORST = 1e3  # error of a candidate that overflows or cannot be planned


class Objective:
    """Errors of the points of a space on samples of a problem.

    Args:
        reference: converged latents [n, ...] of the samples; None: of 200 evaluations of UniPC-3 on Karras's grid.
        metric: final latents [n, ...] of all samples -> a number, less is better; added with `weight`.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        samples: Sequence[int],
        *,
        reference: Tensor | None = None,
        metric: Metric | None = None,
        weight: float = 1.0,
    ) -> None:
        if len(samples) == 0:
            raise ArgumentError("search: no samples; give one or more")
        self.problem, self.space, self.samples = problem, space, tuple(samples)
        self.metric, self.weight = metric, weight
        found = converged(problem, samples) if reference is None else reference
        if tuple(found.shape) != (len(samples), *problem.shape):
            raise ArgumentError(
                f"search: reference {tuple(found.shape)}; {len(samples)} samples of {problem.shape} need their latents"
            )
        self.reference = found.to(problem.dtype)
        self._all = Rollout(problem, self.samples)
        edges = sorted({0, *(max(1, len(samples) * part // PARTS[-1]) for part in PARTS)})
        self._rungs = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        self._parts = [Rollout(problem, self.samples[rung]) for rung in self._rungs]
        count = self.reference[0].numel()
        chosen = np.random.default_rng(0).permutation(count)[:RESIDUALS]
        self._chosen, self._share = torch.from_numpy(np.sort(chosen)), count / len(chosen)

    @property
    def rungs(self) -> int:
        """Numbers that `climb` yields."""
        return len(self._rungs)

    @property
    def rows(self) -> int:
        """Evaluations of the network so far, a guided pair as one, times samples; without the reference's."""
        return self._all.rows + sum(part.rows for part in self._parts)

    def plan(self, point: Point) -> Plan:
        """The plan of a point, without guidance."""
        options = self.space.options(point)
        return make_plan(
            self.problem.schedule,
            self.space.solver,
            options.pop("steps"),
            prediction=self.problem.prediction,
            **options,
        )

    def check(self, point: Point) -> None:
        """Raise PlanError when the points of the space cannot be searched, ArgumentError when they are no plans."""
        check_runnable(self.plan(point))

    def climb(self, point: Point) -> Iterator[float]:
        """The error on more and more of the samples, the score on all of them last; stop asking and it stops."""
        plan = self.plan(point)
        found: list[Tensor] = []
        for rung, part in zip(self._rungs, self._parts, strict=True):
            found.append(part.run(plan))
            error = _mean(errors(torch.cat(found), self.reference[: rung.stop]))
            if rung.stop == len(self.samples) and self.metric is not None:
                error += self.weight * self._measured(torch.cat(found))
            yield error

    def score(self, point: Point) -> float:
        """Error and metric on all samples."""
        latents = self._all.run(self.plan(point))
        error = _mean(errors(latents, self.reference))
        return error if self.metric is None else error + self.weight * self._measured(latents)

    def residuals(self, point: Point, first: int | None = None) -> FloatArray:
        """r with r . r = the error, float64: every sample's difference over the root of its own length.

        first: the point differs from the one asked for without it in rows from `first` on.
        """
        plan = self.plan(point)
        latents = self._all.run(plan) if first is None else self._all.rerun(plan, first)
        gap = (latents - self.reference).flatten(1).double()
        length = (gap**2).mean(1, keepdim=True).sqrt()
        scale = (self._share / (gap.shape[1] * len(gap) * length.clamp_min(1e-30))).sqrt()
        values: FloatArray = (gap[:, self._chosen] * scale).ravel().cpu().numpy()
        return np.nan_to_num(values, nan=WORST, posinf=WORST, neginf=-WORST)

    def _measured(self, latents: Tensor) -> float:
        assert self.metric is not None
        value = float(self.metric(latents))
        return value if np.isfinite(value) else WORST


def converged(problem: Problem, samples: Sequence[int], evaluations: int = CONVERGED) -> Tensor:
    """Latents [n, ...] that samples reach with evaluations to spare: UniPC of order 3 on Karras's grid."""
    return problem.run(problem.plan("unipc", evaluations, order=3, grid="karras"), samples)


def errors(latents: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference of every sample, float64 [n]."""
    gap = (latents - reference).flatten(1).double()
    return (gap**2).mean(1).sqrt()


def _mean(values: Any) -> float:
    mean = float(values.mean())
    return min(mean, WORST) if np.isfinite(mean) else WORST
