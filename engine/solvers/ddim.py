"""DDIM: the prediction frozen over the step; eta > 0 replaces part of the noise by fresh noise.

x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z,   s = eta (sigma'/sigma) sqrt(sigma^2 - (alpha sigma'/alpha')^2)
Source: Song, Meng and Ermon 2020, eq. 12 and 16, written for any (alpha, sigma).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.rows import Update, assemble
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError


def ddim(grid: Grid, prediction: str, *, eta: float = 0.0) -> tuple[Step, ...]:
    """Rows of DDIM. eta: share of fresh noise in [0, 1]; 0 deterministic, 1 as DDPM on the same grid."""
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
        raise ArgumentError(f"ddim: eta must be a number in [0, 1], got {eta!r}")
    return ddim_rows(grid, prediction, [grid.level(row + 1) for row in range(grid.steps)], eta=float(eta))


def ddim_rows(
    grid: Grid,
    prediction: str,
    ends: Sequence[tuple[float, float]],
    *,
    eta: float = 0.0,
    transform: Transform | None = None,
) -> tuple[Step, ...]:
    """Rows that step to the levels `ends`, which need not be those of the next row.

    With a `transform` on x0 the direction eps stays that of the untransformed prediction.
    """
    updates = []
    for row, (alpha_end, sigma_end) in enumerate(ends):
        alpha, sigma = grid.level(row)
        fresh = eta * (sigma_end / sigma) * math.sqrt(max(sigma**2 - (alpha * sigma_end / alpha_end) ** 2, 0.0))
        kept = math.sqrt(max(sigma_end**2 - fresh**2, 0.0))
        if transform is None:
            updates.append(Update(kept / sigma, (alpha_end - kept / sigma * alpha,), noise=fresh))
        else:
            updates.append(Update(0.0, (alpha_end,), eps=kept, noise=fresh))
    return assemble(grid, prediction, updates, transform)
