"""Gradient estimation: DDIM on eps extrapolated past its last change, with fresh noise if asked for.

  x' = (alpha'/alpha) x + alpha' (rho_p - rho) e + alpha' sqrt(rho'^2 - rho_p^2) z
  e = g eps_i + (1 - g) eps_{i-1}, e = eps_0 in the first row;  rho' = rho^mu rho_p^(1 - mu)
g is `gamma`: 1 is DDIM, 3/2 the Adams-Bashforth rule of steps equal in rho. mu = 0 adds no noise, 1/2 is DDPM.
Source: Permenter and Yuan 2023 (arXiv 2306.04848), algorithm 2 and section 4.
"""

from __future__ import annotations

import math

from vivace.engine.plan import Step
from vivace.engine.solvers.ddim import ends_of
from vivace.engine.solvers.rows import (
    Level,
    Update,
    assemble,
    first_order_eps,
    first_update,
    require_number,
    usable_order,
)
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError


def gradient_estimation(grid: Grid, prediction: str, *, gamma: float = 2.0, mu: float = 0.0) -> tuple[Step, ...]:
    """Rows of the gradient-estimation sampler, one evaluation each.

    Args:
        gamma: g, from 0 to 4; 1 is DDIM in eps form.
        mu: share of the step that is noise, in [0, 1), see the head of the file; 0 the deterministic sampler.
    The first row, one behind alpha = 0 and one to sigma = 0 take e = eps_i. Order 1, and 2 for gamma = 3/2 on steps
    equal in rho. Memory: one slot of sample size besides the newest value.
    Raises: ArgumentError.
    """
    share = require_number("gradient_estimation", "gamma", gamma, 0.0, 4.0)
    noise = require_number("gradient_estimation", "mu", mu, 0.0, 1.0)
    if noise == 1.0:
        raise ArgumentError("gradient_estimation: mu must be below 1; 1/2 is DDPM")
    updates = []
    for row, end in enumerate(ends_of(grid)):
        start = grid.level(row)
        inner, fresh = _split(start, end, noise)
        if start[0] == 0.0:
            first = first_update("eps", start, inner)
            updates.append(Update(first.keep, first.weights, x0=first.x0, noise=fresh))
            continue
        keep, weight = first_order_eps(start, inner)
        weights: tuple[float, ...] = (weight,)
        if share != 1.0 and usable_order(grid, row, 2) == 2:
            weights = (share * weight, (1.0 - share) * weight)
        updates.append(Update(keep, weights, noise=fresh))
    return assemble(grid, prediction, updates, form="eps")


def _split(start: Level, end: Level, mu: float) -> tuple[Level, float]:
    """((alpha', alpha' rho_p), alpha' sqrt(rho'^2 - rho_p^2)): where the step goes, and the noise from there on."""
    alpha, sigma = end
    if mu == 0.0 or sigma == 0.0:
        return end, 0.0
    fall = sigma * start[0] / (alpha * start[1])  # rho' / rho
    inner = sigma * fall ** (mu / (1.0 - mu))
    return (alpha, inner), math.sqrt(max(sigma**2 - inner**2, 0.0))
