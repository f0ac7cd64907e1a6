"""UniPC: predictor UniP-p and corrector UniC-p in x0 form, merged into one affine row.

The corrector redoes the previous step with the value just evaluated; its change of x is linear in the history, so
  x'' = (sigma''/sigma') (x' + delta) + predictor terms,   delta = sum_k d_k m_k
is one row with at most p + 1 history terms and no second state. The last step is not corrected.
Source: Zhao et al. 2023, algorithms 1 and 2, eq. 9 to 12 with H = -h; the merged row: algebra only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

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
    lower_order_final: bool = True,
) -> tuple[Step, ...]:
    """Rows of UniPC.

    Args:
        order: p in 1..3; with the corrector the method is of order p + 1.
        variant: B(H) = H ("bh1") or e^H - 1 ("bh2").
        corrector: False: predictor alone (UniP).
        disable_corrector: rows whose step is not corrected; often (0,) under strong guidance.
        lower_order_final: order <= rows left, at any number of steps.
    """
    require_order("unipc", order, 3)
    choose("unipc: variant", variant, VARIANTS)
    require_flag("unipc", "corrector", corrector)
    orders = falling_orders(grid.steps, order, require_flag("unipc", "lower_order_final", lower_order_final))
    if any(isinstance(row, bool) or not isinstance(row, int) for row in disable_corrector):
        raise ArgumentError(f"unipc: disable_corrector must be row numbers, got {tuple(disable_corrector)!r}")
    corrected = [corrector and row not in disable_corrector for row in range(grid.steps)]
    return unipc_rows(grid, prediction, orders, variant, corrected)


def unipc_rows(
    grid: Grid,
    prediction: str,
    orders: Sequence[int],
    variant: str,
    corrected: Sequence[bool],
    transform: Transform | None = None,
) -> tuple[Step, ...]:
    """Rows with the order asked of each and whether its step is corrected by the row after it."""
    updates: list[Update] = []
    delta: tuple[float, ...] = ()
    for row in range(grid.steps):
        order = usable_order(grid, row, orders[row])
        keep, weights, correction = _step(grid, row, order, variant)
        merged = tuple(w + keep * d for w, d in zip_longest(weights, delta, fillvalue=0.0))
        updates.append(Update(keep, merged))
        delta = correction if corrected[row] else ()
    return assemble(grid, prediction, updates, transform)


def _step(grid: Grid, row: int, order: int, variant: str) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """Predictor (a, weights of m_i, m_{i-1}, ...) and correction (weights of m_{i+1}, m_i, ...) of one step."""
    keep, weight = first_order(grid.level(row), grid.level(row + 1))
    alpha_end = grid.alphas[row + 1]
    if grid.alphas[row] == 0.0 or row == grid.steps - 1 and order == 1:
        # From pure noise h is infinite: e^H - 1 = -1, and the trapezoid weight 1/2 of UniC-1 stays.
        return keep, (weight,), (0.5 * alpha_end, -0.5 * alpha_end)
    h = grid.lam(row + 1) - grid.lam(row)
    scale = -h if variant == "bh1" else math.expm1(-h)
    nodes = [(grid.lam(row - k) - grid.lam(row)) / h for k in range(1, order)]
    moments = [math.factorial(k) * _psi(k, -h) / scale for k in range(1, order + 1)]
    ahead = [0.5] if order == 2 else _moment_weights(nodes, moments[:-1])
    both = [0.5] if order == 1 else _moment_weights([*nodes, 1.0], moments)
    unit = -alpha_end * scale
    slopes = [unit * rho / node for rho, node in zip(ahead, nodes, strict=True)]
    changes = [unit * (rho - old) / node for rho, old, node in zip(both, ahead, nodes, strict=False)]
    newest = unit * both[-1]
    return keep, (weight - sum(slopes), *slopes), (newest, -newest - sum(changes), *changes)


def _psi(k: int, x: float) -> float:
    """psi_k(x) = sum_{j >= 1} x^j / (j + k)!: psi_1 = (e^x - 1)/x - 1, psi_{k+1} = psi_k / x - 1/(k+1)!."""
    if abs(x) < 1.0:
        return math.fsum(x**j / math.factorial(j + k) for j in range(1, 22))
    value = math.expm1(x) / x - 1.0
    for j in range(1, k):
        value = value / x - 1.0 / math.factorial(j + 1)
    return value


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
