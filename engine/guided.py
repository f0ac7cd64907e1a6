"""What a run with Adaptive Guidance evaluated, for its receipt: the branches of rows by what guards decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vivace.engine.looking import hears

if TYPE_CHECKING:
    from vivace.engine.guards import Watch
    from vivace.engine.plan import Plan, Step


def ran(plan: Plan, watch: Watch | None, row: int) -> tuple[str, ...]:
    """Branches that some picture ran in a row that was evaluated."""
    step = plan.steps[row]
    fired = () if watch is None or not hears(plan) else _fired(watch, row)
    return step.guard.otherwise.branches if step.guard is not None and fired and all(fired) else step.branches


def evaluated(plan: Plan, watch: Watch | None, rows: Sequence[int]) -> int:
    """Branch evaluations of `rows` a picture; the mean, rounded up, where guards decided apart."""
    if watch is None or not hears(plan):
        return sum(len(plan.steps[row].branches) for row in rows)
    return math.ceil(sum(_of_pictures(plan.steps[row], watch, row) for row in rows) / watch.pictures)


def guidance(plan: Plan, watch: Watch | None, rows: Sequence[int]) -> dict[str, Any]:
    """What Adaptive Guidance left out; empty for other plans.

    branch_evals, of: of all pictures, run and planned; removed: share that was left out; stopped: by picture the first
    row without its unconditional branch, -1: none.
    """
    if watch is None or not hears(plan):
        return {}
    done = sum(_of_pictures(plan.steps[row], watch, row) for row in rows)
    planned = watch.pictures * sum(len(plan.steps[row].branches) for row in rows)
    fired = [(decision.row, decision.fired) for decision in watch.decisions]
    stopped = [next((row for row, each in fired if each[j]), -1) for j in range(watch.pictures)]
    removed = 1.0 - done / planned if planned else 0.0
    return {"branch_evals": done, "of": planned, "removed": removed, "stopped": stopped}


def spelled(found: dict[str, Any]) -> str:
    """One line of the printout."""
    rows = sorted(row for row in found["stopped"] if row >= 0)
    where = "in no row" if not rows else f"uncond first left out in rows {rows[0]} to {rows[-1]}, {len(rows)} pictures"
    return f"{found['branch_evals']}/{found['of']} branch evaluations, {found['removed']:.0%} removed; {where}"


def _fired(watch: Watch, row: int) -> tuple[bool, ...]:
    return next((decision.fired for decision in watch.decisions if decision.row == row), ())


def _of_pictures(step: Step, watch: Watch, row: int) -> int:
    """Branch evaluations of all pictures in a row."""
    fired = sum(_fired(watch, row)) if step.guard is not None else 0
    fewer = len(step.guard.otherwise.branches) if step.guard is not None else 0
    return fired * fewer + (watch.pictures - fired) * len(step.branches)
