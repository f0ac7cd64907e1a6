"""DDIM: the prediction frozen over the step; eta > 0 replaces part of the noise by fresh noise.

x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z,   s = eta (sigma'/sigma) sqrt(sigma^2 - (alpha sigma'/alpha')^2)
Source: Song, Meng and Ermon 2020, eq. 12 and 16, written for any (alpha, sigma).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.rows import Level, Update, assemble, require_number
from vivace.engine.timesteps import Grid, choose

VARIANCES = ("fixed_small", "fixed_large")


def ddim(grid: Grid, prediction: str, *, eta: float = 0.0) -> tuple[Step, ...]:
    """Rows of DDIM. eta: share of fresh noise in [0, 1]; 0 deterministic, 1 as DDPM on the same grid."""
    return ddim_rows(grid, prediction, ends_of(grid), eta=require_number("ddim", "eta", eta, 0.0, 1.0))


def ends_of(grid: Grid) -> list[Level]:
    """The level every row steps to: that of the next row."""
    return [grid.level(row + 1) for row in range(grid.steps)]


def ddim_rows(
    grid: Grid,
    prediction: str,
    ends: Sequence[Level],
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    transform: Transform | None = None,
) -> tuple[Step, ...]:
    """Rows that step to the levels `ends`, which need not be those of the next row; s_noise scales the fresh noise.

    With a `transform` on x0 the direction eps stays that of the untransformed prediction.
    """
    updates = []
    for row, end in enumerate(ends):
        start = grid.level(row)
        kept, fresh = split_noise(start, end, eta)
        if transform is None:
            keep = kept / start[1]
            updates.append(Update(keep, (end[0] - keep * start[0],), noise=s_noise * fresh))
        else:
            updates.append(Update(0.0, (end[0],), eps=kept, noise=s_noise * fresh))
    return assemble(grid, prediction, updates, transform)


def split_noise(start: Level, end: Level, eta: float) -> tuple[float, float]:
    """(sigma' sqrt(1 - q), sigma' sqrt(q)) with sqrt(q) = eta sqrt(1 - e^-2h): the noise kept and the fresh noise."""
    (alpha, sigma), (alpha_end, sigma_end) = start, end
    fresh = eta * (sigma_end / sigma) * math.sqrt(max(sigma**2 - (alpha * sigma_end / alpha_end) ** 2, 0.0))
    return math.sqrt(max(sigma_end**2 - fresh**2, 0.0)), fresh


def euler_ancestral(grid: Grid, prediction: str, *, eta: float = 1.0, s_noise: float = 1.0) -> tuple[Step, ...]:
    """Rows of ancestral Euler: an Euler step of y = x/alpha in rho = sigma/alpha down to rho_d, then fresh noise rho_u.

    rho_u = eta rho' sqrt(1 - rho'^2/rho^2), rho_d^2 = rho'^2 - rho_u^2: DDIM with this eta, in the convention of EDM.
    eta: share of fresh noise in [0, 1]; s_noise: factor on it.
    Source: Karras et al. 2022, appendix B.5 (ancestral sampling in sigma).
    """
    share = require_number("euler_ancestral", "eta", eta, 0.0, 1.0)
    scale = require_number("euler_ancestral", "s_noise", s_noise)
    return ddim_rows(grid, prediction, ends_of(grid), eta=share, s_noise=scale)


def ddpm(grid: Grid, prediction: str, *, variance: str = "fixed_small") -> tuple[Step, ...]:
    """Rows of DDPM, ancestral sampling of q(x' | x, x0) on any grid.

    variance: "fixed_small" posterior variance s^2 sigma'^2 / sigma^2, "fixed_large" s^2, with s as in `ddpm_rows`.
    """
    return ddpm_rows(grid, prediction, ends_of(grid), variance=choose("ddpm: variance", variance, VARIANCES))


def ddpm_rows(
    grid: Grid,
    prediction: str,
    ends: Sequence[Level],
    *,
    variance: str = "fixed_small",
    transform: Transform | None = None,
) -> tuple[Step, ...]:
    """Rows that step to `ends`; a step to sigma' = 0 adds no noise.

    x' = (r sigma'^2/sigma^2) x + (alpha' s^2/sigma^2) x0 + c z,   r = alpha/alpha',   s^2 = sigma^2 - r^2 sigma'^2
    Source: Ho, Jain and Abbeel 2020, eq. 6 and 7, written for any (alpha, sigma).
    """
    updates = []
    for row, (alpha_end, sigma_end) in enumerate(ends):
        alpha, sigma = grid.level(row)
        ratio = alpha / alpha_end
        between = max(sigma**2 - (ratio * sigma_end) ** 2, 0.0)
        fresh = math.sqrt(between) * (sigma_end / sigma if variance == "fixed_small" else 1.0)
        keep, weight = ratio * (sigma_end / sigma) ** 2, alpha_end * between / sigma**2
        updates.append(Update(keep, (weight,), noise=fresh if sigma_end else 0.0))
    return assemble(grid, prediction, updates, transform)
