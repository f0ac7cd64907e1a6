"""DPM-Solver and DPM-Solver++, multistep and SDE: the prediction extrapolated in lam through the last rows.

  x' = a x - S (expm1(H) m0 + c1 D1 + c2 D2) + c z
  x0 form (++): H = -(1 + eta) h, S = alpha', a = (sigma'/sigma) e^(-eta h), c = sigma' sqrt(1 - e^(-2 eta h))
  eps form:     H = h, S = (1 + eta) sigma', a = alpha'/alpha, c = sigma' sqrt(eta (e^(2 h) - 1))
eta: strength of the SDE, 0 the ODE. D1 = (m0 - m1)/r in the second order, r = h_prev/h; c1 = expm1(H)/2 ("midpoint")
or psi_1(H) ("heun", exact for a prediction linear in lam). In the third order D1, D2 are the differences of three
values, c1 = psi_1(H), c2 = 2 psi_2(H): exact for a quadratic prediction; "published" has c2 = psi_2(H), as in the
authors' code, and is of second order.
Source: Lu et al. 2022 (DPM-Solver), eq. 3.7 to 3.10; Lu et al. 2022 (DPM-Solver++), algorithm 2, appendix B (SDE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.quadrature import psi
from vivace.engine.solvers.rows import (
    Update,
    assemble,
    falling_orders,
    first_order,
    first_update,
    planned_ages,
    require_flag,
    require_number,
    require_order,
    spread,
    usable_ages,
)
from vivace.engine.timesteps import Grid, choose

VARIANTS = ("midpoint", "heun")
THIRD = ("third_order", "published")


def dpmpp_2m(
    grid: Grid,
    prediction: str,
    *,
    order: int = 2,
    variant: str = "midpoint",
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of DPM-Solver++ 2M. order: 1 or 2; lower_order_final: order <= rows left, at any number of steps.

    history, cached: what rows that did not compute everything mean to later ones, see `rows.planned_ages`.
    """
    require_order("dpmpp_2m", order, 2)
    orders = falling_orders(grid.steps, order, require_flag("dpmpp_2m", "lower_order_final", lower_order_final))
    ages = planned_ages("dpmpp_2m", grid.steps, orders, history, cached)
    return dpmpp_rows(grid, prediction, orders, choose("dpmpp_2m: variant", variant, VARIANTS), ages=ages)


