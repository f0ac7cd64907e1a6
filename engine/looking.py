"""Which rows guards look at, and by which metrics: what follows from the plan alone.

"first_block" and "modulated_input" are measured in the first blocks of the row (`engine.guards`); "guidance_cosine" on
what earlier rows predicted (`engine.guiding`), so that no block is looked at and any network will do.
"""

from __future__ import annotations

from vivace.engine.plan import Guard, Plan

METRICS = ("first_block", "modulated_input")
EVERY_ROW = ("modulated_input",)  # metrics that compare with the row before, computed or not
METRIC = "guidance_cosine"
HEARD = (METRIC,)  # metrics of predictions, which any model has


def watched(plan: Plan, row: int) -> Guard | None:
    """The guard that looks at a row: its own, or the next row's that compares with it; None: nobody looks."""
    step = plan.steps[row]
    if step.variant is None or (step.guard is not None and step.guard.metric in HEARD):
        return None
    later = (later.guard for later in plan.steps[row:] if later.guard is not None)
    return step.guard or next((guard for guard in later if guard.metric in METRICS), None)


def estimates(plan: Plan) -> bool:
    """Some guard on `METRIC` leaves out what is then estimated."""
    return any(s.guard is not None and s.guard.metric == METRIC and s.guard.params for s in plan.steps)


def hears(plan: Plan) -> bool:
    """Some row of a plan has a guard on `METRIC`."""
    return plan.once("hears", lambda: any(s.guard is not None and s.guard.metric == METRIC for s in plan.steps))
