"""Perturbed-attention guidance as plan data: a branch whose attention maps are the identity in some blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from vivace.engine.bind import normal_form
from vivace.engine.passes.guidance import rename
from vivace.engine.passes.rules import absolute
from vivace.engine.plan import Action, Affine, Args, InputRef, Op, Plan, Rule, Step, writes
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_perturbed_attention"
INPUT = "perturbed_scale"


def apply_perturbed_attention(
    plan: Plan, scale: float = 3.0, *, blocks: Sequence[int], interval: tuple[float, float] = (0.0, 1.0)
) -> Plan:
    """g <- g + scale (cond - perturbed), g = cond in rows without guidance; the solver's history holds g.

    The branch "perturbed" is cond with the identity in place of the self-attention maps of `blocks`: structure is lost
    there, so that the difference points towards more of it. It needs no unconditional branch, and goes with one.

    Args:
        plan: guided or not, bound or not; without caches, tokens and guards.
        scale: unitless; a default that each request may override (input `perturbed_scale`).
        blocks: half-open range (first, last); of an unbound plan negative numbers count from the end and a last of 0
            is the end. Which blocks matters more than the scale, and no choice fits all models.
        interval: (a, b) as in `apply_guidance`: rows i of n evaluations with int(a*n) <= i < int(b*n).
    Returns: the plan with a branch and two Affines more in such rows; its recipe names this pass.
    Raises: ArgumentError; PlanError for a plan that has the branch already, or with caches or guards.
    Source: Ahn et al. 2024 (Perturbed-Attention Guidance), eq. 13 and 15.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ArgumentError(f"{NAME}: scale {scale!r:.40}; a finite number is needed")
    if not isinstance(blocks, (tuple, list)) or len(blocks) != 2 or any(type(block) is not int for block in blocks):
        raise ArgumentError(f"{NAME}: blocks {blocks!r:.60}; a pair of integers (first, last) is needed")
    low, high = interval
    if not 0.0 <= low < high <= 1.0:
        raise ArgumentError(f"{NAME}: interval {interval}; need 0 <= a < b <= 1 (0 = noise end)")
    where = absolute(plan, (blocks[0], blocks[1]), NAME, "attn")
    first, last = int(low * plan.nfe), int(high * plan.nfe)
    steps, evaluation = [], 0
    for i, step in enumerate(plan.steps):
        if step.variant is not None:
            _check(i, step)
            if first <= evaluation < last:
                step = _perturbed(plan, step, float(scale), where)
            evaluation += 1
        steps.append(step)
    recipe = plan.recipe
    if recipe is not None:
        args = {"scale": float(scale), "blocks": tuple(blocks), "interval": (float(low), float(high))}
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of(args))))
    return verify(replace(plan, steps=tuple(steps), recipe=recipe))


def _check(row: int, step: Step) -> None:
    """Raise PlanError for a row that has the branch, or something that comes behind it."""
    assert step.variant is not None, "the row evaluates"
    if "perturbed" in step.branches:
        raise PlanError(f"{NAME}: step {row} has a perturbed branch already; start from the plan without")
    if step.guard is not None or any(rule.action is not None for rule in step.variant.rules):
        raise PlanError(f"{NAME}: step {row} has a guard or caches; guidance comes before both")


def _perturbed(plan: Plan, step: Step, scale: float, blocks: tuple[int, int]) -> Step:
    variant, branches = step.variant, (*step.branches, "perturbed")
    assert variant is not None
    ops, outs = step.ops, step.outs
    combined = next((i for i, op in enumerate(ops) if writes(op) == "g"), None)
    if combined is None:  # no guidance in this row
        (out,) = outs
        ops, outs, base, at = tuple(rename(op, {out: "g"}) for op in ops), ("cond",), "cond", 0
    else:
        base, at = "g", combined + 1
    away: tuple[Op, ...] = (
        Affine("p", (("cond", 1.0), ("perturbed", -1.0))),
        Affine("g", ((base, 1.0), ("p", InputRef(INPUT, scale)))),
    )
    rules = (*variant.rules, Rule(blocks, "attn", ("perturbed",), Action.IDENTITY))
    made = replace(variant, branches=branches, rules=rules)
    if plan.binding is not None:
        made = replace(made, rules=normal_form(rules, branches))
    return replace(step, variant=made, outs=(*outs, "perturbed"), ops=(*ops[:at], *away, *ops[at:]))
