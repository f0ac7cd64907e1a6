"""Makers of plans: from a schedule, a solver and a grid; the tail of a plan; a plan again from its recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vivace.engine import from_diffusers, tables
from vivace.engine.from_diffusers import first_row
from vivace.engine.interchange.replay import CACHES, replay
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import PREDICTIONS, Args, Plan, Recipe
from vivace.engine.plan_io import tensor_infos
from vivace.engine.solvers import PER_ROW, SOLVERS, solver_options, solver_rows
from vivace.engine.solvers.rows import start_from_latent, start_from_noise
from vivace.engine.timesteps import choose, make_grid, numbers
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

MAKERS = ("make_plan", "from_diffusers")


def make_plan(
    schedule: NoiseSchedule,
    solver: str = "unipc",
    steps: int = 20,
    *,
    prediction: str = "eps",
    grid: str | None = None,
    timesteps: Any = None,
    sigmas: Any = None,
    final: str = "zero",
    **options: Any,
) -> Plan:
    """A plan of `steps` evaluations; needs no model.

    Args:
        solver, options: a name of `solvers.SOLVERS` and its own options; table= of a calibrated one: a file of
            `vivace calibrate --solver` or a table; the plan then fits the model it was measured on only.
        prediction: what the network returns, "eps" | "x0" | "v" | "flow".
        grid, timesteps, sigmas, final: see `timesteps.make_grid`; grid None: "karras" for EDM, else "uniform".
    Returns: a verified, unbound plan. First state: c * noise, c = 1 (VP, flow) or the first sigma (EDM).
    Raises: ArgumentError, PlanError ("eps" from pure noise).
    """
    if not isinstance(schedule, NoiseSchedule):
        raise ArgumentError(f"schedule: needs a NoiseSchedule, got {type(schedule).__name__}")
    arguments: dict[str, Any] = {"schedule": schedule.describe(), "solver": solver, "steps": steps}
    arguments |= {"prediction": prediction, "final": final}
    explicit = {
        name: numbers(v, name).tolist() for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None
    }
    arguments |= explicit
    if grid is not None:
        arguments["grid"] = grid
    choose("prediction", prediction, PREDICTIONS)
    for option in options:
        choose(f"{solver}: option", option, tuple(solver_options(solver)))
    if (table := options.get("table")) is not None:  # kept alive until it is read below
        options["table"] = tables.reference(solver, table, solver)
    try:
        recorded = Args.of(arguments | options)
    except TypeError as error:
        raise ArgumentError(f"make_plan: {error}") from error
    return _make(recorded)


def tail_plan(plan: Plan, strength: float) -> Plan:
    """The last int(steps * strength) rows, planned anew from the recipe so that multistep warm-up restarts.

    The first state is alpha * `input:start` + sigma * noise at the level of the first row kept. Passes are applied
    again, to the rows they were applied to before; the result is unbound.
    Raises: PlanError for a plan without recipe or one that is a tail already; ArgumentError for strength.
    """
    if plan.recipe is None:
        raise PlanError(
            "tail: the plan has no recipe to plan it anew from; make it with make_plan or Plan.from_diffusers"
        )
    if plan.recipe.tail is not None:
        raise PlanError(f"tail: the plan is a tail of strength {plan.recipe.tail:g} already; take it of the full plan")
    first_row(len(plan.steps), strength)
    return replan(plan.recipe, tail=float(strength))


def replan(recipe: Recipe, **changes: Any) -> Plan:
    """The plan of a recipe: its maker run again with `changes` to its arguments, then its passes in order.

    changes: arguments of the maker (steps=, solver=, order=, ...; None removes one), or tail= (strength in (0, 1]).
    Raises: whatever the maker raises; PlanError for an unknown maker or pass.
    """
    if recipe.maker not in MAKERS:
        raise PlanError(f"recipe: unknown maker {recipe.maker!r}; known: {', '.join(MAKERS)}")
    tail = changes.pop("tail", recipe.tail)
    merged = recipe.arguments.to_dict() | changes
    arguments = Args.of({name: value for name, value in merged.items() if value is not None})
    make = _make if recipe.maker == "make_plan" else from_diffusers.remake
    plan = make(arguments, tail)
    if tail is None or not any(_cut(name, args) for name, args in recipe.passes):
        return apply_passes(plan, recipe)
    full = make(arguments, None)
    for count, (name, args) in enumerate(recipe.passes, 1):
        within = _within(name, args, full, plan)
        full, plan = replay(full, [(name, args)]), replay(plan, [] if within is None else [(name, within)])
        assert plan.recipe is not None
        plan = replace(
            plan, recipe=replace(plan.recipe, passes=recipe.passes[:count])
        )  # they name the full plan's rows
    return plan


def plan_again(plan: Plan, changes: dict[str, Any]) -> Plan:
    """The plan of a plan's recipe with changes to the maker's arguments; `cached` names rows of the plan at hand.

    Raises: PlanError for a plan without recipe, or whose maker or solver has no such option; whatever they raise.
    """
    recipe = plan.recipe
    if recipe is None:
        raise PlanError("again: the plan has no recipe to plan it anew from; make it with make_plan")
    if "history" in changes:
        arguments = recipe.arguments.to_dict()
        known = [name for name in SOLVERS if "history" in solver_options(name)]
        name = arguments["solver"] if "solver" in arguments else arguments["scheduler"]["_class_name"]
        known = known if "solver" in arguments else list(from_diffusers.HISTORIES)
        if name not in known:
            raise PlanError(f"again: {name} has no option history; {', '.join(known)} have; else use 'own'")
    if recipe.tail is not None and "cached" in changes:
        cut = replan(recipe, tail=None).nfe - plan.nfe
        changes = changes | {"cached": [row + cut for row in changes["cached"]]}
    return replan(recipe, **changes)


def _cut(name: str, args: Args) -> bool:
    """A pass that does something to some rows only."""
    return name in CACHES or bool(args.to_dict().get("interval", (0.0, 1.0)) != (0.0, 1.0))


def _within(name: str, args: Args, full: Plan, plan: Plan) -> Args | None:
    """A pass's arguments for what `plan` has of the evaluations of `full`: the same rows; None when none is left."""
    rows, first = plan.nfe, full.nfe - plan.nfe
    if name in CACHES:
        return CACHES[name](full, args, first) if first or len(full.steps) != len(plan.steps) else args
    if not _cut(name, args):
        return args
    values = args.to_dict()
    if _times(full)[:rows] == _times(plan):  # from data to noise: a tail ends early
        first = 0
    start, end = (min(rows, max(0, int(share * full.nfe) - first)) for share in values["interval"])
    if start >= end:
        return None
    values["interval"] = (min(1.0, (start + 0.5) / rows) if start else 0.0, min(1.0, (end + 0.5) / rows))
    return Args.of(values)


