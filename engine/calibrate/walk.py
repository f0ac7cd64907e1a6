"""Rows run one op at a time on plain tensors, so that a calibrator may look between rows and try a row twice.

A walk runs the rows of a deterministic solver, without guidance ops: the problem's prediction is guided already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace import __version__
from vivace.engine.calibrate.packing import pack
from vivace.engine.calibrate.problem import Problem
from vivace.engine.plan import Affine, Op, Plan, Step, reads, writes
from vivace.engine.planning import make_plan
from vivace.engine.solvers.quadrature import lagrange_weights
from vivace.engine.solvers.rows import Level, start_from_noise
from vivace.engine.timesteps import Grid, numbers
from vivace.errors import ArgumentError

Progress = Callable[[str, int, int], None]  # (what, done, in all)
EVALUATIONS = 200  # of a converged trajectory


class Walk:
    """Slots [n, ...] by name of `samples` on their way through a plan's rows.

    init: fills the first slots; or x, the first state.
    """

    def __init__(
        self, problem: Problem, samples: Sequence[int], init: Sequence[Affine] = (), x: Tensor | None = None
    ) -> None:
        self.problem, self.samples = problem, tuple(samples)
        self.slots: dict[str, Tensor] = {}
        if x is not None:
            self.slots["x"] = x
        else:
            self.slots["noise:0"] = problem.noise(self.samples)
            self.apply(init)
            del self.slots["noise:0"]

    @classmethod
    def on(cls, problem: Problem, samples: Sequence[int], grid: Grid) -> Walk:
        """At the start of a grid's first row, as `make_plan` starts."""
        scale = grid.sigmas[0] if problem.schedule.kind == "edm" else 1.0
        return cls(problem, samples, start_from_noise(scale))

    @property
    def x(self) -> Tensor:
        """The state."""
        return self.slots["x"]

    def predict(self, step: Step, timestep: float | None = None) -> Tensor:
        """The guided prediction of a row, here or fed another timestep."""
        fed = step.timestep if timestep is None else timestep
        return self.problem.predict(step.x_scale * self.slots[step.x], fed, self.samples)

    def evaluate(self, step: Step) -> None:
        """Fill the row's out slot."""
        (out,) = step.outs
        self.slots[out] = self.predict(step)

    def tried(self, ops: Sequence[Op], changes: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The slots after `ops`, with `changes` before; the walk stays where it is."""
        slots = {**self.slots, **(changes or {})}
        for op in ops:
            slots[writes(op)] = _summed(op, slots)
        return slots

    def apply(self, ops: Sequence[Op]) -> None:
        """Run ops."""
        self.slots = self.tried(ops)


def _summed(op: Op, slots: Mapping[str, Tensor]) -> Tensor:
    """The sum of an op. Raises ArgumentError for what a walk has no numbers for."""
    if not isinstance(op, Affine) or any(not isinstance(coef, float) for _, coef in op.terms):
        raise ArgumentError(
            f"calibrate: rows with {type(op).__name__} of {writes(op)!r} cannot be walked; numbers only"
        )
    if fresh := [slot for slot in reads(op) if slot.startswith("noise:") and slot not in slots]:
        raise ArgumentError(f"calibrate: rows draw fresh noise ({fresh[0]}); use a deterministic solver")
    total: Tensor | None = None
    for slot, coef in op.terms:
        assert isinstance(coef, float)
        part = coef * slots[slot]
        total = part if total is None else total + part
    assert total is not None
    return total


def unguided(problem: Problem, solver: str, steps: int, **options: Any) -> Plan:
    """`make_plan` for a problem without guidance ops, to be walked. Raises what it raises."""
    return make_plan(problem.schedule, solver, steps, prediction=problem.prediction, **options)


def converged_states(
    problem: Problem,
    levels: Sequence[Level],
    samples: Sequence[int],
    *,
    evaluations: int = EVALUATIONS,
    progress: Progress | None = None,
) -> list[Tensor]:
    """States [n, ...] of a converged run at given levels, each between its start and its end.

    The run is UniPC-3 on Karras's grid. Between two of its rows the state is the row's, moved on by the integral of x0
    through the values at three of them, in lam.
    """
    if evaluations < 4:
        raise ArgumentError(f"calibrate: a converged run of {evaluations} evaluations; 4 or more are needed")
    plan = unguided(problem, "unipc", evaluations, grid="karras", order=3)
    walk = Walk(problem, samples, plan.init)
    lams = [_lam(level) for level in levels]
    found: dict[int, Tensor] = {}
    known: list[tuple[Level, Tensor]] = []  # last (level, x0)
    before: tuple[Level, Tensor] | None = None  # last (level, x)
    for number, step in enumerate(plan.steps):
        walk.evaluate(step)
        level = (step.alpha, step.sigma)
        kept = step.ops[0]
        assert isinstance(kept, Affine)
        known = [(level, walk.tried([kept])[kept.dst]), *known[:2]]
        due = [n for n, lam in enumerate(lams) if n not in found and lam <= step.lam]
        for n in due:
            found[n] = walk.x if before is None or lams[n] == step.lam else _between(before, known, levels[n])
        before = (level, walk.x)
        walk.apply(step.ops)
        if progress is not None:
            progress("converged run", number + 1, evaluations)
    assert before is not None
    for n in range(len(levels)):
        if n not in found:
            found[n] = walk.x if levels[n][1] == 0.0 else _between(before, known, levels[n])
    return [found[n] for n in range(len(levels))]


def _between(before: tuple[Level, Tensor], known: Sequence[tuple[Level, Tensor]], level: Level) -> Tensor:
    """The state at `level` from the one before and the values around; from pure noise, with the first of them only."""
    start, x = before
    if start[0] == 0.0:
        keep = level[1] / start[1]
        return keep * x + (level[0] - keep * start[0]) * known[0][1]
    usable = [(at, value) for at, value in known if at[0] > 0.0]
    usable.sort(key=lambda pair: abs(_lam(pair[0]) - _lam(start)))  # the step's start first
    keep, weights = lagrange_weights("x0", "lam", [at for at, _ in usable], level)
    total = keep * x
    for weight, (_, value) in zip(weights, usable, strict=True):
        total = total + weight * value
    return total


def _lam(level: Level) -> float:
    if level[1] == 0.0:
        return math.inf
    return -math.inf if level[0] == 0.0 else math.log(level[0] / level[1])


def mean_square(difference: Tensor) -> float:
    """Mean square over all elements, summed in float64."""
    return float(difference.double().square().mean())


def golden(objective: Callable[[float], float], low: float, high: float, start: float, evaluations: int) -> float:
    """The place of the smallest value found: at `start`, the ends and half way, then golden sections around the best.

    Never worse than `start`. Deterministic; about `evaluations` calls.
    """
    tried: dict[float, float] = {}

    def value(at: float) -> float:
        if at not in tried:
            tried[at] = objective(at)
        return tried[at]

    for at in (start, low, 0.5 * (low + start), 0.5 * (start + high), high):
        value(at)
    points = sorted(tried)
    best = min(points, key=value)
    number = points.index(best)
    left, right = points[max(0, number - 1)], points[min(len(points) - 1, number + 1)]
    ratio = 0.5 * (math.sqrt(5.0) - 1.0)
    while len(tried) + 1 < evaluations and right - left > 1e-6:
        inner, outer = right - ratio * (right - left), left + ratio * (right - left)
        if value(inner) <= value(outer):
            right = outer
        else:
            left = inner
    return min(sorted(tried), key=lambda at: (value(at), abs(at - start)))


def described(problem: Problem, method: str, samples: int, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """What the metadata of every table of fitted numbers says of model and samples; prompts' tensors go to `arrays`."""
    return {
        "method": method,
        "latent_shape": list(problem.shape),
        "schedule": problem.schedule.describe().to_dict(),
        "prediction": problem.prediction,
        "guidance": problem.guidance,
        "prompts": pack(list(problem.prompts), "prompts", arrays),
        "seed": problem.seed,
        "samples": samples,
        "versions": {"vivace": __version__, "torch": str(torch.__version__), "numpy": np.__version__},
    }


def places_of(what: str, grid: str | None, timesteps: Sequence[float] | None, final: str) -> dict[str, Any]:
    """Arguments of `make_grid` as JSON data. Raises ArgumentError."""
    if grid is not None and timesteps is not None:
        raise ArgumentError(f"{what}: give grid or timesteps, not both")
    if timesteps is not None:
        return {"timesteps": numbers(timesteps, f"{what}: timesteps").tolist(), "final": final}
    return {"final": final} if grid is None else {"grid": grid, "final": final}


def require_count(what: str, value: object, least: int = 1) -> int:
    """An integer of at least `least`. Raises ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{what} must be an integer of at least {least}, got {value!r}")
    return value
