"""Rows whose coefficients only `diffusers` has; assembled as all rows are. What is fed to the network and read from it.

Where a class departs from its paper, the departure is coefficients: the singlestep nodes that lie on the grid, the
third SDE order, the fixed Adams weights of PNDM on any grid, LMS rows that count steps before an image-to-image start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from vivace.engine.plan import Affine, Op, Step
from vivace.engine.solvers.pndm import ADAMS
from vivace.engine.solvers.quadrature import lagrange_weights, psi
from vivace.engine.solvers.rows import Level, Update, affine, first_update
from vivace.engine.timesteps import Grid

Read = Callable[[Step], tuple[float, float]]
RUNGE = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


# ---------------------------------------------------------------- what the network is fed, and what its output means
def refeed(
    steps: Sequence[Step], read: Read | None = None, scale: Callable[[Step], float] | None = None
) -> tuple[Step, ...]:
    """Rows whose network reads scale * x and whose output stands for p * x + q * out, (p, q) = read(step)."""
    made = []
    for step in steps:
        p, q = (0.0, 1.0) if read is None else read(step)
        ops = tuple(_reread(op, step.x, p, q) for op in step.ops)
        made.append(replace(step, ops=ops, x_scale=1.0 if scale is None else scale(step)))
    return tuple(made)


def _reread(op: Op, x: str, p: float, q: float) -> Op:
    """`op` with the slot "out" replaced by p * x + q * out."""
    if not isinstance(op, Affine) or (p, q) == (0.0, 1.0):
        return op
    terms: list[tuple[str, float]] = []
    for slot, coef in op.terms:
        assert isinstance(coef, float)
        terms += [(x, coef * p), ("out", coef * q)] if slot == "out" else [(slot, coef)]
    return affine(op.dst, *terms)


def exploding(steps: Sequence[Step], prediction: str) -> tuple[Step, ...]:
    """Rows of x = x0 + sigma noise whose network reads x / sqrt(1 + sigma^2), so predicts at that VP level.

    Only v depends on the scale: v of the rows' level is sqrt(1 + sigma^2) times it.
    """
    read = (lambda step: (0.0, math.hypot(1.0, step.sigma))) if prediction == "v" else None
    return refeed(steps, read, lambda step: 1.0 / math.hypot(1.0, step.sigma))


def preconditioned(steps: Sequence[Step], sigma_data: float, sign: float) -> tuple[Step, ...]:
    """Rows on x0 with the preconditioning of EDM: x0 = c_skip x + c_out out, the network reads c_in x.

    c_in = 1 / r, c_skip = sigma_data^2 / r^2, c_out = sign sigma sigma_data / r, r^2 = sigma^2 + sigma_data^2.
    Source: Karras et al. 2022, table 1.
    """

    def read(step: Step) -> tuple[float, float]:
        norm = math.hypot(step.sigma, sigma_data)
        return (sigma_data / norm) ** 2, sign * step.sigma * sigma_data / norm

    return refeed(steps, read, lambda step: 1.0 / math.hypot(step.sigma, sigma_data))


# ---------------------------------------------------------------- coefficients
def ddpm_updates(grid: Grid, ends: Sequence[Level], variance: str) -> list[Update]:
    """DDPM to `ends`; noise in every row whose timestep is above 0, even where the row ends at sigma = 0.

    Source: Ho, Jain and Abbeel 2020, eq. 7, in alpha^2 of any two timesteps.
    """
    updates = []
    for row, (alpha_end, sigma_end) in enumerate(ends):
        alpha, sigma = grid.level(row)
        ratio = alpha / alpha_end
        beta = 1.0 - ratio**2
        spread = beta if variance == "fixed_large" else max((sigma_end / sigma) ** 2 * beta, 1e-20)
        noise = math.sqrt(spread) if grid.timesteps[row] > 0.0 else 0.0
        updates.append(Update(ratio * (sigma_end / sigma) ** 2, (alpha_end * beta / sigma**2,), noise=noise))
    return updates


def lms_updates(grid: Grid, first: int) -> list[Update]:
    """Linear multistep of order 4 in sigma from row `first` on.

    The order counts rows from the start of the whole grid, so an image-to-image run lacks the older terms.
    """
    updates = []
    for row in range(first, grid.steps):
        levels = [grid.level(row - age) for age in range(min(row + 1, 4))]
        keep, weights = lagrange_weights("eps", "rho", levels, grid.level(row + 1))
        updates.append(Update(keep, weights[: row - first + 1]))
    return updates


def singlestep_updates(grid: Grid, orders: Sequence[int], form: str, variant: str, eta: float) -> list[Update]:
    """DPM-Solver singlestep whose inner nodes are rows of the grid: a step of order p begins p - 1 rows earlier.

    A row before one of higher order is a stage; x stays at the start of the step. eta: 0 or 1 (SDE, x0 form).
    Source: Lu et al. 2022 (DPM-Solver), algorithms 1 and 2; (DPM-Solver++), algorithm 1.
    """
    updates = []
    for row, order in enumerate(orders):
        start, end = grid.level(row - order + 1), grid.level(row + 1)
        keep, weight, x0, noise = _step_terms(form, eta, start, end)
        weights: tuple[float, ...] = (weight,)
        if order > 1:
            h = grid.lam(row + 1) - grid.lam(row - order + 1)
            lean, bend = _slopes(form, eta, h, end)
            near = (grid.lam(row) - grid.lam(row - order + 1)) / h
            if order == 2:
                slope = (weight / 2.0 if variant == "midpoint" else lean) / near
                weights = (slope, weight - slope)
            else:
                mid = (grid.lam(row - 1) - grid.lam(row - 2)) / h
                newest, inner = lean, 0.0  # of (m0 - m2) / near and (m1 - m2) / mid
                if variant == "heun":
                    newest, inner = (-lean * mid + 2.0 * bend) / (near - mid), (lean * near - 2.0 * bend) / (near - mid)
                weights = (newest / near, inner / mid, weight - newest / near - inner / mid)
        stage = row + 1 < len(orders) and orders[row + 1] > 1
        updates.append(Update(keep, weights, x0=x0, noise=noise, stage=stage))
    return updates


def _step_terms(form: str, eta: float, start: Level, end: Level) -> tuple[float, float, float, float]:
    """(a, b, weight of x0 of the output, noise) of the first-order step."""
    if eta == 0.0:
        first = first_update(form, start, end)
        return first.keep, first.weights[0], first.x0, 0.0
    fall = end[1] * start[0] / (end[0] * start[1])  # e^-h
    rest = 1.0 - fall**2
    return end[1] / start[1] * fall, end[0] * rest, 0.0, end[1] * math.sqrt(rest)


def _slopes(form: str, eta: float, h: float, end: Level) -> tuple[float, float]:
    """Coefficients of the first and second difference; the SDE's second one has the sign of its 1/2 turned."""
    if form == "eps":
        return -end[1] * psi(1, h), -end[1] * psi(2, h)
    exponent = -(1.0 + eta) * h
    return -end[0] * psi(1, exponent), -end[0] * (psi(2, exponent) + (1.0 if eta else 0.0))


