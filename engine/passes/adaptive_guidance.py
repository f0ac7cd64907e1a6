"""Adaptive Guidance as plan data: rows may leave their unconditional branch out, as a guard on a cosine decides."""

from __future__ import annotations

from dataclasses import replace

from vivace.engine.passes.narrow import without
from vivace.engine.plan import Args, Guard, Plan
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_adaptive_guidance"
METRIC = "guidance_cosine"
THRESHOLD = 0.991


def apply_adaptive_guidance(plan: Plan, threshold: float = THRESHOLD, *, estimate: int = 0) -> Plan:
    """From the row on behind which cos(cond, uncond) > threshold: g = cond, and uncond is not evaluated.

    The cosine is that of the last row that ran both branches, over all elements of what the network returned (eps, v,
    x0 or flow, whatever it predicts). Each picture decides for itself, once and for all; a row whose pictures decide
    differently runs as two batches. A branch that does not run is read from the slot of cond, so that guidance of any
    scale gives cond. `freeze(plan, receipt.decisions)` makes the decisions static.

    Args:
        plan: guided, bound or not, with its caches already; without guards and without `apply_linear_ag`.
        threshold: gamma, unitless in (-1, 1]; 1 never fires and adds nothing.
        estimate: 0 as above. n >= 1: in a row that fires uncond = cond - (cond - uncond) of the last row that ran both,
            and after n such rows one runs both again. That is not in the paper.
    Returns: the plan with a guard on every row of both branches but the first; its recipe names this pass.
    Raises: ArgumentError; PlanError for a plan without guidance, with guards, or with estimated branches.
    Source: Castillo et al. 2023 (Adaptive Guidance), section 4; its threshold is 0.991 for eps of a latent model.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not -1.0 < threshold <= 1.0:
        raise ArgumentError(f"{NAME}: threshold {threshold!r:.40}; a cosine, -1 < threshold <= 1, is needed")
    if isinstance(estimate, bool) or not isinstance(estimate, int) or not 0 <= estimate <= 1000:
        raise ArgumentError(f"{NAME}: estimate {estimate!r:.40}; a number of rows, 0 to 1000, is needed")
    _check(plan)
    params = (float(estimate),) if estimate else ()
    steps, measured = [], False
    for step in plan.steps:
        variant = step.variant
        if variant is not None and "uncond" in variant.branches:
            if measured and threshold < 1.0:
                otherwise = without(plan, variant, "uncond")
                step = replace(step, guard=Guard(METRIC, "above", float(threshold), otherwise, params, not estimate))
            measured = True
        steps.append(step)
    recipe = plan.recipe
    if recipe is not None:
        args = {"threshold": float(threshold)} | ({"estimate": estimate} if estimate else {})
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of(args))))
    return verify(replace(plan, steps=tuple(steps), recipe=recipe))


def _check(plan: Plan) -> None:
    """Refuse plans whose unconditional branch cannot be left out."""
    if not any("uncond" in step.branches for step in plan.steps):
        raise PlanError(f"{NAME}: the plan has no unconditional branch; use apply_guidance first")
    for i, step in enumerate(plan.steps):
        if step.guard is not None:
            raise PlanError(f"{NAME}: step {i} has a guard already; a row has one, so start from the plan without")
    if plan.recipe is not None and any(name == "apply_linear_ag" for name, _ in plan.recipe.passes):
        raise PlanError(f"{NAME}: rows of the plan estimate uncond from earlier ones, which these would leave out")
