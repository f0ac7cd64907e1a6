"""LinearAG as plan data: in some rows the unconditional prediction is a linear combination of those known already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vivace.engine import tables
from vivace.engine.passes.narrow import without
from vivace.engine.plan import Affine, Args, Coef, Op, Plan, Step
from vivace.engine.planners.tables import check_measured
from vivace.engine.solvers.fitted import same_times
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_linear_ag"
METHOD = "linear_ag"
REUSE = (1.0, -1.0, 1.0)  # uncond = cond - (cond - uncond) of the guided evaluation before
MOST = 8  # earlier evaluations that an estimate reads

Weights = Mapping[int, tuple[float, ...]]  # of evaluations that are estimated


def apply_linear_ag(
    plan: Plan, table: Any = None, *, rows: Sequence[int] | None = None, weights: Mapping[Any, Any] | None = None
) -> Plan:
    """uncond_i = b_0 cond_i + sum_k b_k cond_(i-k) + sum_k b_(n+k) uncond_(i-k), k = 1 .. n, in some evaluations i.

    Those evaluate cond alone. i - k are the guided evaluations before, whose branches are kept, one history a branch;
    an uncond that was estimated is read like any other. Guidance is then as ever: g = uncond + scale (cond - uncond).

    Args:
        plan: guided, bound or not; without caches, tokens and guards.
        table: of `calibrate_linear_ag`, a file or an object: evaluations and their weights; the plan then fits the
            model it was measured on only.
        rows: evaluations to estimate, counted from 0 at the noise end: some of the table's, or without a table any but
            the first, by `weights` or with the difference cond - uncond of the evaluation before (1, -1, 1).
        weights: instead of a table (b_0, ..., b_2n) by evaluation, n the earlier ones that it reads, at most 8.
    Returns: the plan; its recipe names this pass. No rows: the plan itself, but for its recipe.
    Raises: ArgumentError; PlanError for a plan that is not guided in a row, or estimates already.
    Source: Castillo et al. 2023 (Adaptive Guidance), section 5 (LinearAG), with the n newest of all earlier ones.
    """
    if table is not None and weights is not None:
        raise ArgumentError(f"{NAME}: give a table, or weights")
    if plan.recipe is not None and any(name == NAME for name, _ in plan.recipe.passes):
        raise PlanError(f"{NAME}: the plan estimates branches already; start from the plan before")
    if table is None and rows is None and weights is None:
        raise ArgumentError(f"{NAME}: give a table, rows or weights")
    args: dict[str, Any] = {}
    if table is not None:
        known = tables.reference(NAME, table, METHOD)
        check_measured(NAME, known, plan)
        found, args["table"] = _of_table(plan, tables.resolve(NAME, known, METHOD)), known
    else:
        found = {} if weights is None else _listed(weights)
    chosen = sorted(found) if rows is None else _numbers(rows)
    if weights is None and table is None:
        found = dict.fromkeys(chosen, REUSE)
    if missing := [row for row in chosen if row not in found]:
        raise ArgumentError(f"{NAME}: no weights for evaluation {missing[0]}; there are those of {sorted(found)}")
    args["rows"] = chosen
    if weights is not None:
        args["weights"] = {str(row): list(found[row]) for row in chosen}
    made = _estimated(plan, {row: found[row] for row in chosen})
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of(args))))
    return verify(replace(plan, steps=made, recipe=recipe))


def cut_linear_ag(full: Plan, args: Args, first: int) -> Args:
    """The pass's arguments for the run without its first evaluations: of its rows those whose history is left."""
    values = args.to_dict()
    guided = [i for i, branches in enumerate(_branches(full)) if "uncond" in branches]
    reach = _reach(full, values)
    kept = [row for row in values["rows"] if sum(first <= i < row for i in guided) >= reach[row]]
    values["rows"] = [row - first for row in kept]
    if "weights" in values:
        values["weights"] = {str(row - first): values["weights"][str(row)] for row in kept}
    return Args.of(values)


