"""A `diffusers` scheduler's config -> the plan that scheduler would run.

Nothing of `diffusers` is imported: a config mapping, or any object with `.config`, is enough. Every field of a covered
class is honoured or refused by its name; fields of other classes that a config drags along are ignored, as `diffusers`
does. Noise levels are rounded to float32, as its tables are, so that timesteps and levels agree to the bit. Where a
class returns NaN (UniPC above order 1, or with bh1, in a step to sigma = 0) the row is the first-order one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vivace.engine import diffusers_grids as grids
from vivace.engine.diffusers_grids import FIELDS, Request
from vivace.engine.noise_schedule import read_config
from vivace.engine.plan import Args, Plan, Recipe, Step, Transform
from vivace.engine.solvers.ddim import ddim_rows
from vivace.engine.solvers.dpmpp import dpmpp_rows
from vivace.engine.solvers.flow_euler import flow_euler
from vivace.engine.solvers.rows import falling_orders, start_from_latent, start_from_noise
from vivace.engine.solvers.unipc import unipc_rows
from vivace.engine.timesteps import Grid, choose, numbers, require_steps, spaced
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, UnsupportedError

FEW_STEPS = 15  # `lower_order_final` of DPMSolverMultistepScheduler acts below this number of steps

Made = tuple[Grid, str, Callable[[int], tuple[Step, ...]]]  # grid, prediction, rows from a first row on


def plan_from_diffusers(
    scheduler: Any,
    steps: int = 20,
    *,
    timesteps: Any = None,
    sigmas: Any = None,
    mu: float | None = None,
    strength: float = 1.0,
) -> Plan:
    """The plan that this scheduler would run after `set_timesteps(steps)`.

    Args:
        scheduler: config mapping with `_class_name`, or scheduler object (its own tables are used).
        steps: number of steps; explicit `timesteps` or `sigmas` decide it, as in `diffusers`.
        timesteps, sigmas: for the classes whose `set_timesteps` takes them; sigmas are shifted, as there.
        mu: of the dynamic shift, for the classes that have one.
        strength: below 1 the plan of an image-to-image run: its last int(steps * strength) steps from `input:start`.
    Raises: UnsupportedError naming the class or field that is not covered; ArgumentError; PlanError.
    """
    fields, name = read_config(scheduler)
    if name not in FIELDS:
        raise UnsupportedError(
            f"scheduler {name or 'without _class_name'!r} is not covered; covered: {', '.join(FIELDS)}"
        )
    stored = {field: grids.plain(name, field, fields[field]) for field in FIELDS[name] if field in fields}
    changed = {field: value for field, value in stored.items() if value != FIELDS[name][field]}
    arguments: dict[str, Any] = {"scheduler": {"_class_name": name, **changed}, "steps": steps}
    for key, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is not None:
            arguments[key] = numbers(value, key).tolist()
            arguments["steps"] = len(arguments[key])
    if mu is not None:
        arguments["mu"] = float(mu)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        values = grids.own_table(name, table)
        arguments["table"] = {"dtype": values.dtype.name, "values": values.tolist()}
    if name.startswith("FlowMatch"):  # `set_shift` changes the shift of an object after its making
        arguments["shift"] = float(getattr(scheduler, "shift", changed.get("shift", 1.0)))
    return remake(Args.of(arguments), None if strength == 1.0 else strength)


def remake(arguments: Args, tail: float | None = None) -> Plan:
    """The plan of a recipe made by `plan_from_diffusers`, cut to its tail if there is one."""
    values = arguments.to_dict()
    name = values["scheduler"]["_class_name"]
    config = grids.read_fields(name, {k: v for k, v in values["scheduler"].items() if k != "_class_name"})
    config["current_shift"] = values.get("shift")
    saved = values.get("table")
    table = np.asarray(saved["values"], dtype=saved["dtype"]) if saved else grids.table_of_config(name, config)
    steps = require_steps(values["steps"])
    request = Request(name, config, steps, values.get("timesteps"), values.get("sigmas"), values.get("mu"), table)
    for key in ("timesteps", "sigmas"):
        if key in values and (name, key) not in _EXPLICIT:
            raise ArgumentError(f"{name}: its set_timesteps takes no {key}")
    grid, prediction, rows = _MAKERS[name](request)
    first = first_row(grid.steps, tail)
    init = start_from_noise(1.0) if tail is None else start_from_latent(grid.level(first))
    recipe = Recipe("from_diffusers", arguments, tail)
    return verify(Plan(rows(first), prediction, init, recipe))


def first_row(steps: int, strength: float | None) -> int:
    """First row of an image-to-image run: steps - int(steps * strength), as the pipelines of `diffusers` round it."""
    if strength is None:
        return 0
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0.0 < strength <= 1.0:
        raise ArgumentError(f"strength: needs a number in (0, 1], got {strength!r}")
    kept = int(steps * strength)
    if kept == 0:
        raise ArgumentError(f"strength: {strength} of {steps} steps leaves no step; needs at least {1.0 / steps:g}")
    return steps - kept


# ---------------------------------------------------------------- the four classes
def _ddim(request: Request) -> Made:
    """DDIM: steps from t to t - T // N, whatever the next timestep is; eta = 0."""
    steps, count, table = request.steps, request.train_steps, request.table.astype(np.float64)
    if steps > count:
        raise ArgumentError(f"steps: {steps} is more than the {count} training timesteps")
    index = spaced(request["timestep_spacing"], count, steps, offset=request["steps_offset"], points=steps).astype(int)
    if index.max() >= count:
        raise ArgumentError(f"steps_offset: timestep {index.max()} is beyond the {count} training timesteps")
    after = index - count // steps
    final = 1.0 if request["set_alpha_to_one"] else table[0]
    ends = np.where(after >= 0, table[np.maximum(after, 0)], final)
    levels = np.append(table[index], ends[-1])
    grid = grids.make_levels(index, np.sqrt(levels), np.sqrt(1.0 - levels))
    targets = list(zip(np.sqrt(ends).tolist(), np.sqrt(1.0 - ends).tolist(), strict=True))
    prediction = grids.prediction_of(request)
    limit = float(request["clip_sample_range"])
    transform = grids.threshold_of(request)
    if transform is None and request["clip_sample"]:
        transform = Transform("clamp", "m0", params=(("low", -limit), ("high", limit)))
    return grid, prediction, lambda first: ddim_rows(grid.tail(first), prediction, targets[first:], transform=transform)


