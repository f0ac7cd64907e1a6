"""Multistep consistency sampling (LCM): jump to the model's x0, add noise to the next level.

  f = c_skip x + c_out x0,   x' = alpha' f + sigma' z;   the last row returns f
  c_skip = s^2/(tau^2 + s^2),  c_out = tau/sqrt(tau^2 + s^2),  tau = timestep_scaling t,  s = sigma_data
Source: Luo et al. 2023 (Latent Consistency Models), eq. 9 and algorithm 3; Song et al. 2023, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vivace.engine.plan import Step, Transform
from vivace.engine.solvers.ddim import ends_of
from vivace.engine.solvers.rows import Level, Update, assemble, levels_of, require_number
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError


def lcm(
    grid: Grid,
    prediction: str,
    *,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
    original_steps: int | None = 50,
) -> tuple[Step, ...]:
    """Rows of LCM.

    Args:
        sigma_data, timestep_scaling: of the boundary condition, as the model was distilled.
        original_steps: K of the distillation: VP timesteps move to the nearest of k T/K - 1, k = 1..K, the only ones
            the model knows; None leaves the grid as it is.
    """
    data = require_number("lcm", "sigma_data", sigma_data)
    scaling = require_number("lcm", "timestep_scaling", timestep_scaling)
    if original_steps is not None:
        grid = _distilled(grid, original_steps)
    return lcm_rows(grid, prediction, ends_of(grid), sigma_data=data, timestep_scaling=scaling)


def lcm_rows(
    grid: Grid,
    prediction: str,
    ends: Sequence[Level],
    *,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
    transform: Transform | None = None,
) -> tuple[Step, ...]:
    """Rows that step to `ends`; the last one returns f."""
    updates = []
    for row, end in enumerate(ends):
        tau = timestep_scaling * grid.timesteps[row]
        norm = tau**2 + sigma_data**2
        skip, out = (sigma_data**2 / norm, tau / math.sqrt(norm)) if norm else (1.0, 0.0)
        alpha, sigma = (1.0, 0.0) if row + 1 == grid.steps else end
        updates.append(Update(alpha * skip, (alpha * out,), noise=sigma))
    return assemble(grid, prediction, updates, transform)


def _distilled(grid: Grid, original_steps: int) -> Grid:
    """The grid on the timesteps of distillation. Raises ArgumentError when two rows fall on one."""
    if isinstance(original_steps, bool) or not isinstance(original_steps, int) or original_steps < grid.steps:
        raise ArgumentError(
            f"lcm: original_steps must be None or an integer of at least the {grid.steps} steps, got {original_steps!r}"
        )
    schedule = grid.schedule
    if schedule is None or schedule.kind != "vp" or schedule.train_steps is None:
        return grid
    known = np.arange(1, original_steps + 1) * (schedule.train_steps // original_steps) - 1.0
    nearest = [float(known[np.argmin(np.abs(known - t))]) for t in grid.timesteps]
    if len(set(nearest)) < grid.steps:
        raise ArgumentError(
            f"lcm: rows at timesteps {grid.timesteps} share one of the {original_steps} of distillation; use fewer "
            "steps, another grid, or original_steps=None"
        )
    return levels_of([(t, (schedule.alpha(t), schedule.sigma(t))) for t in nearest], grid)
