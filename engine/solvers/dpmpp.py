"""DPM-Solver++ 2M: the x0 prediction extrapolated linearly in lam = log(alpha/sigma) through the last two rows.

x' = (sigma'/sigma) x + B m0 + C (m0 - m1) / r,   B = alpha' (1 - e^-h),   r = h_prev / h
midpoint: C = B / 2;   heun: C = alpha' ((e^-h - 1)/h + 1), exact for an x0 linear in lam.
Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.rows import (
    Update,
    assemble,
    falling_orders,
    first_order,
    require_flag,
    require_order,
    usable_order,
)
from vivace.engine.timesteps import Grid, choose

VARIANTS = ("midpoint", "heun")


def dpmpp_2m(
    grid: Grid, prediction: str, *, order: int = 2, variant: str = "midpoint", lower_order_final: bool = True
) -> tuple[Step, ...]:
    """Rows of DPM-Solver++ 2M. order: 1 or 2; lower_order_final: order <= rows left, at any number of steps."""
    require_order("dpmpp_2m", order, 2)
    orders = falling_orders(grid.steps, order, require_flag("dpmpp_2m", "lower_order_final", lower_order_final))
    return dpmpp_rows(grid, prediction, orders, choose("dpmpp_2m: variant", variant, VARIANTS))


def dpmpp_rows(
    grid: Grid, prediction: str, orders: Sequence[int], variant: str, transform: Transform | None = None
) -> tuple[Step, ...]:
    """Rows with the order asked of each; lowered where history is missing and to 1 at sigma = 0."""
    updates = []
    for row in range(grid.steps):
        keep, weight = first_order(grid.level(row), grid.level(row + 1))
        if usable_order(grid, row, orders[row]) == 1:
            updates.append(Update(keep, (weight,)))
            continue
        h = grid.lam(row + 1) - grid.lam(row)
        slope = weight / 2.0 if variant == "midpoint" else grid.alphas[row + 1] * (math.expm1(-h) / h + 1.0)
        slope *= h / (grid.lam(row) - grid.lam(row - 1))
        updates.append(Update(keep, (weight + slope, -slope)))
    return assemble(grid, prediction, updates, transform)
