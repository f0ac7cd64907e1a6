"""Two-expert pipelines as plan data: late rows name another model."""

from __future__ import annotations

import math
from dataclasses import replace

from vivace.engine.plan import Affine, Args, Coef, InputRef, Op, Plan, Step
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError


def apply_experts(plan: Plan, below: float, *, model: str = "transformer_2") -> Plan:
    """Rows whose timestep is below `below` evaluate `model`; the others keep the first one.

    Their guidance scale is an input of its own, `guidance_scale_2`, with the plan's scale as default.

    Args:
        below: timestep, in the units the network is fed (boundary ratio times training steps); finite, positive.
        model: name of the second network, as the pipeline's component is called.
    Returns: the plan with its `model` column filled; its recipe names this pass.
    Raises: ArgumentError; PlanError for a plan that names two models already.
    Source: Wan 2.2 (Wan team 2025), mixture of experts by noise level.
    """
    if not math.isfinite(below) or below <= 0.0:
        raise ArgumentError(f"apply_experts: below={below}; need a positive timestep")
    if not model or model == "main":
        raise ArgumentError(f"apply_experts: model {model!r}; need the name of the second network")
    if any(variant.model != "main" for variant in plan.variants):
        raise PlanError("apply_experts: the plan names two models already; start from the plan without")
    steps = tuple(_second(step, model) if step.timestep < below else step for step in plan.steps)
    recipe = plan.recipe
    if recipe is not None:
        args = Args.of({"below": float(below), "model": model})
        recipe = replace(recipe, passes=(*recipe.passes, ("apply_experts", args)))
    return verify(replace(plan, steps=steps, recipe=recipe))


def _second(step: Step, model: str) -> Step:
    if step.variant is None:
        return step
    guard = step.guard
    if guard is not None:
        guard = replace(guard, otherwise=replace(guard.otherwise, model=model))
    variant, ops = replace(step.variant, model=model), tuple(_own_scale(op) for op in step.ops)
    return replace(step, variant=variant, guard=guard, ops=ops)


def _own_scale(op: Op) -> Op:
    return replace(op, terms=tuple((slot, _second_scale(c)) for slot, c in op.terms)) if isinstance(op, Affine) else op


def _second_scale(coef: Coef) -> Coef:
    guided = isinstance(coef, InputRef) and coef.name == "guidance_scale"
    return replace(coef, name="guidance_scale_2") if guided and isinstance(coef, InputRef) else coef