def _times(plan: Plan) -> list[float]:
    """Timesteps of the evaluations."""
    return [step.timestep for step in plan.steps if step.variant is not None]


def apply_passes(plan: Plan, recipe: Recipe) -> Plan:
    """The passes that `recipe` names, in order, on another plan. Raises: PlanError for an unknown pass, theirs."""
    return replay(plan, recipe.passes)


def _make(arguments: Args, tail: float | None = None) -> Plan:
    """`make_plan` from its recorded arguments, cut to its tail."""
    values = arguments.to_dict()
    schedule = NoiseSchedule.restore(Args.of(values.pop("schedule")))
    solver, steps = values.pop("solver"), values.pop("steps")
    prediction = values.pop("prediction")
    places = {name: values.pop(name) for name in ("grid", "timesteps", "sigmas", "final") if name in values}
    grid = make_grid(schedule, steps, **places)
    first = first_row(grid.steps, tail)
    for name in ("disable_corrector", "cached"):  # these name rows of the full plan
        if first and name in values:
            values[name] = [row - first for row in values[name] if name != "cached" or row >= first]
    for name in PER_ROW & values.keys():
        values[name] = values[name][first:] if isinstance(values[name], list) else values[name]
    if values.get("table") is not None:
        values["table"] = tables.resolve(solver, values["table"], solver)
    rows = solver_rows(solver, grid.tail(first), prediction, values)
    scale = grid.sigmas[0] if schedule.kind == "edm" else 1.0
    init = start_from_noise(scale) if tail is None else start_from_latent(grid.level(first))
    recipe = Recipe("make_plan", arguments, tail)
    infos = tensor_infos(rows.arrays)
    return verify(Plan(rows.steps, prediction, init, recipe, infos, arrays=rows.arrays, results=rows.results))
