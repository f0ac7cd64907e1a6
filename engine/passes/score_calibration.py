"""Score calibration as plan data: the mean of the network's error is taken off its output, a constant tensor a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.engine.passes.guidance import rename
from vivace.engine.plan import Affine, Args, Coef, Op, Plan, Step, TensorRef
from vivace.engine.plan_io import with_tensors
from vivace.engine.planners.tables import check_measured
from vivace.engine.tables import reference, resolve
from vivace.engine.verify import verify
from vivace.errors import ModelError, PlanError

METHOD, WHAT = "score_calibration", "apply_score_calibration"
KEY = "score_calibration.{row}.{branch}"

Array = NDArray[Any]


def apply_score_calibration(plan: Plan, table: Any) -> Plan:
    """out <- out - E[out - target] in every row and branch, the expectation of the table at the row's log-SNR.

    For a network that predicts eps the target's mean is 0, so this is eps - E[eps]: a score has mean 0 over its data.
    The mean is linear in lam between the log-SNRs of the table and constant beyond; a row from pure noise (alpha = 0)
    stays. A mean that is 0 everywhere changes nothing.

    Args:
        plan: with its guidance applied already, since every branch has its own mean; bound or not.
        table: of `calibrate_score_calibration`, or its file; arrays "lam" [N] increasing, and "cond", "uncond"
            [N, *latent] where the plan has these branches.
    Returns: the plan with a bias per row; its recipe names this pass.
    Raises: ModelError (another method, arrays that do not fit); PlanError (applied already, a branch not measured).
    Source: Pang et al. 2023, eq. 12 and section 3.3.
    """
    known = reference(WHAT, table, METHOD)
    check_measured(WHAT, known, plan)
    means = _Means.of(resolve(WHAT, known, METHOD).arrays)
    if any(key.startswith("score_calibration.") for key in plan.arrays):
        raise PlanError(f"{WHAT}: the plan is calibrated already; start from the plan without it")
    arrays: dict[str, Array] = {}
    steps = tuple(_calibrated(row, step, means, arrays) for row, step in enumerate(plan.steps))
    recipe = plan.recipe
    if recipe is not None:
        recipe = replace(recipe, passes=(*recipe.passes, (WHAT, Args.of({"table": known}))))
    return verify(replace(with_tensors(plan, arrays) if arrays else plan, steps=steps, recipe=recipe))


class _Means:
    """Means by branch over lam."""

    def __init__(self, lam: Array, branches: dict[str, Array]) -> None:
        self.lam, self.branches = lam, branches

    @classmethod
    def of(cls, arrays: Any) -> _Means:
        """Those of a table. Raises ModelError."""
        lam = np.asarray(arrays["lam"], np.float64) if "lam" in arrays else np.zeros(0)
        branches = {name: np.asarray(arrays[name]) for name in ("cond", "uncond") if name in arrays}
        fits = lam.ndim == 1 and len(lam) and "cond" in branches and (np.diff(lam) > 0.0).all()
        same = {array.shape for array in branches.values()}
        if not fits or len(same) != 1 or not all(array.shape[:1] == lam.shape for array in branches.values()):
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ModelError(f"{WHAT}: the table's arrays ({shapes or 'none'}) do not fit one another; calibrate again")
        if not all(np.isfinite(array).all() for array in (lam, *branches.values())):
            raise ModelError(f"{WHAT}: the table holds NaN or infinity; calibrate again")
        return cls(lam, branches)

    def at(self, branch: str, lam: float) -> Array:
        """The mean of a branch at lam: [*latent]."""
        values = self.branches[branch]
        upper = int(np.searchsorted(self.lam, lam))
        if upper == 0 or upper == len(self.lam):
            return np.asarray(values[min(upper, len(self.lam) - 1)])
        share = (lam - self.lam[upper - 1]) / (self.lam[upper] - self.lam[upper - 1])
        mixed = (1.0 - share) * values[upper - 1].astype(np.float64) + share * values[upper]
        return np.asarray(mixed, dtype=values.dtype)


def _calibrated(row: int, step: Step, means: _Means, arrays: dict[str, Array]) -> Step:
    """The row on corrected outputs: slots of their own, since outputs may be kept from row to row."""
    if step.variant is None or step.alpha == 0.0:
        return step
    added: list[Op] = []
    names: dict[str, str] = {}
    for branch, out in zip(step.variant.branches, step.outs, strict=True):
        if branch not in means.branches:
            raise PlanError(
                f"{WHAT}: step {row} evaluates branch {branch!r}, the table has {', '.join(means.branches)}; calibrate "
                "with guidance, or use the plan without this branch"
            )
        mean = means.at(branch, step.lam)
        if not mean.any():
            continue
        names[out] = f"{out}_calibrated"
        added.append(Affine(names[out], ((out, 1.0), ("one", _bias(row, branch, mean, arrays)))))
    return replace(step, ops=(*added, *(rename(op, names) for op in step.ops))) if added else step


def _bias(row: int, branch: str, mean: Array, arrays: dict[str, Array]) -> Coef:
    """The mean with its sign turned, a number where it is the same for all elements."""
    if (mean == mean.flat[0]).all():
        return -float(mean.flat[0])
    key = KEY.format(row=row, branch=branch)
    arrays[key] = np.ascontiguousarray(-mean)
    return TensorRef(key)
