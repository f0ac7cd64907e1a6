"""Run-time caches as plan data: a row with a guard has two variants known beforehand, one that gives blocks again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vivace.engine.bind import normal_form
from vivace.engine.caching import READS
from vivace.engine.passes.rules import absolute
from vivace.engine.plan import Action, Args, Guard, Plan, Rule, Step, Variant
from vivace.engine.planners import make_guarded
from vivace.engine.planners.base import required
from vivace.engine.planners.guarded import Guarded, Test
from vivace.engine.planners.tables import check_measured
from vivace.engine.verify import STORES, check_conflicts, verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_guards"
SITE = "residual"


def apply_guards(
    plan: Plan,
    guards: Guarded | str,
    *,
    store: str | None = None,
    measured: Mapping[str, Any] | None = None,
    allowed: Sequence[int] | None = None,
    **arguments: Any,
) -> Plan:
    """A guard on every evaluation that may give its blocks' residual again: what it measures decides at run time.

    The row's own variant computes and keeps the residual of the blocks, the guard's `otherwise` gives it again. Both
    are known, and compiled, beforehand. Each picture decides for itself, all its branches together.

    Args:
        plan: bound or not, with everything else that it shall have; without guards and without caches.
        guards: an object of `vivace.planners`, or its name with its arguments ("first_block_cache", threshold=0.08).
        store: dtype that residuals are kept in, as in `apply_block_cache`.
        measured: fingerprint and latent_shape that the coefficients belong to; default: those of the table.
        allowed: evaluations that may be given again, in place of those that `guards` allows.
    Returns: the plan with guards and a recipe that names this pass; a threshold of 0 adds nothing.
    Raises: ArgumentError; ModelError for a table of another model or shape; PlanError for a plan with guards or caches.
    Source: each method of `vivace.planners` names its own.
    """
    made = make_guarded(guards, arguments)
    if store is not None and store not in STORES:
        raise ArgumentError(f"{NAME}: store {store!r:.40}; use one of {', '.join(STORES)}")
    for i, step in enumerate(plan.steps):
        rules = () if step.variant is None else step.variant.rules
        if step.guard is not None or any(rule.action in READS for rule in rules):
            raise PlanError(f"{NAME}: step {i} has a guard or reuses blocks already; start from the plan without")
    origin = made.measured() if measured is None else dict(measured)
    if origin is not None:
        check_measured(type(made).__name__, origin, plan)
    test = made.test(plan)
    recorded = {"guards": type(made).__name__, **made.arguments(), "store": store}
    if allowed is not None:
        test = replace(test, allowed=frozenset(allowed) - required(plan))
        recorded["allowed"] = list(allowed)
    if origin is not None:
        recorded["measured"] = origin
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of(recorded))))
    return verify(replace(plan, steps=_guarded(plan, test, store), recipe=recipe))


def cut_guards(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for the run without its first evaluations: the others are guarded as in the full run."""
    values = args.to_dict()
    pass_own = {name: values.pop(name) for name in ("store", "measured") if name in values}
    listed = values.pop("allowed", None)
    name = values.pop("guards")
    allowed = make_guarded(name, values).test(full).allowed if listed is None else listed
    return Args.of({"guards": name, **values, **pass_own, "allowed": sorted(i - first for i in allowed if i > first)})


def _guarded(plan: Plan, test: Test, store: str | None) -> tuple[Step, ...]:
    """Rows with guards. An evaluation keeps while a later one of its model may give it again."""
    blocks = absolute(plan, test.blocks, NAME)
    keep = Rule(blocks, SITE, action=Action.COMPUTE, store=store)
    reuse = Rule(blocks, SITE, action=Action.REUSE)
    last = max(test.allowed, default=-1)
    steps, number = [], 0
    for row, step in enumerate(plan.steps):
        if step.variant is not None:
            own = step.variant
            if number < last:
                own = ruled(plan, row, own, keep)
            if number in test.allowed:
                otherwise = ruled(plan, row, step.variant, reuse)
                guard = Guard(test.metric, test.rule, test.threshold, otherwise, test.params)
                step = replace(step, guard=guard)
            step = replace(step, variant=own)
            number += 1
        steps.append(step)
    return tuple(steps)


def ruled(plan: Plan, row: int, variant: Variant, rule: Rule) -> Variant:
    """A variant with one rule more, in the plan's normal form."""
    made = replace(variant, rules=(*variant.rules, rule))
    if plan.binding is None:
        return made
    check_conflicts(f"{NAME}: step {row}", made)
    return replace(made, rules=normal_form(made.rules, made.branches))
