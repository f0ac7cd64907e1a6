"""Momentum as plan data: a moving average of what the solver adds to x, in one slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vivace.engine.passes.steps_of import fresh_noise, level_after, update_op
from vivace.engine.plan import Affine, Args, Op, Plan, Step, writes
from vivace.engine.solvers.rows import Level, first_order, first_order_eps, require_number
from vivace.engine.timesteps import choose
from vivace.engine.token_rows import focused
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME = "apply_momentum"
KINDS = {"heavy_ball": first_order, "nesterov": first_order_eps}
AVERAGE, BASE = "w", "w_base"  # slots: the moving average; x as the solver alone would step


def apply_momentum(plan: Plan, beta: float = 0.9, *, kind: str = "heavy_ball") -> Plan:
    """w <- (1 - beta) w + beta e, x' = a x + b w, with e = (x'_solver - a x) / b the solver's own step.

    (a, b) is the first-order step, on x0: e is the x0 that it would take for this step, the slope of x/sigma in
    alpha/sigma. An average of eps, the slope of x/alpha in sigma/alpha, gives the same x: where two steps meet,
    alpha x0 + sigma eps = x for both, so for their average too. w starts as the first e, and again behind fresh noise.
    Args:
        plan: deterministic, guided or not, of any solver, several evaluations a step included; without masks and token
            rows, which come later.
        beta: in (0, 1]; 1 is the plan itself. The solver drops to order 1 with any beta below.
        kind: "heavy_ball", or "nesterov": x' = a x + b ((1 - beta) w + beta e), whose x does not end where w leads, so
            the forms differ: it is on eps, and begins behind alpha = 0.
    Returns: the plan; its recipe names this pass. The row that gives the result is the solver's own. Memory: one slot
        of sample size.
    Raises: ArgumentError; PlanError naming the row for fresh noise, masks, token rows or momentum already there.
    Source: Wizadwongsa and Suwajanakorn 2023 (arXiv 2307.11118), section 4.1 (heavy ball), appendix (Nesterov).
    """
    share = require_number(NAME, "beta", beta, 0.0, 1.0)
    if share == 0.0:
        raise ArgumentError(f"{NAME}: beta must be above 0; 1 is no momentum")
    choose(f"{NAME}: kind", kind, tuple(KINDS))
    if share == 1.0:
        return plan
    if any(writes(op) == AVERAGE for op in plan.ops()):
        raise PlanError(f"{NAME}: the plan has slot {AVERAGE!r} already; start from the plan without momentum")
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (NAME, Args.of({"beta": share, "kind": kind}))))
    return verify(replace(plan, steps=averaged(plan.steps, share, kind), recipe=recipe))


def averaged(steps: Sequence[Step], beta: float, kind: str) -> tuple[Step, ...]:
    """The rows with momentum."""
    made: list[Step] = []
    level, running = (0.0, 1.0), False
    for i, step in enumerate(steps):
        made.append(step)
        if step.x == "x" or step.variant is None:
            level = (step.alpha, step.sigma)
        end = level_after(steps, i)
        update = _update(i, step)
        if update is None:
            continue
        if step.variant is None and fresh_noise(step):
            running = False
        elif end is not None and end != level and (level[0] or kind == "heavy_ball"):
            made[-1] = _with_average(step, update, KINDS[kind](level, end), beta if running else 1.0, kind)
            running = True
    return tuple(made)


def _update(i: int, step: Step) -> tuple[int, Affine] | None:
    """The op that steps x, with its place; None in inner stages. Raises PlanError for what cannot have momentum."""
    if step.variant is not None and fresh_noise(step):
        raise PlanError(
            f"{NAME}: step {i} adds fresh noise; momentum is for deterministic solvers, such as ddim, eta=0"
        )
    if step.variant is not None and focused(step.variant):
        raise PlanError(f"{NAME}: step {i} computes some tokens; apply_tokens comes after this pass")
    found = update_op(step)
    if found is None and any(writes(op) == "x" for op in step.ops):
        raise PlanError(f"{NAME}: step {i} writes x more than once or not as a sum; apply_mask comes after this pass")
    return found


def _with_average(step: Step, found: tuple[int, Affine], first: Level, beta: float, kind: str) -> Step:
    """The row whose x goes by the average; beta 1: the average begins."""
    (place, update), (a, b) = found, first
    e: list[tuple[str, float]] = [(BASE, beta / b), ("x", -beta * a / b)]
    old = [(AVERAGE, 1.0 - beta)] if beta < 1.0 else []
    if beta == 1.0:
        x: list[tuple[str, float]] = [(BASE, 1.0)]
    elif kind == "nesterov":
        x = [("x", (1.0 - beta) * a), (AVERAGE, (1.0 - beta) * b), (BASE, beta)]
    else:
        x = [("x", a), (AVERAGE, b)]
    new: tuple[Op, ...] = (
        replace(update, dst=BASE),
        Affine(AVERAGE, tuple(term for term in (*old, *e) if term[1] != 0.0)),
        Affine("x", tuple(term for term in x if term[1] != 0.0)),
    )
    return replace(step, ops=(*step.ops[:place], *new, *step.ops[place + 1 :]))
