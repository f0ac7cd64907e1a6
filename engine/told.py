"""What receipts say of plans that do not simply go from noise to data: inversions, and steps in closed form."""

from __future__ import annotations

from vivace.engine.low_rank import maps_of
from vivace.engine.plan import Args, Plan
from vivace.engine.solvers.bdia import BEFORE


def told(plan: Plan) -> dict[str, str]:
    """Lines of a receipt by name; none for most plans."""
    lines: dict[str, str] = {}
    for name, args in () if plan.recipe is None else plan.recipe.passes:
        if name == "invert":
            lines["inverted"] = _inverted(plan, args)
        elif name == "retrace":
            lines["retraced"] = f"{_rows(plan)} from {_states(plan)} that an inversion left"
        elif name == "apply_teleport" and (ranks := [_rank(plan, gains) for gains, _ in maps_of(plan)]):
            given = args.to_dict()
            of = "" if given["prompt"] is None else f", prompt {given['prompt']!r}"
            lines["teleport"] = (
                f"closed form down to sigma {plan.steps[1].sigma:.4g}, alpha {plan.steps[1].alpha:.4g}, then "
                f"{_rows(plan)}; rank {ranks[0]}, table {given['table']['sha256'][:12]}{of}"
            )
    return lines


def _inverted(plan: Plan, args: Args) -> str:
    given, levels = args.to_dict(), {(step.alpha, step.sigma) for step in plan.steps}
    if BEFORE not in plan.results:
        each = given["evaluations"]
        return f"{len(levels)} steps from a picture, estimated ({each} evaluation{'s' * (each > 1)} each)"
    first = "a pair of states" if given["start"] == "pair" else "a picture, whose neighbour is estimated"
    return f"{len(levels)} steps from {first}, exact to rounding; left {_states(plan)}"


def _rows(plan: Plan) -> str:
    return f"{plan.nfe} evaluation{'s' * (plan.nfe > 1)}"


def _states(plan: Plan) -> str:
    return f"the pair (x, {BEFORE})" if BEFORE in plan.results else "the state"


def _rank(plan: Plan, gains: str) -> int:
    return next(info.shape[0] for info in plan.tensors if info.key == gains)
