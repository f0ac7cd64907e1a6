"""Feature caches as plan data: which sites of which blocks compute, are given again or are forecast, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vivace.engine.passes.rules import absolute, with_rules
from vivace.engine.plan import Action, Affine, Args, Plan, Rule
from vivace.engine.planners import make_planner
from vivace.engine.planners.base import Planner, Schedule
from vivace.engine.planners.fixed import Scheduled, written
from vivace.engine.planners.noise import calmed
from vivace.engine.planners.settle import kept_of, predecessors, reads_of, settle, tail_of
from vivace.engine.planners.tables import check_measured
from vivace.engine.verify import STORES, verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_block_cache"
HISTORIES = ("own", "lower_order", "computed")


def apply_block_cache(
    plan: Plan,
    planner: Planner | str,
    *,
    store: str | None = None,
    history: str = "own",
    errors: Any = None,
    measured: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Plan:
    """action(evaluation i, site, blocks) = COMPUTE and keep, REUSE or FORECAST, as the planner says.

    Args:
        plan: bound or not, with its guidance and precisions already; without guards.
        planner: an object of `vivace.planners`, or its name with its arguments ("fora", interval=2).
        store: dtype that values are kept in: "fp32", "bf16", "fp16", "fp8" or "int8" (a scale a token); None: float32.
        history: what the output of a row that does not compute everything means to a multistep solver. "own": it
            stands for its own row like any other. "lower_order": the row and those after it take order 1 and build up
            anew. "computed": rows after it read those of fully computed rows instead, at their own times.
        errors: what decides orders in rows of 8 bits, and where 8 bits are kept: a calibration table of kind "cache";
            None: an estimate; False: nothing, they stay as planned.
        measured: fingerprint and latent_shape that the planner's numbers belong to; default: those of its table.
    Returns: the plan with rules, forecast weights, and a recipe that names this pass. A planner that gives nothing
        again (interval 1, alpha 0, threshold 0) adds no rule.
    Raises: ArgumentError; ModelError for a table of another model or shape; PlanError for a plan with guards.
    Source: each planner names its own; what history means: Lu et al. 2022 (multistep formulas of uneven steps).
    """
    made = make_planner(planner, arguments)
    for name, value, known in (("store", store, (None, *STORES)), ("history", history, HISTORIES)):
        if value not in known:
            raise ArgumentError(f"{NAME}: {name} {value!r:.40}; use one of {', '.join(map(str, known))}")
    for i, step in enumerate(plan.steps):
        if step.guard is not None:
            raise PlanError(f"{NAME}: step {i} has a guard; what is planned beforehand comes before guards")
    origin = made.measured() if measured is None else dict(measured)
    if origin is not None:
        check_measured(type(made).__name__, origin, plan)
    wanted = settle(made.schedule(plan), plan)
    schedule = calmed(wanted, plan, errors, store)
    what, values = type(made).__name__, {} if made.searched else made.arguments()
    recorded: dict[str, Any] = {"store": store, "history": history}
    if errors is not None or made.searched:
        recorded["errors"] = False
    if made.searched or (errors is not None and errors is not False):  # the recipe repeats what was found
        what, values = Scheduled.__name__, written(schedule, made)
    recorded = {"planner": what, **values, **recorded}
    if origin is not None:
        recorded["measured"] = origin
    return _cached(plan, schedule, recorded)


def cut(plan: Plan, args: Args, first: int) -> Args:
    """The arguments of this pass, made on the full `plan`, for its rows without the first `first` evaluations.

    The first row left computes everything; the others keep their schedule.
    """
    values = args.to_dict()
    kept = {name: values.pop(name) for name in ("store", "history", "measured", "errors") if name in values}
    planner = make_planner(values.pop("planner"), values)
    schedule = calmed(settle(planner.schedule(plan), plan), plan, kept.get("errors"), kept.get("store"))
    tail = written(tail_of(schedule, plan, first), planner)
    return Args.of({"planner": Scheduled.__name__, **tail, **kept, "errors": False})


def _cached(plan: Plan, schedule: Schedule, recorded: dict[str, Any]) -> Plan:
    """The plan with the rules and weights of a settled schedule; `recorded`: the arguments of the pass."""
    before, count = predecessors(plan), plan.nfe
    rules: list[list[Rule]] = [[] for _ in range(count)]
    weights: list[list[float]] = [list(step.forecast) for step in plan.steps if step.variant is not None]
    for track in schedule.tracks:
        blocks = absolute(plan, track.blocks, NAME, track.site)
        reads = reads_of(schedule, track, before)
        for i, order in kept_of(reads).items():
            rules[i].append(Rule(blocks, track.site, action=Action.COMPUTE, order=order, store=recorded["store"]))
        for i, read in reads.items():
            if read.weights == (1.0,):
                rules[i].append(Rule(blocks, track.site, action=Action.REUSE))
                continue
            place = _place(weights[i], read.weights)
            order = len(read.weights) - 1
            rules[i].append(Rule(blocks, track.site, action=Action.FORECAST, order=order, weights=place))
    plan = _with_history(plan, schedule, recorded["history"])
    plan = _with_noise(plan, schedule)
    return with_rules(plan, [tuple(row) for row in rules], NAME, recorded, [tuple(row) for row in weights])


def _place(have: list[float], weights: tuple[float, ...]) -> int:
    """Where `weights` stand in a row's weights, put at their end unless they are there."""
    for place in range(len(have) - len(weights) + 1):
        if tuple(have[place : place + len(weights)]) == weights:
            return place
    have.extend(weights)
    return len(have) - len(weights)


def _with_noise(plan: Plan, schedule: Schedule) -> Plan:
    """The noise that the schedule adds before evaluations, at the end of the row before each; inner stages get none."""
    if not schedule.noise:
        return plan
    added: dict[int, tuple[Affine, ...]] = {}
    number = 0
    for row, step in enumerate(plan.steps):
        if step.variant is not None:
            if number in schedule.noise and step.x == "x" and row:
                added[row - 1] = (Affine("x", (("x", 1.0), ("noise:0", schedule.noise[number]))),)
            number += 1
    steps = tuple(replace(step, ops=(*step.ops, *added.get(row, ()))) for row, step in enumerate(plan.steps))
    return verify(replace(plan, steps=steps))


def _with_history(plan: Plan, schedule: Schedule, history: str) -> Plan:
    """The plan with its solver's rows planned anew for a history that knows which rows computed everything."""
    if history == "own" or not schedule.cached:
        return plan
    if plan.recipe is None or len(plan.steps) != plan.nfe:
        why = "no recipe" if plan.recipe is None else "rows without an evaluation"
        raise PlanError(f"{NAME}: history {history!r} plans the solver's rows anew, but the plan has {why}; use 'own'")
    fresh = plan.again(history=history, cached=list(schedule.cached))
    if [_level(step) for step in fresh.steps] != [_level(step) for step in plan.steps]:
        raise PlanError(f"{NAME}: history {history!r}: the plan's rows are not those of its recipe; use 'own'")
    return replace(
        plan, steps=tuple(replace(old, ops=new.ops) for old, new in zip(plan.steps, fresh.steps, strict=True))
    )


def _level(step: Any) -> tuple[float, float, float]:
    return step.timestep, step.alpha, step.sigma
