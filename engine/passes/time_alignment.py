"""Time alignment: the network is fed another timestep than the row's level says; no coefficient changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vivace.engine import tables
from vivace.engine.plan import Args, Plan
from vivace.engine.planners.tables import check_measured
from vivace.engine.solvers.fitted import Table, same_times
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_time_alignment"
METHOD = "time_alignment"


def apply_time_alignment(
    plan: Plan,
    table: Any = None,
    *,
    ratios: Sequence[float] | None = None,
    first: int = 0,
) -> Plan:
    """Evaluation i is fed r_i times its timestep; levels, coefficients and the number of evaluations stay.

    After a few large steps a state is not quite at the level its row is for; the network is better asked about the
    level where the state is. All r_i 1: the plan itself, but for its recipe.

    Args:
        plan: with its solver's rows; made with the solver, options and grid that the table was measured with.
        table: of `calibrate_time_alignment`, a file or an object; the plan then fits the model it was measured on only.
        ratios: r of every evaluation, positive and finite, instead of a table.
        first: evaluations of the table or list that the plan lacks at its start (a tail's).
    Returns: the plan; its recipe names this pass.
    Raises: ArgumentError; PlanError for a plan that is aligned already; ModelError for a table of another method.
    Source: Xia et al. 2023 (TimeTuner), section 3.2.
    """
    if (table is None) == (ratios is None):
        raise ArgumentError(f"{NAME}: give a table, or ratios")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ArgumentError(f"{NAME}: first must be a number of evaluations, got {first!r}")
    if plan.recipe is not None and any(name == NAME for name, _ in plan.recipe.passes):
        raise PlanError(f"{NAME}: the plan is aligned already; start from the plan before")
    args: dict[str, Any] = {"first": first} if first else {}
    if table is not None:
        known = tables.reference(NAME, table, METHOD)
        check_measured(NAME, known, plan)
        fed = _table_ratios(plan, tables.resolve(NAME, known, METHOD), first)
        args["table"] = known
    else:
        assert ratios is not None
        fed = _listed(plan, ratios, first)
        args["ratios"] = [float(ratio) for ratio in ratios]
    steps, evaluation = [], 0
    for step in plan.steps:
        if step.variant is not None:
            step = replace(step, timestep=fed[evaluation] * step.timestep)
            evaluation += 1
        steps.append(step)
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of(args))))
    return verify(replace(plan, steps=tuple(steps), recipe=recipe))


def cut_alignment(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for the run without its first evaluations."""
    values = args.to_dict()
    return Args.of(values | {"first": values.get("first", 0) + first})


def _listed(plan: Plan, ratios: Sequence[float], first: int) -> list[float]:
    """Ratios of the plan's evaluations. Raises ArgumentError."""
    if isinstance(ratios, str) or not isinstance(ratios, (Sequence, np.ndarray)) or len(ratios) - first != plan.nfe:
        raise ArgumentError(
            f"{NAME}: ratios must be a list of {plan.nfe + first}, one an evaluation, got {ratios!r:.60}"
        )
    for number, ratio in enumerate(ratios):
        fits = isinstance(ratio, (int, float, np.floating)) and not isinstance(ratio, bool)
        if not fits or not math.isfinite(ratio) or ratio <= 0.0:
            raise ArgumentError(f"{NAME}: ratios[{number}] is {ratio!r:.40}; a positive finite number is needed")
    return [float(ratio) for ratio in ratios[first:]]


def _table_ratios(plan: Plan, table: Table, first: int) -> list[float]:
    """A table's ratios for the plan's evaluations. Raises ArgumentError where they were measured at other timesteps."""
    ratios, times = table.arrays["ratios"], table.arrays["timesteps"]
    own = [step.timestep for step in plan.steps if step.variant is not None]
    if not same_times(own, times[first:]):
        made = ", ".join(f"{key}={value!r:.40}" for key, value in table.metadata["plan"].items())
        raise ArgumentError(
            f"{NAME}: the plan does not have the table's {len(times) - first} evaluations and timesteps; make it with "
            f"{made}, or calibrate for this one"
        )
    return [float(ratio) for ratio in ratios[first:]]
