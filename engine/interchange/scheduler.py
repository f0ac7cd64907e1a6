"""`scheduler_config.json`: the `diffusers` scheduler that runs a plan's rows. The inverse of `Plan.from_diffusers`.

A config says the solver's column of a plan: levels, timesteps, coefficients. Guidance, precision and caching are not
its subject. What it does not hold goes to the pipeline's call: number of steps, explicit timesteps or sigmas, mu,
strength.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from vivace.engine.diffusers_classes import EXPLICIT
from vivace.engine.diffusers_config import FIELDS, PREDICTION_TYPES, read_fields
from vivace.engine.diffusers_grids import BY_TIMESTEP, table_of_config
from vivace.engine.from_diffusers import plan_from_diffusers, remake
from vivace.engine.interchange.replay import CACHES, replay
from vivace.engine.noise_schedule import BETA_SCHEDULES, NoiseSchedule, alphas_cumprod_of
from vivace.engine.plan import Affine, Args, Op, Plan, Recipe, coefs, reads, writes
from vivace.engine.timesteps import SPACINGS, make_grid
from vivace.errors import UnsupportedError, VivaceError

Found = tuple[dict[str, Any], dict[str, Any]]  # config, arguments of the call

# Classes that run a solver's rows, with what they need said besides schedule, grid and options.
_DPM = "DPMSolverMultistepScheduler"
CLASSES: dict[tuple[str, str], tuple[tuple[str, dict[str, Any]], ...]] = {
    ("vp", "ddim"): (("DDIMScheduler", {"clip_sample": False}), (_DPM, {"solver_order": 1})),
    ("vp", "dpmpp_2m"): ((_DPM, {}),),
    ("vp", "dpmpp_2m_sde"): ((_DPM, {"algorithm_type": "sde-dpmsolver++"}),),
    ("vp", "dpmpp_3m"): ((_DPM, {"solver_order": 3, "solver_type": "midpoint"}),),
    ("vp", "unipc"): (("UniPCMultistepScheduler", {}),),
    ("flow", "flow_euler"): (("FlowMatchEulerDiscreteScheduler", {}),),
}
OPTIONS = {"order": "solver_order", "variant": "solver_type", "lower_order_final": "lower_order_final"}
_PREDICTION_TYPES = {prediction: kind for kind, prediction in reversed(PREDICTION_TYPES.items())}
_TABLE_SLACK = 1e-4  # of alpha^2: a float32 product of a thousand factors, against float64


def to_scheduler_config(plan: Plan, *, tolerance: float = 0.0) -> Found:
    """(config, call): `scheduler_config.json`, and what the pipeline is called with, for the plan's rows.

    Args:
        plan: of `Plan.from_diffusers`, its solver's rows unchanged; or of `make_plan`, where some class runs its rows.
        tolerance: largest relative difference of a number of a row that still counts as the same; 0: bit for bit.
            `diffusers` rounds levels to float32, so most plans of `make_plan` need about 1e-6.
    Returns: config with `_class_name` and the fields that are not at their defaults; call with `num_inference_steps`,
        and `timesteps`, `sigmas`, `mu`, `strength` where the plan has them.
    Raises: UnsupportedError naming what no scheduler says: the row, the solver, the class and the number.
    """
    recipe = plan.recipe
    if recipe is None:
        raise UnsupportedError(
            "to_scheduler_config: the plan was made by hand; only plans of make_plan and Plan.from_diffusers have a "
            "scheduler to be compared with"
        )
    try:
        return _imported(plan, recipe) if recipe.maker == "from_diffusers" else _expressed(plan, recipe, tolerance)
    except KeyError as error:  # a file may hold any recipe
        raise UnsupportedError(f"to_scheduler_config: the recipe of the plan lacks {error.args[0]!r}") from None


def _passes(recipe: Recipe) -> list[tuple[str, Args]]:
    """Passes that may touch the solver's column. Caches are another one, and name rows of the full run in a tail."""
    return [(name, args) for name, args in recipe.passes if name not in CACHES]


