"""What passes over the solver's rule ask of rows: where a step ends, whether it adds noise, what history holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vivace.engine.plan import Affine, Plan, Step, writes
from vivace.engine.prediction import to_eps, to_x0

HISTORY = re.compile(r"m[0-9]+\Z")
CLOSE = 1e-9


def level_after(steps: Sequence[Step], row: int) -> tuple[float, float] | None:
    """(alpha, sigma) of slot x behind a row; None behind the last, whose level the rows do not tell."""
    following = (step for step in steps[row + 1 :] if step.x == "x" or step.variant is None)
    return next(((step.alpha, step.sigma) for step in following), None)


def fresh_noise(step: Step) -> bool:
    """The row draws noise beyond that of the start."""
    sums = (op for op in step.ops if isinstance(op, Affine))
    return any(slot.startswith("noise:") and slot != "noise:0" for op in sums for slot, _ in op.terms)


def kept_op(step: Step) -> tuple[int, Affine] | None:
    """The op that fills the row's history slot m<k> from the state evaluated and an output, with its place."""
    for k, op in enumerate(step.ops):
        if isinstance(op, Affine) and HISTORY.match(op.dst):
            return k, op
    return None


def update_op(step: Step) -> tuple[int, Affine] | None:
    """The only op that writes x, with its place; None where x stays, is written more often, or not as a sum."""
    places = [(k, op) for k, op in enumerate(step.ops) if writes(op) == "x"]
    if len(places) != 1:
        return None
    place, op = places[0]
    return (place, op) if isinstance(op, Affine) else None


def own_form(plan: Plan) -> str | None:
    """ "x0" or "eps", what slots m<k> hold, None for neither."""
    forms = (_form_of(plan.prediction, step) for step in plan.steps)
    return next((form for form in forms if form), None)


def _form_of(prediction: str, step: Step) -> str | None:
    kept = kept_op(step)
    if kept is None or step.alpha == 0.0 or step.sigma == 0.0:
        return None
    if sum(isinstance(op, Affine) and op.dst == kept[1].dst for op in step.ops) > 1:
        return "eps"  # of a changed x0
    q = next((coef for slot, coef in kept[1].terms if slot != step.x), None)
    if not isinstance(q, float):
        return None
    for form, convert in (("x0", to_x0), ("eps", to_eps)):
        if abs(convert(prediction, step.alpha, step.sigma)[1] - q) <= CLOSE * abs(q):
            return form
    return None
