"""A `diffusers` scheduler's config -> the plan that scheduler would run.

Nothing of `diffusers` is imported: a config mapping, or any object with `.config`, is enough. Every field of a covered
class is honoured or refused by its name; fields of other classes that a config drags along are ignored, as `diffusers`
does. Noise levels are rounded to float32, as its tables are, so that timesteps and levels agree to the bit. Where a
class returns NaN (UniPC above order 1, or with bh1, in a step to sigma = 0) the row is the first-order one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vivace.engine import diffusers_grids as grids
from vivace.engine.diffusers_classes import make
from vivace.engine.diffusers_config import FIELDS, Request, plain, read_fields
from vivace.engine.noise_schedule import read_config
from vivace.engine.plan import Args, Plan, Recipe
from vivace.engine.solvers.rows import start_from_latent, start_from_noise
from vivace.engine.timesteps import numbers, require_steps
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, UnsupportedError

HISTORIES = tuple(f"{kind}MultistepScheduler" for kind in ("DPMSolver", "DEIS", "UniPC", "EDMDPMSolver"))
ENDS_WITH_SIGMA = ("EulerDiscreteScheduler",)  # explicit sigmas of these classes include the final level


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
    stored = {field: plain(name, field, fields[field]) for field in FIELDS[name] if field in fields}
    changed = {field: value for field, value in stored.items() if value != FIELDS[name][field]}
    arguments: dict[str, Any] = {"scheduler": {"_class_name": name, **changed}, "steps": steps}
    for key, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is not None:
            arguments[key] = numbers(value, key).tolist()
            arguments["steps"] = len(arguments[key]) - (key == "sigmas" and name in ENDS_WITH_SIGMA)
    if mu is not None:
        arguments["mu"] = float(mu)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        values = grids.own_table(name, table)
        arguments["table"] = {"dtype": values.dtype.name, "values": values.tolist()}
    count, given = require_steps(arguments["steps"]), (arguments.get("sigmas"), arguments.get("timesteps"))
    own = grids.run_tables(name, scheduler, read_fields(name, changed), count, *given)
    if own is not None:
        arguments["own"] = own
    if name.startswith("FlowMatch"):  # `set_shift` changes the shift of an object after its making
        own_shift = scheduler.shift if hasattr(scheduler, "set_shift") else changed.get("shift", 1.0)
        arguments["shift"] = float(own_shift)
    return remake(Args.of(arguments), None if strength == 1.0 else strength)


def remake(arguments: Args, tail: float | None = None) -> Plan:
    """The plan of a recipe made by `plan_from_diffusers`, cut to its tail if there is one."""
    values = arguments.to_dict()
    name = values["scheduler"]["_class_name"]
    config = read_fields(name, {k: v for k, v in values["scheduler"].items() if k != "_class_name"})
    config["current_shift"] = values.get("shift")
    saved = values.get("table")
    table = np.asarray(saved["values"], dtype=saved["dtype"]) if saved else grids.table_of_config(name, config)
    steps, mu = require_steps(values["steps"]), values.get("mu")
    given = values.get("timesteps"), values.get("sigmas")
    history = values.get("history", "own"), tuple(values.get("cached", ()))
    made = make(Request(name, config, steps, *given, mu, table, tail, values.get("own"), *history))
    first = first_row(made.steps or made.grid.steps, tail)
    first = 0 if made.tailed else first
    init = start_from_noise(made.scale) if tail is None else start_from_latent(made.grid.level(first))
    return verify(Plan(made.rows(first), made.prediction, init, Recipe("from_diffusers", arguments, tail)))


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
