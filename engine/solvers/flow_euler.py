"""Euler on a flow: x' = x + (t' - t) (eps - x0), for alpha = 1 - t, sigma = t.

Equal to DDIM on the same levels. Source: Liu, Gong and Liu 2022, eq. 2 by the Euler method.
"""

from __future__ import annotations

from vivace.engine.plan import PREDICTIONS, Affine, Step
from vivace.engine.prediction import to_flow
from vivace.engine.solvers.rows import affine
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError


def flow_euler(grid: Grid, prediction: str) -> tuple[Step, ...]:
    """Rows of flow Euler; a prediction other than "flow" is converted to it in slot m0.

    Raises: ArgumentError on levels that are not a flow's; PlanError for "eps" at pure noise.
    """
    choose("prediction", prediction, PREDICTIONS)
    require_flow("flow_euler", grid)
    steps = []
    for row in range(grid.steps):
        alpha, sigma = grid.level(row)
        change = grid.sigmas[row + 1] - sigma
        if prediction == "flow":
            ops: tuple[Affine, ...] = (affine("x", ("x", 1.0), ("out", change)),)
        else:
            p, q = to_flow(prediction, alpha, sigma)
            ops = (affine("m0", ("x", p), ("out", q)), affine("x", ("x", 1.0), ("m0", change)))
        steps.append(Step(grid.timesteps[row], alpha, sigma, ops))
    return tuple(steps)


def require_flow(solver: str, grid: Grid) -> None:
    """Levels with alpha = 1 - sigma. Raises ArgumentError."""
    off = [row for row in range(grid.steps + 1) if abs(grid.alphas[row] + grid.sigmas[row] - 1.0) > 1e-6]
    if off:
        raise ArgumentError(
            f"{solver}: needs a flow schedule (alpha = 1 - sigma), but level {off[0]} has (alpha, sigma) = "
            f"{grid.level(off[0])}; ddim and heun take steps on any schedule"
        )
