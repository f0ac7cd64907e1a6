"""`--cache NAME[:key=value,...]`: a planner of `vivace.planners` by its name, applied to a plan; plans as printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.passes import apply_block_cache, apply_guards
from vivace.engine.plan import Plan
from vivace.engine.planners import GUARDED, PLANNERS, plain_name
from vivace.errors import ArgumentError

TABLES = ("table", "errors")  # arguments that name a calibration table's file


def with_caches(plan: Plan, caches: list[str] | None) -> Plan:
    """The plan with caches in the order given: "fora:interval=2", "magcache:table=t.safetensors,store=bf16"."""
    for text in caches or ():
        name, _, rest = text.partition(":")
        known = {plain_name(each): apply_block_cache for each in PLANNERS}
        known |= {plain_name(each): apply_guards for each in GUARDED}
        if plain_name(name) not in known:
            raise ArgumentError(f"--cache {name!r}; use one of {', '.join([*PLANNERS, *GUARDED])}")
        plan = known[plain_name(name)](plan, name, **arguments_in(f"--cache {name}", rest))
    return plan


def arguments_in(option: str, rest: str, *, tables: Sequence[str] = TABLES) -> dict[str, Any]:
    """key=value pairs between commas outside of brackets; values are JSON, a+b is a list, else text.

    option: for messages; rest: the pairs; tables: keys whose values are files of tables, which are read.
    """
    out: dict[str, Any] = {}
    for pair in _pairs(rest):
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier() or key in out:
            raise ArgumentError(f"{option}: {pair!r:.40}; write key=value,key=value, each key once")
        out[key] = CalibrationTable.load(Path(value)) if key in tables and not value.startswith("[") else _value(value)
    return out


def _pairs(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets."""
    parts, depth = [""] if text else [], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.split("+") if "+" in text else text


def cached_summary(plan: Plan) -> dict[str, Any]:
    """What caches cost and save, for a bound plan: bytes of a picture (None: unknown), share of work computed."""
    from vivace.engine.caching import cache_bytes, computed_share

    if plan.binding is None:
        return {}
    return {"cache_bytes": cache_bytes(plan), "computed_share": computed_share(plan)}


def cached_line(plan: Plan) -> str:
    """The line under a printed plan that has caches; empty without."""
    found = cached_summary(plan)
    cached = any(rule.action is not None for variant in plan.variants for rule in variant.rules)
    if not cached:
        return ""
    if not found:
        return "caches  bind the plan (--bind) to know their bytes"
    size = "size unknown" if found["cache_bytes"] is None else f"{found['cache_bytes'] / 1e6:.3g} MB a picture"
    guards = any(step.guard is not None for step in plan.steps)
    return f"caches  {size}, {found['computed_share']:.1%} of the work computed{' if no guard fires' if guards else ''}"


def printed(plan: Plan) -> str:
    """A plan as text, with the line about its caches."""
    return "\n".join(part for part in (str(plan), cached_line(plan)) if part)


def summary(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "hash": plan.hash,
        "prediction": plan.prediction,
        "rows": len(plan.steps),
        "nfe": plan.nfe,
        "branch_evals": plan.branch_evals,
        "variants": len(plan.variants),
        "bound": plan.binding is not None,
        "inputs": [ref.name for ref in plan.inputs],
        "timesteps": [step.timestep for step in plan.steps],
        "text": str(plan).splitlines(),
        **cached_summary(plan),
    }
