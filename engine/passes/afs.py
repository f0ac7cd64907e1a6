"""The analytical first step as plan data: at the noise end the prediction is known without asking the network."""

from __future__ import annotations

from dataclasses import replace

from vivace.engine.plan import PREDICTIONS, Affine, Args, Plan, Step
from vivace.engine.solvers.rows import require_number
from vivace.engine.verify import verify
from vivace.errors import PlanError

NAME = "apply_afs"


def apply_afs(plan: Plan, variance: float = 0.0) -> Plan:
    """The first evaluation replaced by x0 = alpha v x / (alpha^2 v + sigma^2), eps = (x - alpha x0) / sigma.

    That is the prediction for data of mean 0 and variance v in every element; v = 0 says x0 = 0, eps = x / sigma. One
    evaluation less; everything behind it, guidance and history included, reads this in place of the output.
    Args:
        plan: guided or not. Comes before caches, tokens and guards. In a tail that begins below the noise end nothing
            is replaced.
        variance: v, of the data; 0 or more.
    Returns: the plan; its first row has no evaluation; its recipe names this pass.
    Raises: ArgumentError; PlanError for a plan of one evaluation, or whose first row keeps or guards something.
    Source: Dockhorn, Vahdat and Kreis 2022 (GENIE), section 4 (first step with x / sigma); Liu et al. 2023 (USF).
    """
    scale = require_number(NAME, "variance", variance)
    steps = list(plan.steps)
    recipe = plan.recipe
    if recipe is None or recipe.tail is None or recipe.tail >= 1.0:
        first = next(i for i, step in enumerate(steps) if step.variant is not None)
        _check(plan, first)
        steps[first] = _known(steps[first], plan.prediction, scale)
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of({"variance": scale}))))
    return verify(replace(plan, steps=tuple(steps), recipe=recipe))


def _check(plan: Plan, first: int) -> None:
    """Raise PlanError where the first evaluation is needed."""
    step = plan.steps[first]
    assert step.variant is not None, "the row evaluates"
    if first or plan.nfe < 2:
        what = "the plan has one evaluation" if plan.nfe < 2 else "the plan begins with a row without evaluation"
        raise PlanError(f"{NAME}: {what}; there is no first step to replace")
    if step.variant.rules or step.guard is not None:
        raise PlanError(f"{NAME}: step {first} keeps or guards something; this pass comes before caches and guards")


def _known(step: Step, prediction: str, variance: float) -> Step:
    """The row without evaluation: outs <- the known prediction."""
    alpha, sigma = step.alpha, step.sigma
    x0 = alpha * variance / (alpha**2 * variance + sigma**2)
    eps = (1.0 - alpha * x0) / sigma
    known = dict(zip(PREDICTIONS, (eps, x0, alpha * eps - sigma * x0, eps - x0), strict=True))
    outs = tuple(Affine(out, ((step.x, known[prediction]),)) for out in step.outs)
    return replace(step, variant=None, ops=(*outs, *step.ops), outs=("out",), x_scale=1.0, net_inputs=())