def dpmpp_3m(
    grid: Grid,
    prediction: str,
    *,
    variant: str = "third_order",
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of DPM-Solver++ 3M.

    Args:
        variant: "third_order", exact for an x0 quadratic in lam; "published", the widely copied rule, which has half
            of the second difference and is of second order (its second row is the midpoint rule).
        lower_order_final: order <= rows left, at any number of steps.
        history, cached: what rows that did not compute everything mean to later ones, see `rows.planned_ages`.
    """
    choose("dpmpp_3m: variant", variant, THIRD)
    orders = falling_orders(grid.steps, 3, require_flag("dpmpp_3m", "lower_order_final", lower_order_final))
    ages = planned_ages("dpmpp_3m", grid.steps, orders, history, cached)
    second = "heun" if variant == "third_order" else "midpoint"
    return dpmpp_rows(grid, prediction, orders, second, third=variant, ages=ages)


def dpmpp_2m_sde(
    grid: Grid,
    prediction: str,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    variant: str = "midpoint",
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of SDE-DPM-Solver++ 2M.

    Args:
        eta: strength of the SDE, 0 the ODE of `dpmpp_2m`; s_noise: factor on the fresh noise.
        variant: "midpoint" or "heun"; lower_order_final: order <= rows left, at any number of steps.
        history, cached: what rows that did not compute everything mean to later ones, see `rows.planned_ages`.
    """
    eta = require_number("dpmpp_2m_sde", "eta", eta)
    scale = require_number("dpmpp_2m_sde", "s_noise", s_noise)
    choose("dpmpp_2m_sde: variant", variant, VARIANTS)
    orders = falling_orders(grid.steps, 2, require_flag("dpmpp_2m_sde", "lower_order_final", lower_order_final))
    ages = planned_ages("dpmpp_2m_sde", grid.steps, orders, history, cached)
    return dpmpp_rows(grid, prediction, orders, variant, eta=eta, s_noise=scale, ages=ages)


def dpmpp_rows(
    grid: Grid,
    prediction: str,
    orders: Sequence[int],
    variant: str,
    transform: Transform | None = None,
    *,
    form: str = "x0",
    third: str = "published",
    eta: float = 0.0,
    s_noise: float = 1.0,
    ages: Sequence[Sequence[int]] | None = None,
) -> tuple[Step, ...]:
    """Rows with the order (1..3) asked of each; lowered where history is missing and to 1 at sigma = 0.

    Args:
        variant: of second-order rows; third: of third-order rows. form: "x0" (DPM-Solver++) or "eps" (DPM-Solver).
        eta, s_noise: strength of the SDE and factor on its noise.
        ages: of every row the rows that it reads, see `rows.planned_ages`, in place of `orders`.
    """
    rule = (form, variant, third, eta)
    reads = [range(order) for order in orders] if ages is None else ages
    return assemble(grid, prediction, dpmpp_updates(grid, reads, rule, s_noise), transform, form=form)


def dpmpp_updates(
    grid: Grid, ages: Sequence[Sequence[int]], rule: tuple[str, str, str, float], s_noise: float = 1.0
) -> list[Update]:
    """The coefficients of `dpmpp_rows`; rule: its (form, variant, third, eta)."""
    form, eta = rule[0], rule[3]
    updates = []
    for row in range(grid.steps):
        read = usable_ages(grid, row, ages[row])
        first = _first(form, grid, row, eta)
        weights = first.weights
        if len(read) > 1:
            weights = spread(read, _extrapolated(grid, row, read, first.weights[0], rule))
        updates.append(Update(first.keep, weights, x0=first.x0, noise=s_noise * first.noise))
    return updates


def _first(form: str, grid: Grid, row: int, eta: float) -> Update:
    """The first-order row with its noise, finite at both ends."""
    start, end = grid.level(row), grid.level(row + 1)
    if eta == 0.0 or start == end:
        return first_update(form, start, end)
    fall = end[1] * start[0] / (end[0] * start[1])  # e^-h
    if form == "x0" or fall == 0.0:
        keep = first_order(start, end)[0] * fall**eta
        weight, noise = -end[0] * (fall ** (1.0 + eta) - 1.0), end[1] * math.sqrt(1.0 - fall ** (2.0 * eta))
        return Update(keep, (weight,), noise=noise) if form == "x0" else Update(keep, (0.0,), x0=weight, noise=noise)
    drift = -(1.0 + eta) * (end[0] * start[1] / start[0] - end[1])
    variance = (end[0] * start[1] / start[0]) ** 2 - end[1] ** 2
    return Update(end[0] / start[0], (drift,), noise=math.sqrt(eta * variance))


def _extrapolated(
    grid: Grid, row: int, ages: Sequence[int], weight: float, rule: tuple[str, str, str, float]
) -> tuple[float, ...]:
    """Weights of the values of two or three `ages`; `weight`: of the first order, -S expm1(H)."""
    form, variant, third, eta = rule
    lams = [grid.lam(row + 1), *(grid.lam(row - age) for age in ages)]
    h = lams[0] - lams[1]
    unit = -grid.alphas[row + 1] if form == "x0" else -(1.0 + eta) * grid.sigmas[row + 1]
    exponent = -(1.0 + eta) * h if form == "x0" else h
    near = (lams[1] - lams[2]) / h
    if len(ages) == 2:
        slope = (weight / 2.0 if variant == "midpoint" else unit * psi(1, exponent)) / near
        return weight + slope, -slope
    far = (lams[2] - lams[3]) / h
    bend = unit * psi(2, exponent) * (2.0 if third == "third_order" else 1.0) / (near + far)
    lean = unit * psi(1, exponent)
    # D1 = (1 + q) (m0 - m1)/near - q (m1 - m2)/far with q = near/(near + far); D2 = their difference/(near + far).
    q = near / (near + far)
    newer, older = (lean * (1.0 + q) + bend) / near, (-lean * q - bend) / far
    return weight + newer, older - newer, -older
