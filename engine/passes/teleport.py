"""The first steps in closed form: for Gaussian data the probability-flow ODE is a low-rank affine map of the noise.

x' = alpha' m + G (x - alpha m),   G = g(rest) I + sum_k (g(v_k) - g(rest)) u_k u_k^T,
g(v) = sqrt((alpha'^2 v + sigma'^2) / (alpha^2 v + sigma^2))
for data N(m, rest I + sum_k (v_k - rest) u_k u_k^T), from level (alpha, sigma) to (alpha', sigma').
Source: Wang and Vastola 2024 (analytic teleportation), written for any (alpha, sigma) and with a variance for what the
basis leaves out, as in probabilistic PCA (Tipping and Bishop 1999).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.engine import tables
from vivace.engine.low_rank import KIND
from vivace.engine.plan import Affine, Args, Plan, Recipe, Step, TensorRef, Transform
from vivace.engine.plan_io import with_tensors
from vivace.engine.solvers.rows import Level, require_number
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, PlanError

NAME, METHOD = "apply_teleport", "teleport"
SLOT = "low"  # what the map makes of x
SHIFT, GAINS, BASIS = (f"{METHOD}.{part}" for part in ("shift", "gains", "basis"))
Array = NDArray[np.float64]


def apply_teleport(
    plan: Plan, table: Any, *, share: float = 0.2, sigma: float | None = None, prompt: Any = None
) -> Plan:
    """One row without evaluation in place of the first steps; the others planned anew, so that warm-up restarts.

    Args:
        plan: of a recipe, from noise, unbound, without caches, tokens or guards (they come after); guided or not.
        table: of `calibrate_teleport`: a file, the table, or its reference in a recipe.
        share: of the plan's steps that the row replaces, int(share * steps) of them, 1 at least.
        sigma: instead: the row ends at the first level of the plan with sigma/alpha at or below it.
        prompt: whose mean is taken, of a table with one for each; None: the mean of all.
    Returns: a plan with fewer evaluations that fits the table's model only; its recipe names this pass. Of a tail,
        which does not start from noise alone, the pass does nothing.
    Raises: ArgumentError, PlanError; ModelError for a table of something else.
    """
    reference = tables.reference(NAME, table, METHOD)
    known = tables.resolve(NAME, reference, METHOD)
    require_number(NAME, "share", share, 0.0, 1.0)
    if sigma is not None and require_number(NAME, "sigma", sigma) == 0.0:
        raise ArgumentError(f"{NAME}: sigma must be above 0, got {sigma!r}")
    mean, basis, variances, rest = statistics(known.arrays, known.metadata, prompt)
    recipe = plan.recipe
    if recipe is None:
        raise PlanError(f"{NAME}: the plan has no recipe to plan its last rows from; make it with make_plan")
    args = {"table": reference, "share": float(share), "sigma": sigma, "prompt": prompt}
    named = replace(recipe, passes=(*recipe.passes, (NAME, Args.of(args))))
    if recipe.tail is not None:
        return replace(plan, recipe=named)
    if plan.binding is not None:
        raise PlanError(f"{NAME}: the plan is bound; teleport the unbound plan and bind it then")
    if any(name == NAME for name, _ in recipe.passes):
        raise PlanError(f"{NAME}: the plan is teleported already; start from the plan without")
    later = _last(plan, recipe, share, sigma)
    start, end = plan.steps[0], later.steps[0]
    arrays, unit = _map(mean, basis, variances, rest, (start.alpha, start.sigma), (end.alpha, end.sigma))
    ops = (
        Affine(SLOT, (("x", 1.0),)),
        Transform(KIND, SLOT, params=(("gains", TensorRef(GAINS)), ("basis", TensorRef(BASIS)))),
        Affine("x", (("x", unit), (SLOT, 1.0), ("one", TensorRef(SHIFT)))),
    )
    jump = Step(start.timestep, start.alpha, start.sigma, ops, variant=None)
    made = replace(later, steps=(jump, *later.steps), init=plan.init, recipe=named)
    return verify(with_tensors(made, arrays))


def statistics(
    arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any], prompt: Any = None
) -> tuple[Array, NDArray[Any], Array, float]:
    """(mean [*latent], basis [r, *latent], variances [r], variance of the rest) of a table, for a prompt or all."""
    which, spread = 0, "all"
    if prompt is not None:
        prompts = list(metadata["prompts"]) if metadata.get("per_prompt") else []
        if prompt not in prompts:
            raise ArgumentError(f"{NAME}: the table has no mean of prompt {prompt!r}; calibrate with per_prompt=True")
        which, spread = 1 + prompts.index(prompt), "within"
    means, variances, rest = (
        np.asarray(arrays[name], dtype=np.float64) for name in ("means", f"variances.{spread}", f"rest.{spread}")
    )
    return means[which], np.asarray(arrays[f"basis.{spread}"]), variances, float(rest[0])


def gain(variance: Any, start: Level, end: Level) -> Any:
    """sqrt((alpha'^2 v + sigma'^2) / (alpha^2 v + sigma^2)): how far a direction of variance v shrinks."""
    return np.sqrt((end[0] ** 2 * variance + end[1] ** 2) / (start[0] ** 2 * variance + start[1] ** 2))


def _map(
    mean: Array, basis: NDArray[Any], variances: Array, rest: float, start: Level, end: Level
) -> tuple[dict[str, NDArray[Any]], float]:
    """Side-car of the map x' = unit x + sum_k gains[k] <u_k, x> u_k + shift, and `unit`."""
    unit = float(gain(rest, start, end))
    gains = np.asarray(gain(variances, start, end) - unit)
    flat = basis.reshape(len(basis), -1).astype(np.float64)
    moved = unit * mean + ((gains * (flat @ mean.reshape(-1))) @ flat).reshape(mean.shape)
    arrays = {SHIFT: end[0] * mean - start[0] * moved, GAINS: gains, BASIS: basis}
    return arrays, unit


def _last(plan: Plan, recipe: Recipe, share: float, sigma: float | None) -> Plan:
    """The rows of `plan` that are left, as a tail. Raises ArgumentError when there is nothing to leave out."""
    if any(slot != "noise:0" for op in plan.init for slot, _ in op.terms):
        raise PlanError(f"{NAME}: the plan does not start from noise alone")
    count = int(recipe.arguments.to_dict()["steps"])
    if sigma is None:
        skipped = int(share * count)
        if not 0 < skipped < count:
            raise ArgumentError(
                f"{NAME}: share {share} of {count} steps leaves out {skipped}; it must leave out at least one and keep "
                f"one, so 1/{count} <= share < 1"
            )
        return plan.tail((count - skipped + 0.5) / count)
    low, high = 1, count  # the first step at or below sigma is in low..high; count: none
    while low < high:
        middle = (low + high) // 2
        if _ratio(plan.tail((count - middle + 0.5) / count).steps[0]) <= sigma:
            high = middle
        else:
            low = middle + 1
    if low == count or _ratio(plan.steps[0]) <= sigma:
        raise ArgumentError(f"{NAME}: no step of the plan starts between its first level and sigma/alpha {sigma}")
    return plan.tail((count - low + 0.5) / count)


def _ratio(step: Step) -> float:
    return step.sigma / step.alpha if step.alpha else math.inf
