"""A guarded plan made static: every guard decided once, by what it decided in recorded runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vivace.engine.bind import normal_form
from vivace.engine.passes.narrow import narrowed
from vivace.engine.plan import Action, Args, Plan, Rule, Step, Variant
from vivace.engine.verify import HEARD, verify
from vivace.errors import ArgumentError, PlanError

NAME = "freeze"


def freeze(plan: Plan, traces: Any) -> Plan:
    """variant(row) = the guard's where most of the recorded decisions fired, the row's own elsewhere.

    Args:
        plan: a plan with guards, bound or not.
        traces: what one run decided, or a list of several: `Receipt.decisions`, or row -> fired (for all pictures, or
            one a picture). Every picture's decision counts once; a tie computes, and so does a row nobody decided.
    Returns: the plan without guards, whose rows are those of a static cache; its recipe names this pass.
    Raises: ArgumentError for traces of another plan; PlanError for a plan without guards.
    """
    guarded = {row for row, step in enumerate(plan.steps) if step.guard is not None}
    if not guarded:
        raise PlanError(f"{NAME}: the plan has no guards; there is nothing to decide")
    fired = _majority(traces, guarded)
    estimating = [
        row for row in sorted(fired) if (guard := plan.steps[row].guard) and guard.metric == HEARD and guard.params
    ]
    if estimating:
        raise PlanError(
            f"{NAME}: rows {estimating} estimate their unconditional branch; what is static is "
            "apply_linear_ag(plan without guards, rows=[...]) with the evaluations of these rows"
        )
    steps = [_decided(step, row in fired) for row, step in enumerate(plan.steps)]
    recipe = plan.recipe
    if recipe is not None:
        decided = {str(row): row in fired for row in sorted(guarded)}
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of({"traces": decided}))))
    return verify(replace(plan, steps=_unread_dropped(plan, steps), recipe=recipe))


def cut_decisions(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for the run without its first evaluations: guards of rows that now compute are not decided.

    first: below 0 where the run has more evaluations than the full one, whose first steps are in closed form.
    """
    evaluated = [row for row, step in enumerate(full.steps) if step.variant is not None]
    cut = evaluated[max(first, 0)] + min(first, 0)  # rows before the first one left
    decided = args.to_dict()["traces"]
    return Args.of({"traces": {str(int(row) - cut): value for row, value in decided.items() if int(row) > cut}})


def _majority(traces: Any, guarded: set[int]) -> set[int]:
    """Rows where more decisions fired than not."""
    votes = dict.fromkeys(guarded, 0)
    for name, decided in _pairs(traces):
        row = int(name) if str(name).isdigit() else -1
        if row not in guarded:
            raise ArgumentError(
                f"{NAME}: traces decide row {name}, where the plan has no guard; they are of another plan"
            )
        for value in _each(decided):
            votes[row] += 1 if value else -1
    return {row for row, balance in votes.items() if balance > 0}


def _pairs(traces: Any) -> list[tuple[Any, Any]]:
    """(row, decided) of everything that traces hold. Raises ArgumentError."""
    if isinstance(traces, Mapping):
        return list(traces.items())
    if hasattr(traces, "row") and hasattr(traces, "fired"):
        return [(traces.row, traces.fired)]
    if isinstance(traces, Sequence) and not isinstance(traces, str):
        return [pair for trace in traces for pair in _pairs(trace)]
    raise ArgumentError(f"{NAME}: traces {traces!r:.60}; `Receipt.decisions` of some runs, or row -> fired, is needed")


def _each(decided: Any) -> Iterable[bool]:
    """The decisions of a row, one a picture. Raises ArgumentError."""
    values = list(decided) if isinstance(decided, Iterable) else [decided]
    for value in values:
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise ArgumentError(f"{NAME}: decision {value!r:.40}; True (fired) or False is needed")
    return values


def _decided(step: Step, fired: bool) -> Step:
    if step.guard is None:
        return step
    return narrowed(step, step.guard.otherwise) if fired else replace(step, guard=None)


def _unread_dropped(plan: Plan, steps: list[Step]) -> tuple[Step, ...]:
    """Rows without the rules of guards that keep what no row reads before it is kept anew."""
    mine = _kept_for_guards(plan)
    out, wanted = [], False
    for step in reversed(steps):
        variant = step.variant
        if variant is not None:
            reads = any(rule.action == Action.REUSE and rule.site == "residual" for rule in variant.rules)
            if not reads and not wanted:
                step = replace(step, variant=_without(plan, variant, mine))
            wanted = reads or (wanted and not _keeps(variant, mine))
        out.append(step)
    return tuple(reversed(out))


def _kept_for_guards(plan: Plan) -> frozenset[tuple[int, int]]:
    """Ranges whose residual guards give again."""
    guards = [step.guard for step in plan.steps if step.guard is not None]
    rules = [rule for guard in guards for rule in guard.otherwise.rules]
    return frozenset(rule.blocks for rule in rules if rule.action == Action.REUSE and rule.site == "residual")


def _keeps(variant: Variant, mine: frozenset[tuple[int, int]]) -> bool:
    return any(_is_mine(rule, mine) for rule in variant.rules)


def _is_mine(rule: Rule, mine: frozenset[tuple[int, int]]) -> bool:
    return rule.action == Action.COMPUTE and rule.site == "residual" and rule.blocks in mine


def _without(plan: Plan, variant: Variant, mine: frozenset[tuple[int, int]]) -> Variant:
    rules = tuple(rule for rule in variant.rules if not _is_mine(rule, mine))
    return replace(variant, rules=rules if plan.binding is None else normal_form(rules, variant.branches))
