"""`--apply PASS[:key=value,...]`: a pass of `vivace.passes` by its name, applied to a plan."""

from __future__ import annotations

import inspect
from typing import Any

from vivace.cli.caches import arguments_in
from vivace.engine import passes
from vivace.engine.plan import Plan
from vivace.engine.timesteps import choose
from vivace.errors import ArgumentError

PREFIX = "apply_"


def with_passes(plan: Plan, texts: list[str] | None) -> Plan:
    """The plan with passes in the order given: "momentum:beta=0.8", "score_calibration:table=t.safetensors".

    Raises: ArgumentError for an unknown pass or argument, whatever the pass raises.
    """
    known = tuple(name.removeprefix(PREFIX) for name in passes.__all__)
    for text in texts or ():
        name, _, rest = text.partition(":")
        name = choose("--apply", name.removeprefix(PREFIX), known)
        plan = _apply(plan, name, arguments_in(f"--apply {name}", rest, tables=()))
    return plan


def _apply(plan: Plan, name: str, arguments: dict[str, Any]) -> Plan:
    """One pass; its keywords are checked before it runs."""
    function = getattr(passes, name if name in passes.__all__ else PREFIX + name)
    has = list(inspect.signature(function).parameters)[1:]
    for key in arguments:
        choose(f"--apply {name}: argument", key, has)
    try:
        inspect.signature(function).bind(plan, **arguments)
    except TypeError as error:
        raise ArgumentError(f"--apply {name}: {error}") from None
    made: Plan = function(plan, **arguments)
    return made
