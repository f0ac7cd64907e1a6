"""Denoisers in closed form, exact solutions, and what they measure: the order of every deterministic solver.

Data with a known density has a known E[x0 | x_t], so a solver can be judged without a network. A Gaussian has an exact
probability-flow solution besides; orders are measured on it. The mixture of seven modes is not linear in x; its
solution is computed until it no longer changes.

How an order is measured: log2 of the error at n steps over that at 2 n, uniform in lam = log(alpha/sigma) over [-4, 4].
The error is the largest along the trajectory of the root mean square over elements in units of the marginal's standard
deviation: at the end alone the odd terms cancel for a Gaussian (m m''' integrates to a boundary term), and a method of
order 3 would measure 4. Multistep methods of order p >= 3 start with p - 1 steps of length h^((p+1)/(k+1)), k the order
these rows can have, so that their warm-up costs no more than one later step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan
from vivace.engine.plan_io import tensor_infos
from vivace.engine.sample import sample
from vivace.engine.solvers import solver_rows
from vivace.engine.solvers.rows import start_from_noise
from vivace.engine.timesteps import Grid
from vivace.engine.verify import verify
from vivace.errors import ArgumentError

Level = tuple[float, float]
LAM = 4.0  # orders are measured over [-LAM, LAM]
STEPS, STEPS_FOURTH = (80, 160), (160, 320)  # the asymptotic range begins later for order 4


class Data(Protocol):
    """Data with a closed-form denoiser. x: [..., D] float64; levels are (alpha, sigma), numbers or [B, 1]."""

    def x0(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[x0 | x_t = x]."""
        ...

    def solve(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """The probability-flow solution at `end` of the state x at `start`."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, diag(variance)); mean, variance: [D] float64."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def narrow(cls, size: int = 8, seed: int = 0) -> Gaussian:
        """Variances evenly from 0.3 to 1.5, means unit normal."""
        means = np.random.default_rng(seed).normal(size=size)
        return cls(torch.as_tensor(means), torch.linspace(0.3, 1.5, size, dtype=torch.float64))

    def x0(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """mean + alpha v / (alpha^2 v + sigma^2) (x - alpha mean)."""
        gain: Tensor = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        shifted: Tensor = x - alpha * self.mean
        return self.mean + gain * shifted

    def deviation(self, level: Level) -> Tensor:
        """Standard deviation of x at a level: [D]."""
        return torch.sqrt(level[0] ** 2 * self.variance + level[1] ** 2)

    def solve(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """x -> alpha' mean + (deviation'/deviation) (x - alpha mean): exact."""
        return end[0] * self.mean + self.deviation(end) / self.deviation(start) * (x - start[0] * self.mean)


@dataclass(frozen=True)
class Mixture:
    """Data sum_k weights[k] N(means[k], deviations[k]^2 I); means [K, D], weights and deviations [K], float64."""

    means: Tensor
    weights: Tensor
    deviations: Tensor

    @classmethod
    def seven(cls) -> Mixture:
        """One mode at the centre and six of different weight and width on a circle of radius 1.5, in the plane."""
        angles = torch.arange(6, dtype=torch.float64) * (math.pi / 3.0)
        circle = 1.5 * torch.stack((torch.cos(angles), torch.sin(angles)), dim=1)
        means = torch.cat((torch.zeros(1, 2, dtype=torch.float64), circle))
        weights = torch.tensor([4.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0], dtype=torch.float64) / 16.0
        return cls(means, weights, torch.linspace(0.1, 0.25, 7, dtype=torch.float64))

    def x0(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """sum_k r_k(x) (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)), v_k = alpha^2 s_k^2 + sigma^2, r_k: posterior."""
        alpha, sigma = (torch.as_tensor(value, dtype=torch.float64)[..., None] for value in (alpha, sigma))
        offset = x[..., None, :] - alpha * self.means  # [..., K, D]
        square = self.deviations[:, None] ** 2
        spread = alpha**2 * square + sigma**2
        size = self.means.shape[1]
        log_share = torch.log(self.weights) - 0.5 * ((offset**2 / spread).sum(-1) + size * torch.log(spread[..., 0]))
        share = torch.softmax(log_share, dim=-1)[..., None]
        inner: Tensor = self.means + alpha * square / spread * offset
        return (share * inner).sum(-2)

    def solve(self, x: Tensor, start: Level, end: Level) -> Tensor:
        """Converged to 1e-9: Runge-Kutta of order 4 on twice the steps until two extrapolated results agree."""
        steps, before = 512, self._extrapolated(x, start, end, 256)
        while steps <= 1 << 15:
            after = self._extrapolated(x, start, end, steps)
            if (after - before).abs().max() <= 1e-9:
                return after
            steps, before = 2 * steps, after
        raise ArithmeticError("mixture: the reference did not converge to 1e-9 within 32768 steps")

    def _extrapolated(self, x: Tensor, start: Level, end: Level, steps: int) -> Tensor:
        one, two = (self._runge_kutta(x, start, end, count) for count in (steps, 2 * steps))
        return two + (two - one) / 15.0

    def _runge_kutta(self, x: Tensor, start: Level, end: Level, steps: int) -> Tensor:
        """dw/d lam = s (s w - eps) for w = x / sqrt(alpha^2 + sigma^2) and (a, s) its level.

        Infinite ends are cut at |lam| = 14, where one first-order step is exact to 1e-12.
        """
        first, last = _lam(start), _lam(end)
        low, high = max(first, -14.0), min(last, 14.0)
        w = x / math.hypot(*start)
        if low != first:
            w = _first_order(w, self.x0(w, *_unit(first)), _unit(first), _unit(low))
        h = (high - low) / steps
        for n in range(steps):
            lam = low + n * h
            k1 = self._slope(w, lam)
            k2 = self._slope(w + 0.5 * h * k1, lam + 0.5 * h)
            k3 = self._slope(w + 0.5 * h * k2, lam + 0.5 * h)
            w = w + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + self._slope(w + h * k3, lam + h))
        if high != last:
            w = _first_order(w, self.x0(w, *_unit(high)), _unit(high), _unit(last))
        return w * math.hypot(*end)

    def _slope(self, w: Tensor, lam: float) -> Tensor:
        alpha, sigma = _unit(lam)
        return alpha * (self.x0(w, alpha, sigma) - alpha * w)


def _lam(level: Level) -> float:
    if level[1] == 0.0:
        return math.inf
    return -math.inf if level[0] == 0.0 else math.log(level[0] / level[1])


def _unit(lam: float) -> Level:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1."""
    return 1.0 / math.hypot(1.0, math.exp(min(-lam, 700.0))), 1.0 / math.hypot(1.0, math.exp(min(lam, 700.0)))