def _reach(full: Plan, values: Mapping[str, Any]) -> dict[int, int]:
    """How many earlier evaluations each row reads, by the pass's arguments."""
    if "table" in values:
        found: Weights = _of_table(full, tables.resolve(NAME, values["table"], METHOD))
    elif "weights" in values:
        found = _listed(values["weights"])
    else:
        found = dict.fromkeys(values["rows"], REUSE)
    return {row: len(numbers) // 2 for row, numbers in found.items()}


def _branches(plan: Plan) -> list[tuple[str, ...]]:
    return [step.branches for step in plan.steps if step.variant is not None]


def _of_table(plan: Plan, table: Any) -> dict[int, tuple[float, ...]]:
    """Weights of a table by evaluation of the plan, which may lack the first ones (a tail). Raises ArgumentError."""
    times = [float(time) for time in table.arrays["timesteps"]]
    own = [step.timestep for step in plan.steps if step.variant is not None]
    first = len(times) - len(own)
    if first < 0 or not same_times(own, times[first:]):
        made = ", ".join(f"{key}={value!r:.40}" for key, value in table.metadata["plan"].items())
        raise ArgumentError(
            f"{NAME}: the plan does not have the table's {len(times)} evaluations and timesteps; make it with {made}, "
            "or calibrate for this one"
        )
    rows = [int(name.removeprefix("weights.")) for name in table.arrays if name.startswith("weights.")]
    return {row - first: tuple(map(float, table.arrays[f"weights.{row}"])) for row in sorted(rows) if row >= first}


def _listed(weights: Mapping[Any, Any]) -> dict[int, tuple[float, ...]]:
    """Weights given by hand. Raises ArgumentError."""
    if not isinstance(weights, Mapping):
        raise ArgumentError(f"{NAME}: weights {weights!r:.60}; evaluation -> (b_0, ..., b_2n) is needed")
    found: dict[int, tuple[float, ...]] = {}
    for name, numbers in weights.items():
        row = int(name) if isinstance(name, (int, str)) and str(name).isdigit() else -1
        fits = isinstance(numbers, (list, tuple)) and len(numbers) % 2 and 3 <= len(numbers) <= 2 * MOST + 1
        fits = fits and all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
        if row < 0 or not fits:
            raise ArgumentError(
                f"{NAME}: weights of evaluation {name!r:.20} are {numbers!r:.60}; 2n + 1 finite numbers are needed, "
                f"1 <= n <= {MOST}"
            )
        found[row] = tuple(float(number) for number in numbers)
    return found


def _numbers(rows: Sequence[int]) -> list[int]:
    """Evaluations, in order, each once. Raises ArgumentError."""
    given = list(rows) if isinstance(rows, (list, tuple, range)) else [None]
    if any(isinstance(row, bool) or not isinstance(row, int) or row < 0 for row in given):
        raise ArgumentError(f"{NAME}: rows {rows!r:.60}; a list of numbers of evaluations is needed")
    return sorted({row for row in given if row is not None})


def _estimated(plan: Plan, weights: Weights) -> tuple[Step, ...]:
    """The rows; every guided one keeps its branches, in slots that rotate, where any is estimated."""
    if not weights:
        return plan.steps
    ring = max(len(numbers) // 2 for numbers in weights.values())
    steps, evaluation, guided = [], 0, 0
    for row, step in enumerate(plan.steps):
        if step.variant is not None:
            if evaluation in weights:
                step = _with_estimate(plan, row, guided, ring, weights[evaluation])
            elif step.branches == ("cond", "uncond"):
                step = replace(step, ops=(*_keeping(step.outs, guided % ring), *step.ops))
            guided += "uncond" in plan.steps[row].branches
            evaluation += 1
        steps.append(step)
    if beyond := [number for number in weights if number >= evaluation]:
        raise ArgumentError(f"{NAME}: evaluation {beyond[0]}; the plan has {evaluation}")
    return tuple(steps)


def _with_estimate(plan: Plan, row: int, guided: int, ring: int, numbers: Sequence[float]) -> Step:
    """A row that evaluates cond and estimates uncond. guided: guided evaluations before it."""
    step, count = plan.steps[row], len(numbers) // 2
    variant = step.variant
    assert variant is not None
    if step.branches != ("cond", "uncond"):
        raise PlanError(f"{NAME}: step {row} runs {step.branches}; cond and uncond are needed, so choose other rows")
    if count > guided:
        raise ArgumentError(
            f"{NAME}: step {row} reads {count} guided evaluations before it, there are {guided}; choose later rows"
        )
    if step.guard is not None or variant.rules:
        raise PlanError(f"{NAME}: step {row} has a guard or rules; this pass comes before caches and guards")
    cond, uncond = step.outs
    past = [(guided - 1 - k) % ring for k in range(count)]
    slots = [cond, *(f"past_c{k}" for k in past), *(f"past_u{k}" for k in past)]
    terms: tuple[tuple[str, Coef], ...] = tuple((s, b) for s, b in zip(slots, numbers, strict=True) if b != 0.0)
    estimate = Affine(uncond, terms or ((cond, 0.0),))
    ops: tuple[Op, ...] = (estimate, *_keeping(step.outs, guided % ring), *step.ops)
    return replace(step, variant=without(plan, variant, "uncond"), outs=(cond,), ops=ops)


def _keeping(outs: Sequence[str], place: int) -> tuple[Op, ...]:
    """Ops that keep both branches; those that no row reads are never written."""
    return tuple(Affine(f"past_{name}{place}", ((out, 1.0),)) for name, out in zip("cu", outs, strict=True))
