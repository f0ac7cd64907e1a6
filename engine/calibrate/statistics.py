"""Empirical model statistics for DPM-Solver-v3, from evaluations alone: no derivative of the network is taken.

On N log-SNRs, over K noised data x = alpha x0 + sigma z, elementwise, with eps, x0 the network's predictions at x:
  l = E[sigma J v * v] = 1 - E[alpha J0 v * v]      J = d eps / dx, J0 = d x0 / dx, v random signs
  s = cov(f, f') / var(f),  b = E[f'] - s E[f]      f = (sigma eps - l x)/alpha = -x0 - (l - 1) x/alpha
f' = df/d lam along the probability-flow ODE. J0 v and the derivative of x0 along the ODE are central differences: five
evaluations a sample and log-SNR. f and f' are linear in (x0, x0', x) once l is known, so the moments of these are all
that is kept of a log-SNR. They are taken of x0: of eps, terms of the size sigma/alpha would cancel at much noise.
Source: Zheng et al. 2023 (DPM-Solver-v3), eq. 8 to 11 and appendix C.1; Hutchinson 1989 (the diagonal by signs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial as partial_of
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.calibrate.problem import BATCH, Problem
from vivace.engine.calibrate.resume import Partial
from vivace.engine.calibrate.states import Noised, data_of, parts_of, span_of, told_of
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.calibrate.walk import described, require_count
from vivace.engine.solvers.rows import first_order
from vivace.engine.tables import KIND
from vivace.engine.timesteps import choose
from vivace.errors import ArgumentError

METHOD = "dpm_solver_v3"
SHARES = ("element", "channel", "all")
PROBE = 0.05  # length of the probe v, in sigma
STRIDE = 0.05  # longest half-width in lam of the difference along the ODE
# Least variance of f, in squares of its parts: below it f is the same for all data, and s means nothing.
FLOOR = 1e-12
# Means over samples, in the order in which they are kept: l - 1, x0, its derivative, x/alpha, and products.
SUMS = ("lean", "p", "d", "y", "pp", "pd", "py", "dy", "yy")

Array = NDArray[np.float64]
Progress = Callable[[str, int, int], None]


def calibrate_dpm_solver_v3(
    problem: Problem,
    *,
    nodes: int = 60,
    samples: int = 256,
    share: str = "element",
    fixed_l: float | None = None,
    data: Any = None,
    progress: Progress | None = None,
    resume: str | PathLike[str] | None = None,
) -> CalibrationTable:
    """The statistics of a model as the table of `dpm_solver_v3`: any number of steps, any grid.

    Args:
        problem: network, prompts, guidance; the statistics are those of the guided prediction.
        nodes: N + 1 log-SNRs evenly over the trained range; samples: K. The paper has N 120 to 1200 and K 1024 to 4096,
            and finds that K matters more.
        share: "element" as in the paper; "channel", "all": moments averaged over the elements of a channel, or of the
            latent, before the division: less noise from few samples, numbers instead of tensors with "all".
        fixed_l: l is this number and not measured (the paper: 1 for ImageNet-256).
        data: x0 [samples, ...], sample j of prompt j mod their number; None: the problem's own runs of 25 evaluations.
        progress: called with (what, done, in all); resume: file of work under way.
    Cost: 5 samples nodes evaluations (3 with fixed_l), and the runs.
    Raises: ArgumentError, ShapeError.
    """
    require_count("dpm_solver_v3: nodes", nodes, 2)
    choose("dpm_solver_v3: share", share, SHARES)
    if fixed_l is not None and not (isinstance(fixed_l, (int, float)) and math.isfinite(fixed_l)):
        raise ArgumentError(f"dpm_solver_v3: fixed_l must be a number or None, got {fixed_l!r}")
    arrays: dict[str, NDArray[Any]] = {}
    told = described(problem, METHOD, require_count("dpm_solver_v3: samples", samples, 2), arrays)
    told |= {"nodes": nodes, "share": share, "fixed_l": fixed_l, "data": told_of(data)}
    work = {name: value for name, value in told.items() if name not in ("share", "versions")}
    lams = np.linspace(*span_of(problem), nodes)
    with Partial(resume, {**work, "fingerprint": problem.fingerprint}) as partial:
        found = Noised(problem, _data(partial, problem, samples, data))
        sums = []
        for number, lam in enumerate(lams):
            if progress is not None:
                progress("log-SNRs", number, nodes)
            measured = partial_of(_moments, found, float(lam), lams[1] - lams[0], fixed_l)
            sums.append(np.asarray(partial.once(f"moments.{number}", measured), dtype=np.float64))
    if progress is not None:
        progress("log-SNRs", nodes, nodes)
    kept = np.float64 if found.data.element_size() == 8 else np.float32
    made = statistics_of(lams, np.stack(sums), share)
    arrays |= {"lam": lams, **{name: np.ascontiguousarray(values, kept) for name, values in made.items()}}
    return CalibrationTable(KIND, problem.fingerprint, arrays, told)


def _data(partial: Partial, problem: Problem, samples: int, data: Any) -> Tensor:
    """x0, kept with the work so that it is not drawn again."""
    kept = partial.once("data", lambda: data_of(problem, samples, data).cpu().numpy())
    return data_of(problem, samples, kept)


def _moments(found: Noised, lam: float, spacing: float, fixed_l: float | None) -> Array:
    """Means over samples of `SUMS` at a log-SNR, float64 [9, ...]."""
    stride = min(STRIDE, 0.5 * spacing)
    here, low, high = found.level(lam), found.level(lam - stride), found.level(lam + stride)
    total: Any = 0.0
    for part in parts_of(len(found.data), BATCH):
        x = found.states(here, part)
        p = found.x0(x, here, part)
        ends = []
        for there in (low, high):
            keep, weight = first_order((here.alpha, here.sigma), (there.alpha, there.sigma))
            ends.append(found.x0(keep * x + weight * p, there, part))
        d = (ends[1] - ends[0]) / (high.lam - low.lam)
        if fixed_l is None:
            v, length = found.probe[part], PROBE * here.sigma
            change = found.x0(x + length * v, here, part) - found.x0(x - length * v, here, part)
            lean = -here.alpha / (2.0 * length) * change * v
        else:
            lean = torch.full_like(x, fixed_l - 1.0)
        lean, p, d, y = (value.double() for value in (lean, p, d, x / here.alpha))
        summed = [value.sum(0) for value in (lean, p, d, y, p * p, p * d, p * y, d * y, y * y)]
        total = total + torch.stack(summed).cpu().numpy()
    return np.asarray(total / len(found.data))


def statistics_of(lams: Array, moments: Array, share: str = "element") -> dict[str, Array]:
    """l, s, b [N, ...] from moments [N, 9, ...] in the order of `SUMS`; the formulas at the head of the file.

    With D = -f = x0 + (l - 1) y, y = x/alpha: D' = x0' + l' y - (l - 1) (y - x0), since y' = x0 - y along the ODE; so
    s = cov(D, D') / var(D) and b = s E[D] - E[D'].
    """
    found = dict(zip(SUMS, np.moveaxis(moments, 1, 0), strict=True))
    lean = _shared(found["lean"], share)
    slope = np.gradient(lean, lams, axis=0)
    one: dict[str, Any] = {"p": 1.0, "y": lean}
    two: dict[str, Any] = {"p": lean, "d": 1.0, "y": slope - lean}

    def mean(parts: dict[str, Any]) -> Any:
        return _shared(sum(weight * found[name] for name, weight in parts.items()), share)

    def product(a: str, b: str) -> Any:
        both = a + b if a + b in found else b + a
        return found[both] - found[a] * found[b]

    spread, along = (
        _shared(sum(one[a] * second[b] * product(a, b) for a in one for b in second), share) for second in (one, two)
    )
    size = _shared(found["pp"] + lean**2 * found["yy"], share)
    s = along / (spread + FLOOR * size)
    return {"l": lean + 1.0, "s": s, "b": s * mean(one) - mean(two)}


def _shared(values: Array, share: str) -> Array:
    """Means over the elements that share one value, spread over them again: [N, ...]."""
    if share == "element" or values.ndim == 1:
        return values
    axes = tuple(range(2 if share == "channel" else 1, values.ndim))
    return np.broadcast_to(values.mean(axis=axes, keepdims=True), values.shape) if axes else values
