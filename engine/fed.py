"""Further numbers that a network is fed beside latent and timestep: the embedded scale of distilled guidance.

They are part of a request's condition, so that everything that hands conditions on hands them on too, and samples of
one launch may have different ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vivace.engine.plan import InputRef, Plan
from vivace.errors import ArgumentError

if TYPE_CHECKING:
    from vivace.engine.denoiser import Denoiser


def with_inputs(denoiser: Denoiser, plan: Plan, condition: Any, values: Mapping[str, float]) -> Any:
    """A request's condition with the numbers that its plan's rows feed; itself where they feed none.

    values: numbers of the request by input name. Raises ArgumentError for one that was given as a tensor.
    """
    numbers = {}
    for name, coef in inputs_of(plan):
        if isinstance(coef, InputRef):
            if coef.name not in values:
                raise ArgumentError(f"request: {coef.name} is a tensor; the network is fed one number, so give that")
            numbers[name] = values[coef.name]
        else:
            numbers[name] = float(coef)
    feed: Any = getattr(denoiser, "feed", None)
    return feed(condition, numbers) if numbers else condition


def inputs_of(plan: Plan) -> tuple[tuple[str, Any], ...]:
    """What the rows of a checked plan feed, the same in each."""
    return next((step.net_inputs for step in plan.steps if step.variant is not None), ())


def why_not_fed(denoiser: Any, plan: Plan, row: int) -> str:
    """What of a row's network inputs the model cannot be fed; empty when there is nothing."""
    step = plan.steps[row]
    if step.variant is None:
        return ""
    known: frozenset[str] | None = getattr(denoiser, "takes", frozenset())  # None: whatever there is
    for name, coef in step.net_inputs:
        if known is not None and name not in known:
            there = ", ".join(sorted(known)) or "none"
            return f"network input {name!r} (this model's further inputs: {there})"
        if not isinstance(coef, (float, InputRef)):
            return f"network input {name!r} that is no number"
    return "" if step.net_inputs == inputs_of(plan) else "network inputs that change from row to row"
