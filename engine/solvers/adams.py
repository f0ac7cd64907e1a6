"""Multistep solvers that are the generic rule with a choice of form and variable: DEIS, LMS, free Lagrange rows.

Their coefficients are `quadrature.lagrange_rows`; here are the names, options and defaults.
"""

from __future__ import annotations

from collections.abc import Sequence

from vivace.engine.plan import Step
from vivace.engine.solvers.quadrature import VARIABLES, lagrange_rows
from vivace.engine.solvers.rows import falling_orders, planned_ages, require_flag, require_order
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

DEIS_VARIANTS = {"tab": "t", "rhoab": "rho", "logrho": "lam"}
HIGHEST = 4


def deis(
    grid: Grid,
    prediction: str,
    *,
    order: int = 3,
    variant: str = "tab",
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of DEIS: eps extrapolated by a polynomial, the linear part exact.

    Args:
        order: evaluations used, 1..4; the polynomial has degree order - 1 (tAB-(order - 1) in the paper).
        variant: the polynomial's variable: "tab" time t, "rhoab" rho = sigma/alpha, "logrho" lam.
        lower_order_final: order <= rows left, at any number of steps.
        history, cached: what rows that did not compute everything mean to later ones, see `rows.planned_ages`.
    Source: Zhang and Chen 2022, eq. 14 and 15 (tAB), section 3.4 (rhoAB).
    """
    require_order("deis", order, HIGHEST)
    variable = DEIS_VARIANTS[choose("deis: variant", variant, tuple(DEIS_VARIANTS))]
    orders = falling_orders(grid.steps, order, require_flag("deis", "lower_order_final", lower_order_final))
    ages = planned_ages("deis", grid.steps, orders, history, cached)
    return lagrange_rows(grid, prediction, orders, form="eps", variable=variable, ages=ages)


def lms(
    grid: Grid,
    prediction: str,
    *,
    order: int = 4,
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of the linear multistep method: Adams-Bashforth of dy/d rho = eps, y = x/alpha, on any grid.

    Args:
        order: evaluations used, 1..4; lower_order_final: order <= rows left, at any number of steps.
        history, cached: what rows that did not compute everything mean to later ones, see `rows.planned_ages`.
    Source: Hairer, Norsett and Wanner 1993, chapter III.5 (variable step size Adams).
    """
    require_order("lms", order, HIGHEST)
    orders = falling_orders(grid.steps, order, require_flag("lms", "lower_order_final", lower_order_final))
    ages = planned_ages("lms", grid.steps, orders, history, cached)
    return lagrange_rows(grid, prediction, orders, form="eps", variable="rho", ages=ages)


def lagrange(
    grid: Grid,
    prediction: str,
    *,
    form: str = "x0",
    variable: str = "lam",
    order: int = 3,
    orders: Sequence[int] | None = None,
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of the generic rule, every choice free.

    Args:
        form: what is interpolated, "x0" or "eps"; variable: in which variable, "lam", "rho" or "t".
        order: evaluations used, 1..4; orders: the same for each row, in place of `order` and `lower_order_final`.
        lower_order_final: order <= rows left, at any number of steps.
        history, cached: what rows that did not compute everything mean to later ones, see `rows.planned_ages`.
    Source: Liu et al. 2023 (Unified Sampling Framework), section 3.
    """
    choose("lagrange: form", form, ("x0", "eps"))
    choose("lagrange: variable", variable, VARIABLES)
    require_order("lagrange", order, HIGHEST)
    asked = falling_orders(grid.steps, order, require_flag("lagrange", "lower_order_final", lower_order_final))
    if orders is not None:
        if isinstance(orders, str) or len(orders) != grid.steps:
            raise ArgumentError(f"lagrange: orders must be one order a row ({grid.steps}), got {orders!r}")
        asked = [require_order("lagrange: orders", each, HIGHEST) for each in orders]
    ages = planned_ages("lagrange", grid.steps, asked, history, cached)
    return lagrange_rows(grid, prediction, asked, form=form, variable=variable, ages=ages)
