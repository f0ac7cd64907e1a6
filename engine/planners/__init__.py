"""Planners: rules by which `passes.apply_block_cache` and `passes.apply_guards` write caches into a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vivace.engine.planners.base import Planner, Schedule, Track
from vivace.engine.planners.fixed import Fora, Scheduled, StepMask, TaylorSeer
from vivace.engine.planners.guarded import DBCache, FirstBlockCache, Guarded, TeaCache
from vivace.engine.planners.measured import MagCache, SmoothCache
from vivace.engine.planners.optimal import OptimalCache
from vivace.engine.planners.unet import DeepCache, FasterDiffusion
from vivace.errors import ArgumentError

__all__ = [
    "DBCache",
    "DeepCache",
    "FasterDiffusion",
    "FirstBlockCache",
    "Fora",
    "Guarded",
    "MagCache",
    "OptimalCache",
    "Planner",
    "Schedule",
    "Scheduled",
    "SmoothCache",
    "StepMask",
    "TaylorSeer",
    "TeaCache",
    "Track",
    "make_guarded",
    "make_planner",
]

PLANNERS: Mapping[str, type[Planner]] = {
    made.__name__: made
    for made in (Fora, TaylorSeer, SmoothCache, MagCache, StepMask, DeepCache, FasterDiffusion, OptimalCache, Scheduled)
}
GUARDED: Mapping[str, type[Guarded]] = {made.__name__: made for made in (FirstBlockCache, TeaCache, DBCache)}


def make_planner(planner: Any, arguments: Mapping[str, Any]) -> Planner:
    """A planner as it is, or one of a name ("Fora", "fora") with arguments. Raises ArgumentError."""
    made: Planner = _made("apply_block_cache: planner", Planner, PLANNERS, planner, arguments)
    return made


def make_guarded(guarded: Any, arguments: Mapping[str, Any]) -> Guarded:
    """A run-time cache as it is, or one of a name ("FirstBlockCache", "tea_cache"). Raises ArgumentError."""
    made: Guarded = _made("apply_guards: guards", Guarded, GUARDED, guarded, arguments)
    return made


def _made(what: str, kind: Any, known: Mapping[str, Any], given: Any, arguments: Mapping[str, Any]) -> Any:
    if isinstance(given, kind):
        if arguments:
            raise ArgumentError(f"{what} {type(given).__name__} and arguments {sorted(arguments)}; give these to it")
        return given
    names = {plain_name(name): made for name, made in known.items()}
    if not isinstance(given, str) or plain_name(given) not in names:
        raise ArgumentError(f"{what} {given!r:.60}; use one of {', '.join(known)}, or an object of vivace.planners")
    made = names[plain_name(given)]
    fields = made.__dataclass_fields__
    unknown = [name for name in arguments if name not in fields]
    needed = [n for n, f in fields.items() if n not in arguments and f.default is f.default_factory]
    if unknown or needed:
        raise ArgumentError(
            f"{what} {made.__name__}: arguments {sorted(arguments)}; it takes {', '.join(fields)}"
            + (f", and needs {', '.join(needed)}" if needed else "")
        )
    return made(**arguments)


def plain_name(name: str) -> str:
    """A name without case, underscores and hyphens: "taylor_seer" is "TaylorSeer"."""
    return name.lower().replace("_", "").replace("-", "")
