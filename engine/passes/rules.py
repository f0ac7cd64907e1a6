"""Rules added to the rows of a plan that evaluate the network; rows without an evaluation are no calls of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vivace.engine.bind import normal_form
from vivace.engine.plan import Args, Plan, Rule, Variant
from vivace.engine.verify import check_conflicts, verify
from vivace.errors import ArgumentError


def evaluations(plan: Plan) -> Iterator[tuple[int, Variant]]:
    """(row, variant) of the rows that evaluate the network."""
    return ((i, step.variant) for i, step in enumerate(plan.steps) if step.variant is not None)


def span(plan: Plan, first: int, last: int) -> tuple[int, int]:
    """The range of all blocks but the first `first` and the last `last`. Raises ArgumentError when none is left."""
    if plan.binding is None:
        return first, -last
    if first + last >= plan.binding.blocks:
        raise ArgumentError(f"blocks: first {first} and last {last} leave none of the model's {plan.binding.blocks}")
    return first, plan.binding.blocks - last


def absolute(plan: Plan, blocks: tuple[int, int], name: str, site: str = "block") -> tuple[int, int]:
    """The range as the plan's rules on `site` write it: of a bound plan in absolute numbers. Raises ArgumentError."""
    if plan.binding is None:
        return blocks
    count, what = (plan.binding.layers, "layers") if site == "layer" else (plan.binding.blocks, "blocks")
    first, last = blocks[0] + count * (blocks[0] < 0), blocks[1] + count * (blocks[1] <= 0)
    if not 0 <= first < last <= count:
        raise ArgumentError(f"{name}: {what} {blocks} are none of the model's {count}; (0, 0) is all")
    return first, last


def with_rules(
    plan: Plan,
    rules: Sequence[tuple[Rule, ...]],
    name: str,
    arguments: dict[str, Any],
    forecast: Sequence[tuple[float, ...]] | None = None,
) -> Plan:
    """The plan with `rules[k]` added to evaluation k, recorded in the recipe as pass `name`, verified.

    forecast: of every evaluation the weights that its FORECAST rules read; None leaves them.
    """
    added, weights = iter(rules), iter(forecast or ())
    steps = []
    for i, step in enumerate(plan.steps):
        if step.variant is not None:
            variant = replace(step.variant, rules=(*step.variant.rules, *next(added)))
            if plan.binding is not None:  # what is bound stays in normal form, which shows no conflicts
                check_conflicts(f"{name}: step {i}", variant)
                variant = replace(variant, rules=normal_form(variant.rules, variant.branches))
            step = replace(step, variant=variant, forecast=next(weights, step.forecast))
        steps.append(step)
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (name, Args.of(arguments))))
    return verify(replace(plan, steps=tuple(steps), recipe=recipe))