def turn_third_sde_order(steps: Sequence[Step], grid: Grid, orders: Sequence[int]) -> tuple[Step, ...]:
    """Rows of SDE-DPM-Solver++ with -alpha' D2 added in those of order 3: the sign of a 1/2 in its coefficient.

    Third-order rows read m of three rows in turn, newest in m<row mod 3>.
    """
    made = []
    for row, (step, order) in enumerate(zip(steps, orders, strict=True)):
        if order == 3:
            h, newer, older = (grid.lam(row + 1 - k) - grid.lam(row - k) for k in range(3))
            unit = -grid.alphas[row + 1] / ((newer + older) / h)
            changes = (unit * h / newer, -unit * h / newer - unit * h / older, unit * h / older)
            update = step.ops[-1]
            assert isinstance(update, Affine)
            extra = [(f"m{(row - age) % 3}", change) for age, change in enumerate(changes)]
            kept = [(slot, coef) for slot, coef in update.terms if isinstance(coef, float)]
            step = replace(step, ops=(*step.ops[:-1], affine("x", *kept, *extra)))
        made.append(step)
    return tuple(made)


def pndm_step(prediction: str, start: Level, end: Level) -> tuple[float, float]:
    """(a, b) of x' = a x + b f(t) for a combination f of network outputs, taken as made at level `start`.

    Outputs of v are combined as they are and converted once, with the state the step starts from.
    Source: Liu et al. 2022 (PNDM), eq. 11.
    """
    gap = end[0] ** 2 - start[0] ** 2
    weight = -gap / (start[0] ** 2 * end[1] + start[0] * start[1] * end[0])
    if prediction == "v":
        return end[0] / start[0] + weight * start[1], weight * start[0]
    return end[0] / start[0], weight


def pndm_updates(
    prediction: str, levels: Sequence[tuple[Level, Level]], runge: int, warm: bool
) -> tuple[list[Update], list[int]]:
    """Updates and slot numbers of PNDM.

    levels: (start, end) of every row; runge: rows of its Runge-Kutta steps, 4 each;
    warm: without them the second row redoes the first step with the mean of two outputs.
    """
    updates: list[Update] = []
    kept: list[int] = []  # rows whose output stays in history
    slots = []
    for row, (start, end) in enumerate(levels):
        keep, weight = pndm_step(prediction, start, end)
        part = row % 4
        if row < runge:
            weights = {0: 1.0} if part < 3 else dict(enumerate(reversed(RUNGE)))
            if part == 0:
                kept.append(row)
            slots.append(len(kept) - 1 if part == 0 else 4 + part)
            stage = part < 3
        elif warm and row == 1:
            weights, stage = {0: 0.5, 1: 0.5}, False
            slots.append(4)
        else:
            kept = [*kept[-3:], row]
            weights = {row - old: w for old, w in zip(reversed(kept), ADAMS[len(kept)], strict=True)}
            stage = warm and row == 0 and len(levels) > 1
            slots.append(_free(slots, kept[:-1]))
        filled = tuple(weight * weights.get(age, 0.0) for age in range(max(weights) + 1))
        updates.append(Update(keep, filled, stage=stage))
    return updates, slots


def _free(slots: Sequence[int], kept: Sequence[int]) -> int:
    """The lowest of four slots that holds none of the rows kept."""
    used = {slots[row] for row in kept}
    return next(number for number in range(4) if number not in used)


def lcm_updates(grid: Grid, scalings: Sequence[tuple[float, float]], ends: Sequence[Level | None]) -> list[Update]:
    """x' = alpha' f + sigma' z, f = c_skip x + c_out x0; an end of None keeps f itself.

    Source: Luo et al. 2023 (Latent Consistency Models), algorithm 2.
    """
    updates = []
    for (skip, out), end in zip(scalings, ends, strict=True):
        alpha, sigma = (1.0, 0.0) if end is None else end
        updates.append(Update(alpha * skip, (alpha * out,), noise=sigma))
    return updates