# ---------------------------------------------------------------- plans of from_diffusers
def _imported(plan: Plan, recipe: Recipe) -> Found:
    """The config that the plan was made from, once its rows are found unchanged."""
    arguments = recipe.arguments.to_dict()
    config = arguments["scheduler"]
    name = config["_class_name"]
    gap, where = difference(plan, replay(remake(recipe.arguments, recipe.tail), _passes(recipe)))
    if gap:
        raise UnsupportedError(f"to_scheduler_config: {where}: the rows were changed after they were made by {name}")
    fields = read_fields(name, {key: value for key, value in config.items() if key != "_class_name"})
    if "table" in arguments:
        own, said = (_squares(name, table) for table in (arguments["table"]["values"], table_of_config(name, fields)))
        if own.shape != said.shape or np.abs(own - said).max() > _TABLE_SLACK:
            raise UnsupportedError(
                f"to_scheduler_config: the table of noise levels of the {name} was not that of its config; give it "
                "trained_betas"
            )
    if arguments.get("shift", fields.get("shift", 1.0)) != fields.get("shift", 1.0):
        raise UnsupportedError(
            f"to_scheduler_config: set_shift({arguments['shift']:g}) was called on the {name}; no config says that"
        )
    call = {"num_inference_steps": arguments["steps"]}
    call |= {key: arguments[key] for key in ("timesteps", "sigmas", "mu") if key in arguments}
    return config, call | ({} if recipe.tail is None else {"strength": recipe.tail})


def _squares(name: str, table: Any) -> Any:
    """alpha^2 of a table of alpha^2 (BY_TIMESTEP) or of sigma/alpha."""
    values = np.asarray(table, dtype=np.float64)
    return values if name in BY_TIMESTEP else 1.0 / (1.0 + values**2)


# ---------------------------------------------------------------- plans of make_plan
def _expressed(plan: Plan, recipe: Recipe, tolerance: float) -> Found:
    """The first config whose plan is this one; the error tells of the nearest."""
    arguments = recipe.arguments.to_dict()
    schedule = NoiseSchedule.restore(Args.of(arguments["schedule"]))
    key = schedule.kind, arguments["solver"]
    if key not in CLASSES:
        raise UnsupportedError(
            f"to_scheduler_config: no covered class of diffusers runs the rows of solver {key[1]!r} on a {key[0]!r} "
            f"schedule; covered: {', '.join(f'{solver} ({kind})' for kind, solver in CLASSES)}"
        )
    nearest = math.inf, "none has such a grid"
    for config, call in _candidates(plan.prediction, schedule, arguments):
        try:
            steps, strength = call["num_inference_steps"], 1.0 if recipe.tail is None else recipe.tail
            explicit = {name: value for name, value in call.items() if name != "num_inference_steps"}
            made = plan_from_diffusers(config, steps, **explicit, strength=strength)
            gap, where = difference(plan, replay(made, _passes(recipe)))
        except VivaceError as error:
            gap, where = math.inf, str(error)
        if gap <= tolerance:
            return config, call | ({} if recipe.tail is None else {"strength": recipe.tail})
        nearest = min((gap, f"{config['_class_name']}, {where}"), nearest, key=lambda one: one[0])
    accepted = 10.0 ** math.ceil(math.log10(nearest[0])) if nearest[0] < 1e-3 else 0.0
    hint = f"; tolerance={accepted:.0e} accepts it" if accepted else ""
    raise UnsupportedError(f"to_scheduler_config: no scheduler runs these rows; nearest: {nearest[1]}{hint}")


def _candidates(prediction: str, schedule: NoiseSchedule, arguments: dict[str, Any]) -> Iterator[Found]:
    """Configs that might run the plan, with the arguments of the call."""
    count = arguments["steps"]
    options = {OPTIONS[key]: value for key, value in arguments.items() if key in OPTIONS}
    options["prediction_type"] = _PREDICTION_TYPES[prediction]
    options["disable_corrector"] = list(arguments.get("disable_corrector", []))
    if arguments.get("corrector") is False:
        options["disable_corrector"] = list(range(count))
    if arguments.get("form") == "eps":
        options["predict_x0"] = False
    if arguments["final"] == "sigma_min":
        options |= {"final_sigmas_type": "sigma_min", "set_alpha_to_one": False}
    for name, fixed in CLASSES[schedule.kind, arguments["solver"]]:
        known = FIELDS[name]
        for levels in _schedules(schedule):
            for grid, call in _grids(name, schedule, arguments):
                said = {key: value for key, value in {**levels, **options, **fixed, **grid}.items() if key in known}
                changed = {key: value for key, value in said.items() if value != known[key]}
                yield {"_class_name": name, **changed}, {"num_inference_steps": count, **call}


