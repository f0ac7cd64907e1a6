"""Methods that are calibrated: their calibrators by name, the options of each, and how a plan takes the table.

A calibrator is `calibrate_<what>(problem, *, option=default, ..., progress=None, resume=None) -> CalibrationTable` of
kind "solver" whose metadata names the method: its keywords are its options, `progress(what, done, total)` is told how
far it is, and `resume` is the file of work under way (see `resume.Partial`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Integral, Real
from os import PathLike
from typing import Any, get_args, get_origin, get_type_hints

from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.tables import KIND, check_method
from vivace.engine.timesteps import choose
from vivace.errors import ArgumentError

Progress = Callable[[str, int, int], None]  # (what, done, in all)
OWN = ("progress", "resume")  # keywords of calibrators that are no options


@dataclass(frozen=True, slots=True)
class Method:
    """calibrator: "module:function" in `engine.calibrate`; about: one line; taken: "solver" (`make_plan(solver=name,
    table=)`) or the pass that takes the table (`passes.<taken>(plan, table)`)."""

    calibrator: str
    about: str
    taken: str = "solver"


METHODS: Mapping[str, Method] = {
    "dpm_solver_v3": Method("statistics:calibrate_dpm_solver_v3", "empirical model statistics"),
    "score_calibration": Method("mean_score:calibrate_score_calibration", "mean error", "apply_score_calibration"),
    "dc_solver": Method("compensation:calibrate_dc_solver", "a compensation ratio a step"),
    "iia": Method("iia:calibrate_iia", "shifts of a step's coefficients, by least squares"),
    "time_alignment": Method("alignment:calibrate_time_alignment", "timesteps to feed", "apply_time_alignment"),
    "linear_ag": Method("linear_ag:calibrate_linear_ag", "weights of an estimated branch", "apply_linear_ag"),
    "teleport": Method("gaussian:calibrate_teleport", "mean and low-rank covariance of pictures", "apply_teleport"),
}


def calibrator_of(name: str) -> Callable[..., CalibrationTable]:
    """The function of a method. Raises ArgumentError for an unknown one."""
    module, _, function = METHODS[choose("calibrate: method", name, tuple(METHODS))].calibrator.partition(":")
    made: Callable[..., CalibrationTable] = getattr(import_module(f"vivace.engine.calibrate.{module}"), function)
    return made


def method_options(name: str) -> dict[str, Any]:
    """Options of a method's calibrator with their defaults (`inspect.Parameter.empty`: must be given)."""
    found = inspect.signature(calibrator_of(name)).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY and p.name not in OWN}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ArgumentError for an unknown method, an option that it has not or of another type than it takes, or one
    that it needs and was not given."""
    known, types = method_options(name), get_type_hints(calibrator_of(name))
    for option, value in options.items():
        choose(f"calibrate {name}: option", option, tuple(known))
        if not _fits(value, types.get(option, Any)):
            raise ArgumentError(f"calibrate {name}: {option} must be {_spelled(types[option])}, got {value!r:.60}")
    for option, default in known.items():
        if default is inspect.Parameter.empty and option not in options:
            raise ArgumentError(f"calibrate {name}: needs {option}; give it")


def _fits(value: object, wanted: Any) -> bool:
    """A value is of an option's type: numbers of any library count, a truth value is no number."""
    parts, origin = get_args(wanted), get_origin(wanted)
    if origin is Sequence:
        return (
            not isinstance(value, str) and hasattr(value, "__len__") and all(_fits(v, parts[0]) for v in _each(value))
        )
    if origin is dict:
        return isinstance(value, Mapping)
    if origin is not None:
        return any(_fits(value, part) for part in parts)
    if wanted in (int, float):
        return isinstance(value, Integral if wanted is int else Real) and not isinstance(value, bool)
    return wanted is Any or isinstance(value, wanted)


def _each(value: Any) -> list[Any]:
    return list(value.tolist() if hasattr(value, "tolist") else value)


def _spelled(wanted: Any) -> str:
    """An option's type in words."""
    if get_origin(wanted) is Sequence:
        return f"a list of {_spelled(get_args(wanted)[0]).removeprefix('a ')}s"
    if get_origin(wanted) is dict:
        return "a mapping of names to values"
    if parts := get_args(wanted):
        return " or ".join(_spelled(part) for part in parts)
    names = {int: "a whole number", float: "a number", str: "a name", bool: "true or false", type(None): "nothing"}
    return names.get(wanted, str(wanted))


def calibrate(
    name: str,
    problem: Problem,
    *,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
    **options: Any,
) -> CalibrationTable:
    """The table of a method, measured on a problem.

    Args:
        name: in METHODS; options: of its calibrator (`method_options`).
        progress: called with (what, done, in all). resume: file in which work under way is kept, for methods that take
            long; a run that was stopped goes on from it. It is the caller's to remove.
    Raises: ArgumentError, before any work, for an unknown method, option or value; ModelError.
    """
    check_options(name, options)
    function = calibrator_of(name)
    own = {"progress": progress, "resume": resume}
    has = inspect.signature(function).parameters
    table = function(problem, **options, **{key: value for key, value in own.items() if key in has})
    check_method(f"calibrate {name}", table, name)
    table.check(KIND, problem.fingerprint)
    return table
