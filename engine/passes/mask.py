"""Editing a region as plan data: inside of a mask the plan's own picture, outside the start picture at every level."""

from __future__ import annotations

from dataclasses import replace

from vivace.engine.plan import Affine, Args, Coef, InputRef, Plan, writes
from vivace.engine.verify import verify
from vivace.errors import PlanError

NAME = "apply_mask"
HOLD = "hold"  # slot of the start picture at the level of x


def apply_mask(plan: Plan) -> Plan:
    """x <- mask x + (1 - mask) (alpha start + sigma noise:0) behind every row that writes x, at its new level.

    Behind the last row alpha = 1 and sigma = 0: where the mask is 0 the result has the bits of `input:start`. The mask
    may be anything between 0 and 1. With `apply_tokens(selector="mask")` tokens outside are not computed either.

    Args:
        plan: bound or not, a tail or not; its requests give `image` (input `start`) and `mask`, 1 = edit.
    Returns: the plan with two ops more in such rows; its recipe names this pass.
    Raises: PlanError for a plan that has a mask already.
    Source: Lugmayr et al. 2022 (RePaint), algorithm 1 without resampling, with one draw of noise for all levels.
    """
    if any(writes(op) == HOLD for op in plan.ops()):
        raise PlanError(f"{NAME}: the plan has a mask already; start from the plan without")
    steps = []
    for i, step in enumerate(plan.steps):
        if any(writes(op) == "x" for op in step.ops):
            alpha, sigma = _level_after(plan, i)
            levels = (("input:start", alpha), ("noise:0", sigma))
            terms: tuple[tuple[str, Coef], ...] = tuple((slot, coef) for slot, coef in levels if coef)
            mixed = Affine("x", ((HOLD, 1.0), (f"{HOLD}_d", InputRef("mask"))))
            apart = Affine(f"{HOLD}_d", (("x", 1.0), (HOLD, -1.0)))
            step = replace(step, ops=(*step.ops, Affine(HOLD, terms), apart, mixed))
        steps.append(step)
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args())))
    return verify(replace(plan, steps=tuple(steps), recipe=recipe))


def _level_after(plan: Plan, row: int) -> tuple[float, float]:
    """(alpha, sigma) of slot x behind a row: that of the next row that reads it, at the end no noise."""
    following = (step for step in plan.steps[row + 1 :] if step.x == "x" or step.variant is None)
    return next(((step.alpha, step.sigma) for step in following), (1.0, 0.0))