def _schedules(schedule: NoiseSchedule) -> Iterator[dict[str, Any]]:
    """Fields that say the noise levels of a schedule: by name where betas have one, else each beta."""
    steps = {"num_train_timesteps": schedule.train_steps or 1000}
    if schedule.kind == "flow":
        yield steps
        return
    squares = schedule.alpha(np.arange(float(steps["num_train_timesteps"]))) ** 2
    betas = 1.0 - squares / np.append(1.0, squares[:-1])
    ends = {"beta_start": float(f"{betas[0]:.6g}"), "beta_end": float(f"{betas[-1]:.6g}")}
    for kind in BETA_SCHEDULES:
        fields = {**steps, "beta_schedule": kind, **({} if kind == "squaredcos_cap_v2" else ends)}
        if np.abs(alphas_cumprod_of(fields) - squares).max() <= 1e-12:
            yield fields
    if squares[-1] > 0.0:
        yield {**steps, "trained_betas": betas.tolist()}


def _grids(name: str, schedule: NoiseSchedule, arguments: dict[str, Any]) -> Iterator[Found]:
    """(fields, arguments of the call) that say a grid: by name, then its timesteps or sigmas one by one."""
    named = arguments.get("grid")
    if named in SPACINGS:
        yield {"timestep_spacing": named}, {}
    elif named in ("karras", "exponential", "beta"):
        yield {f"use_{named}_sigmas": True}, {}
    elif named == "logsnr":
        yield {"use_lu_lambdas": True}, {}
    places = {key: arguments[key] for key in ("grid", "timesteps", "sigmas", "final") if key in arguments}
    grid = make_grid(schedule, arguments["steps"], **places)
    if schedule.kind == "flow":
        yield {}, {"sigmas": list(grid.sigmas[: grid.steps])}  # of shift 1: those given are shifted, too
    elif name in EXPLICIT["timesteps"]:
        yield {}, {"timesteps": list(grid.timesteps)}


# ---------------------------------------------------------------- comparison
def difference(one: Plan, two: Plan) -> tuple[float, str]:
    """(largest relative difference of a number, where) of the solver's column; infinite where the forms differ."""
    if (one.prediction, len(one.steps)) != (two.prediction, len(two.steps)):
        return math.inf, f"{len(one.steps)} rows of {one.prediction}, got {len(two.steps)} of {two.prediction}"
    worst = 0.0, ""
    for (where, form, numbers), (_, other, others) in zip(_column(one), _column(two), strict=True):
        if form != other:
            return math.inf, f"{where} has another form there"
        for (name, x), (_, y) in zip(numbers, others, strict=True):
            gap = _gap(x, y)
            if gap > worst[0]:
                worst = gap, f"{where}: {name} is {x!r} here and {y!r} there"
    return worst


def _column(plan: Plan) -> Iterator[tuple[str, Any, list[tuple[str, Any]]]]:
    """(where, form, named numbers) of the start and of every row."""
    yield "start", [_form(op) for op in plan.init], _numbers(plan.init)
    for i, step in enumerate(plan.steps):
        form = step.x, step.outs, step.branches, step.restart, [_form(op) for op in step.ops]
        levels = [(name, getattr(step, name)) for name in ("timestep", "alpha", "sigma", "x_scale")]
        yield f"row {i}", form, [*levels, *_numbers(step.ops)]


def _form(op: Op) -> Any:
    """What an op is apart from its numbers."""
    rest = op.at if isinstance(op, Affine) else (op.kind, [name for name, _ in op.params])
    return type(op), writes(op), reads(op), rest


def _numbers(ops: tuple[Op, ...]) -> list[tuple[str, Any]]:
    return [(f"update of {writes(op)!r}", coef) for op in ops for coef in coefs(op)]


def _gap(one: Any, two: Any) -> float:
    """Relative difference of two coefficients; infinite for unequal ones that are not both numbers."""
    if one == two:
        return 0.0
    both = isinstance(one, float) and isinstance(two, float)
    return abs(one - two) / max(abs(one), abs(two)) if both else math.inf