def _dpmpp(request: Request) -> Made:
    """DPM-Solver++ of order 1 or 2; order 1 in the last row by its own three rules."""
    order = grids.order_of(request, 2)
    variant = {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}.get(
        request["solver_type"], request["solver_type"]
    )
    choose(f"{request.name}: solver_type", variant, ("midpoint", "heun"))
    sigmas, fed = grids.dpmpp_sigmas(request)
    zero = request["final_sigmas_type"] == "zero"
    grid = grids.sigma_grid(request, sigmas, 0.0 if zero else float(request.table[0]), fed)
    orders = [order] * grid.steps
    if zero or request["euler_at_final"] or (request["lower_order_final"] and grid.steps < FEW_STEPS):
        orders[-1] = 1
    prediction, transform = grids.prediction_of(request), grids.threshold_of(request)
    return grid, prediction, lambda first: dpmpp_rows(grid.tail(first), prediction, orders[first:], variant, transform)


def _unipc(request: Request) -> Made:
    """UniPC in x0 form. A row that ends at sigma = 0 is of order 1 even without `lower_order_final`."""
    order = grids.order_of(request, 3)
    variant = {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}.get(request["solver_type"], request["solver_type"])
    choose(f"{request.name}: solver_type", variant, ("bh1", "bh2"))
    sigmas, fed, last = grids.unipc_sigmas(request)
    grid = grids.sigma_grid(request, sigmas, last if request["final_sigmas_type"] == "sigma_min" else 0.0, fed)
    orders = falling_orders(grid.steps, order, bool(request["lower_order_final"]))
    corrected = [row not in request["disable_corrector"] for row in range(grid.steps)]
    prediction, transform = grids.prediction_of(request), grids.threshold_of(request)
    return (
        grid,
        prediction,
        lambda first: unipc_rows(grid.tail(first), prediction, orders[first:], variant, corrected[first:], transform),
    )


def _flow_euler(request: Request) -> Made:
    """Flow Euler: sigmas, shift, stretch to `shift_terminal`, Karras, in this order; then 0."""
    count, shift = request.train_steps, request["current_shift"]
    if request.timesteps is not None and request.sigmas is not None and len(request.timesteps) != len(request.sigmas):
        raise ArgumentError(f"timesteps: {len(request.timesteps)} given, but {len(request.sigmas)} sigmas")
    ends = np.asarray([count, 1], dtype=np.float32) / np.float32(count)
    if not request["use_dynamic_shifting"]:
        ends = grids.shifted(ends, request["shift"])
    given = None if request.timesteps is None else np.asarray(request.timesteps, dtype=np.float32)
    sigmas: npt.NDArray[Any]
    if request.sigmas is not None:
        sigmas = np.asarray(request.sigmas, dtype=np.float32)
    elif given is not None:
        sigmas = given / count
    else:
        sigmas = np.linspace(float(ends[0]) * count, float(ends[1]) * count, request.steps) / count
    sigmas = (
        grids.dynamically_shifted(request, sigmas) if request["use_dynamic_shifting"] else grids.shifted(sigmas, shift)
    )
    if request["shift_terminal"]:
        sigmas = grids.stretched(sigmas, request["shift_terminal"])
    if request["use_karras_sigmas"]:
        sigmas = grids.karras(float(sigmas[-1]), float(sigmas[0]), request.steps)
    levels = sigmas.astype(np.float32)
    fed = given if given is not None else levels * np.float32(count)
    values = np.append(levels.astype(np.float64), 0.0)
    grids.require_falling(request, values)
    grid = grids.make_levels(fed, 1.0 - values, values)
    return grid, "flow", lambda first: flow_euler(grid.tail(first), "flow")


_MAKERS: Mapping[str, Callable[[Request], Made]] = {
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpmpp,
    "UniPCMultistepScheduler": _unipc,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
}
_EXPLICIT = (
    ("DPMSolverMultistepScheduler", "timesteps"),
    ("UniPCMultistepScheduler", "sigmas"),
    ("FlowMatchEulerDiscreteScheduler", "timesteps"),
    ("FlowMatchEulerDiscreteScheduler", "sigmas"),
)
