"""Runs of candidate plans, row by row, that can go on from any row of the run before.

A change of one row's numbers leaves the rows before it as they were, so a derivative costs the rows behind it only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vivace.engine.calibrate.problem import Problem
from vivace.engine.plan import Affine, Op, Plan, writes
from vivace.errors import PlanError

GIVEN = ("noise:0", "one")  # reserved slots that a candidate may read


class Rollout:
    """Samples of a problem through plans without guidance; the prediction they are handed is the guided one.

    rows: evaluations of the network so far, times samples.
    """

    def __init__(self, problem: Problem, samples: Sequence[int]) -> None:
        self.problem, self.samples = problem, tuple(samples)
        self.rows = 0
        self._noise = problem.noise(self.samples)
        self._kept: list[dict[str, Tensor]] = []

    def run(self, plan: Plan) -> Tensor:
        """Final latents [n, ...]; the slots before every row are kept."""
        slots = {"noise:0": self._noise, "one": torch.ones_like(self._noise)}
        for op in plan.init:
            _apply(op, slots)
        self._kept = []
        return self._rows(plan, 0, slots, keep=True)

    def rerun(self, plan: Plan, first: int) -> Tensor:
        """The same for a plan that differs from the one last `run` in rows from `first` on; nothing is kept."""
        return self._rows(plan, first, dict(self._kept[first]), keep=False)

    def _rows(self, plan: Plan, first: int, slots: dict[str, Tensor], keep: bool) -> Tensor:
        for step in plan.steps[first:]:
            if keep:
                self._kept.append(dict(slots))
            if step.variant is not None:
                fed = step.x_scale * slots[step.x]
                slots[step.outs[0]] = self.problem.predict(fed, step.timestep, self.samples)
                self.rows += len(self.samples)
            for op in step.ops:
                _apply(op, slots)
        return slots["x"]


def check_runnable(plan: Plan) -> None:
    """Raise PlanError unless plans like this one can be searched: numbers for coefficients, no transform, no noise."""
    for op in plan.ops():
        terms = op.terms if isinstance(op, Affine) else ()
        plain = all(isinstance(coef, float) and (slot in GIVEN or ":" not in slot) for slot, coef in terms)
        if not terms or not plain:
            raise PlanError(
                f"search: the update of {writes(op)!r} is not a sum of slots with plain numbers; search deterministic "
                "solvers without tables"
            )


def _apply(op: Op, slots: dict[str, Tensor]) -> None:
    assert isinstance(op, Affine)
    slots[op.dst] = weighted(op.terms, slots)


def weighted(terms: Sequence[tuple[str, object]], slots: Mapping[str, Tensor]) -> Tensor:
    """sum of coefficient * slot."""
    total: Tensor | None = None
    for slot, coef in terms:
        assert isinstance(coef, float)
        total = coef * slots[slot] if total is None else total + coef * slots[slot]
    assert total is not None
    return total