def _first_order(x: Tensor, x0: Tensor, start: Level, end: Level) -> Tensor:
    keep = end[1] / start[1]
    return keep * x + (end[0] - keep * start[0]) * x0


# ---------------------------------------------------------------- denoisers
def prediction_of(data: Data, kind: str, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """What a perfect network of this prediction ("eps" | "x0" | "v" | "flow") returns for the state x at a level."""
    x0 = data.x0(x, alpha, sigma)
    if kind == "x0":
        return x0
    eps: Tensor = (x - alpha * x0) / sigma
    if kind == "v":
        velocity: Tensor = alpha * eps - sigma * x0
        return velocity
    return eps if kind == "eps" else eps - x0


def denoiser_for(
    data: Data, plan: Plan, watch: Callable[[int, Tensor], None] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """`denoiser(x, t)` for `vivace.sample(..., plan, ...)`: the level is that of the plan's row at timestep t.

    watch: called with the number of the evaluation and the state before it.
    Raises: ArgumentError when rows of one timestep have different levels.
    """
    rows: dict[float, tuple[float, float, float]] = {}
    for step in plan.steps:
        if step.variant is not None:
            row = (step.alpha, step.sigma, step.x_scale)
            if not np.allclose(rows.setdefault(step.timestep, row), row, rtol=1e-12, atol=0.0):
                raise ArgumentError(f"oracle: rows at timestep {step.timestep} have different levels or scales")
    known = np.array(sorted(rows))
    count = 0

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        found = [value if value in rows else float(known[np.abs(known - value).argmin()]) for value in t.tolist()]
        levels = torch.tensor([rows[value] for value in found], dtype=torch.float64)
        alpha, sigma, scale = levels[:, :, None].unbind(1)
        state = x.double() / scale
        if watch is not None:
            watch(count, state)
        count += 1
        return prediction_of(data, plan.prediction, state, alpha, sigma).to(x.dtype)

    return denoiser


def schedule_denoiser(data: Data, schedule: NoiseSchedule, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`denoiser(x, t)` that reads the level from a schedule: alpha and sigma at t / timestep_scale, [B, D] states."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        times = t.double().numpy() / schedule.timestep_scale
        alpha, sigma = (torch.as_tensor(level(times))[:, None] for level in (schedule.alpha, schedule.sigma))
        return prediction_of(data, prediction, x.double(), alpha, sigma).to(x.dtype)

    return denoiser


# ---------------------------------------------------------------- orders
FINAL = {"lower_order_final": False}
EDM = NoiseSchedule.edm(math.exp(-LAM), math.exp(LAM))
FLOW = NoiseSchedule.flow()
# (solver, options, order in theory on a grid even in lam, whether it is multistep). Weights of equal steps in rho
# (PNDM, iPNDM) are of order 2 on such a grid; UniPC's corrector adds one; a rule in x0 and one in eps have one order.
ORDERS: tuple[tuple[str, Mapping[str, Any], int, bool], ...] = (
    ("ddim", {}, 1, False),
    ("euler", {}, 1, False),
    ("heun", {}, 2, False),
    ("flow_euler", {}, 1, False),
    ("flow_heun", {}, 2, False),
    ("dpmpp_2s", {}, 2, False),
    ("dpmpp_2s", {"variant": "heun"}, 2, False),
    ("dpmpp_2m", FINAL, 2, True),
    ("dpmpp_2m", {**FINAL, "variant": "heun"}, 2, True),
    ("dpmpp_3m", FINAL, 3, True),
    ("dpmpp_3m", {**FINAL, "variant": "published"}, 2, True),
    ("dpmpp_2m_sde", {**FINAL, "eta": 0.0}, 2, True),
    ("dpm_solver", {**FINAL, "order": 1}, 1, True),
    *(("dpm_solver", {**FINAL, "solver_type": v}, 2, True) for v in ("midpoint", "heun")),
    ("dpm_solver", {**FINAL, "order": 3}, 3, True),
    *(
        ("dpm_solver", {"order": p, "variant": "singlestep", "solver_type": v}, p, False)
        for p in (2, 3)
        for v in ("midpoint", "heun")
    ),
    *(("deis", {**FINAL, "order": p, "variant": v}, p, True) for v in ("tab", "rhoab", "logrho") for p in (2, 3, 4)),
    ("lms", FINAL, 4, True),
    ("pndm", {}, 2, False),
    ("pndm", {"skip_prk": True}, 2, False),
    *(("ipndm", {"order": p}, min(p, 2), False) for p in (1, 2, 3, 4)),
    *(("dc_solver", {**FINAL, "order": p}, p + 1, True) for p in (2, 3)),
    ("iia", {}, 1, False),
    ("iia", {"base": "heun"}, 2, False),
    ("bdia", {}, 2, False),
    *(("usf", {"orders": p}, p, True) for p in (2, 3)),
    ("usf", {"orders": 3, "corrected": True}, 4, True),
    *(("dpm_solver_v3", {**FINAL, "order": p, "corrector": "none"}, p, True) for p in (2, 3)),
    ("dpm_solver_v3", {**FINAL, "pseudo_corrector": False}, 3, True),
    ("dpm_solver_v3", FINAL, 2, True),
    *(("ghvb", {"order": p}, min(p, 2), False) for p in (1, 2, 3, 4, 5)),
    *(("gradient_estimation", {"gamma": g}, p, False) for g, p in ((2.0, 1), (1.5, 2))),
    *(("unipc", {**FINAL, "order": p, "variant": v}, p + 1, True) for p in (1, 2, 3) for v in ("bh1", "bh2")),
    *(("unipc", {**FINAL, "order": p, "corrector": False}, p, True) for p in (2, 3)),
    *(("unipc", {**FINAL, "order": p, "form": "eps"}, p + 1, True) for p in (1, 2, 3)),
    ("lagrange", {**FINAL, "order": 4}, 4, True),
    *(("lagrange", {**FINAL, "order": p, "variable": u}, p, True) for u in ("rho", "t") for p in (3, 4)),
)


def even_grid(schedule: NoiseSchedule, steps: int, warm_up: int = 1) -> Grid:
    """Levels of an "edm" or "flow" schedule, even in lam over [-LAM, LAM], after warm_up - 1 shorter steps.

    warm_up: order p of a multistep method from 3 on; the grid then has steps + p - 1 rows.
    """
    h = 2.0 * LAM / steps
    short = [h ** ((warm_up + 1) / (k + 1)) for k in range(1, warm_up)] if warm_up > 2 else []
    starts = -LAM + np.cumsum([0.0, *short])
    lams = np.concatenate((starts[:-1], np.linspace(starts[-1], LAM, steps + 1)))
    times = np.asarray(schedule.t_of_lam(lams), dtype=np.float64)
    alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
    fed = schedule.timestep(times[:-1])
    return Grid(tuple(fed.tolist()), tuple(alphas.tolist()), tuple(sigmas.tolist()), schedule)


def plan_on(grid: Grid, solver: str, prediction: str, options: Mapping[str, Any] | None = None) -> Plan:
    """A plan of `solver` on a grid made by hand; its first state is c * noise, c = |level 0|."""
    rows = solver_rows(solver, grid, prediction, options or {})
    start = start_from_noise(math.hypot(*grid.level(0)))
    return verify(Plan(rows.steps, prediction, start, None, tensor_infos(rows.arrays), arrays=rows.arrays))


def trajectory_error(grid: Grid, solver: str, prediction: str, options: Mapping[str, Any], seed: int = 3) -> float:
    """Largest error along the trajectory on the narrow Gaussian, in standard deviations, see the head of the file."""
    data = Gaussian.narrow(64)
    plan = plan_on(grid, solver, prediction, options)
    noise = torch.as_tensor(np.random.default_rng(seed).normal(size=(1, 64)))
    start = math.hypot(*grid.level(0)) * noise
    evaluated = [step for step in plan.steps if step.variant is not None]
    errors: list[float] = []

    def judge(state: Tensor, level: Level) -> None:
        gap = (state - data.solve(start, grid.level(0), level)) / data.deviation(level)
        errors.append(float(torch.sqrt((gap**2).mean())))

    def watch(number: int, state: Tensor) -> None:
        step = evaluated[number]
        if step.x == "x":  # inner stages are of lower order by design
            judge(state, (step.alpha, step.sigma))

    judge(sample(denoiser_for(data, plan, watch), plan, noise), grid.level(grid.steps))
    return max(errors)


def error_at(
    solver: str, options: Mapping[str, Any], warm_up: int, steps: int, schedule: NoiseSchedule | None = None
) -> float:
    """`trajectory_error` on the grid that orders are measured on; arguments as in `measured_order`."""
    if schedule is None:
        in_time = {"deis": options.get("variant", "tab") == "tab", "lagrange": options.get("variable") == "t"}
        schedule = FLOW if solver.startswith("flow_") or in_time.get(solver) else EDM
    prediction = "flow" if schedule.kind == "flow" else "eps"
    return trajectory_error(even_grid(schedule, steps, warm_up), solver, prediction, options)


def measured_order(
    solver: str,
    options: Mapping[str, Any] | None = None,
    *,
    warm_up: int = 1,
    steps: tuple[int, int] = STEPS,
    schedule: NoiseSchedule | None = None,
) -> float:
    """Order of a deterministic solver on the narrow Gaussian.

    Args:
        warm_up: order of a multistep method, 1 for the others; steps: (n, 2 n).
        schedule: kind "edm" or "flow"; default EDM with sigma from e^-4 to e^4, flow for the solvers of flows and for
            rules in t, which is rho in EDM.
    """
    coarse, fine = (error_at(solver, options or {}, warm_up, count, schedule) for count in steps)
    return math.log2(coarse / fine) / math.log2(steps[1] / steps[0])


def order_table() -> list[tuple[str, dict[str, Any], int, float]]:
    """(solver, options, order in theory, order measured) of every deterministic solver."""
    return [
        (
            solver,
            dict(options),
            theory,
            measured_order(
                solver, options, warm_up=theory if multistep else 1, steps=STEPS if theory < 4 else STEPS_FOURTH
            ),
        )
        for solver, options, theory, multistep in ORDERS
    ]
