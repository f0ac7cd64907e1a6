"""UniPC: predictor UniP-p and corrector UniC-p, merged into one affine row.

The corrector redoes the previous step with the value just evaluated; its change of x is linear in the history, so
  x'' = (sigma''/sigma') (x' + delta) + predictor terms,   delta = sum_k d_k m_k
is one row with at most p + 1 history terms and no second state. The last step is not corrected.
Source: Zhao et al. 2023, algorithms 1 and 2, eq. 9 to 12 with H = -h; the merged row: algebra only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.quadrature import psi
from vivace.engine.solvers.rows import (
    Update,
    assemble,
    falling_orders,
    first_update,
    planned_ages,
    require_flag,
    require_order,
    spread,
    usable_ages,
)
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

VARIANTS = ("bh1", "bh2")


def unipc(
    grid: Grid,
    prediction: str,
    *,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    disable_corrector: Sequence[int] = (),
    form: str = "x0",
    lower_order_final: bool = True,
    history: str = "own",
    cached: Sequence[int] = (),
) -> tuple[Step, ...]:
    """Rows of UniPC.

    Args:
        order: p in 1..3; with the corrector the method is of order p + 1.
        variant: B(H) = H ("bh1") or e^H - 1 ("bh2").
        corrector: False: predictor alone (UniP).
        disable_corrector: rows whose step is not corrected; often (0,) under strong guidance.
        form: what is extrapolated, "x0" or "eps".
        lower_order_final: order <= rows left, at any number of steps.
        history, cached: what rows that did not compute everything mean to later ones, see `rows.planned_ages`; unless
            history is "own", steps that begin or end at such a row are not corrected.
    """
    require_order("unipc", order, 3)
    choose("unipc: form", form, ("x0", "eps"))
    choose("unipc: variant", variant, VARIANTS)
    require_flag("unipc", "corrector", corrector)
    orders = falling_orders(grid.steps, order, require_flag("unipc", "lower_order_final", lower_order_final))
    if any(isinstance(row, bool) or not isinstance(row, int) for row in disable_corrector):
        raise ArgumentError(f"unipc: disable_corrector must be row numbers, got {tuple(disable_corrector)!r}")
    ages = planned_ages("unipc", grid.steps, orders, history, cached)
    without = {*disable_corrector, *uncorrected(history, cached)}
    corrected = [corrector and row not in without for row in range(grid.steps)]
    return unipc_rows(grid, prediction, orders, variant, corrected, form=form, ages=ages)


def uncorrected(history: str, cached: Sequence[int]) -> set[int]:
    """Rows whose step is not corrected since it begins or ends at a row that did not compute everything."""
    return set() if history == "own" else {row - k for row in cached for k in (0, 1)}


def unipc_rows(
    grid: Grid,
    prediction: str,
    orders: Sequence[int],
    variant: str,
    corrected: Sequence[bool],
    transform: Transform | None = None,
    *,
    form: str = "x0",
    ages: Sequence[Sequence[int]] | None = None,
) -> tuple[Step, ...]:
    """Rows with the order asked of each and whether its step is corrected by the row after it.

    form "eps": H = +h, sigma'/sigma becomes alpha'/alpha and alpha' becomes sigma'; a step from alpha = 0 is then not
    corrected. ages: of every row the rows that it reads, see `rows.planned_ages`, in place of `orders`.
    """
    updates = unipc_updates(grid, orders, variant, corrected, form=form, ages=ages)
    return assemble(grid, prediction, updates, transform, form=form)


def unipc_updates(
    grid: Grid,
    orders: Sequence[int],
    variant: str,
    corrected: Sequence[bool],
    *,
    form: str = "x0",
    ages: Sequence[Sequence[int]] | None = None,
) -> list[Update]:
    """The coefficients of `unipc_rows`."""
    updates: list[Update] = []
    delta: tuple[float, ...] = ()
    for row in range(grid.steps):
        read = usable_ages(grid, row, range(orders[row]) if ages is None else ages[row])
        first, weights, correction = _step(grid, row, read, variant, form)
        merged = tuple(w + first.keep * d for w, d in zip_longest(weights, delta, fillvalue=0.0))
        updates.append(replace(first, weights=merged))
        delta = correction if corrected[row] else ()
    return updates


def _step(
    grid: Grid, row: int, ages: Sequence[int], variant: str, form: str
) -> tuple[Update, tuple[float, ...], tuple[float, ...]]:
    """First-order step, predictor (weights of m_i, m_{i-1}, ...), correction (weights of m_{i+1}, m_i, ...)."""
    order = len(ages)
    first = first_update(form, grid.level(row), grid.level(row + 1))
    weight, outer = first.weights[0], grid.alphas[row + 1] if form == "x0" else grid.sigmas[row + 1]
    if grid.alphas[row] == 0.0 or row == grid.steps - 1 and order == 1:
        # From pure noise h is infinite: e^H - 1 = -1, and the trapezoid weight 1/2 of UniC-1 stays.
        return first, (weight,), (0.5 * outer, -0.5 * outer) if form == "x0" else ()
    h = grid.lam(row + 1) - grid.lam(row)
    exponent = -h if form == "x0" else h
    scale = exponent if variant == "bh1" else math.expm1(exponent)
    nodes = [(grid.lam(row - age) - grid.lam(row)) / h for age in ages[1:]]
    moments = [math.factorial(k) * psi(k, exponent) / scale for k in range(1, order + 1)]
    ahead = [0.5] if order == 2 else _moment_weights(nodes, moments[:-1])
    both = [0.5] if order == 1 else _moment_weights([*nodes, 1.0], moments)
    unit = -outer * scale
    slopes = [unit * rho / node for rho, node in zip(ahead, nodes, strict=True)]
    changes = [unit * (rho - old) / node for rho, old, node in zip(both, ahead, nodes, strict=False)]
    newest = unit * both[-1]
    ahead_of = spread(ages, (weight - sum(slopes), *slopes))
    return first, ahead_of, (newest, *spread(ages, (-newest - sum(changes), *changes)))


def _moment_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """rho with sum_j nodes[j]^k rho[j] = moments[k], k = 0, 1, ...: elimination on at most three unknowns."""
    size = len(nodes)
    rows = [[node**k for node in nodes] + [moments[k]] for k in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [below - factor * above for below, above in zip(rows[j], rows[i], strict=True)]
    weights = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * weights[j] for j in range(i + 1, size))
        weights[i] = (rows[i][size] - known) / rows[i][i]
    return weights
