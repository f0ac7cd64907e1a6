"""Euler on a flow: x' = x + (t' - t) (eps - x0), for alpha = 1 - t, sigma = t.

Equal to DDIM on the same levels. Source: Liu, Gong and Liu 2022, eq. 2 by the Euler method.
"""

from __future__ import annotations

from vivace.engine.plan import PREDICTIONS, Affine, Step
from vivace.engine.prediction import to_eps, to_x0
from vivace.engine.solvers.rows import affine
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError


def flow_euler(grid: Grid, prediction: str) -> tuple[Step, ...]:
    """Rows of flow Euler; a prediction other than "flow" is converted to it in slot m0.

    Raises: ArgumentError on levels that are not a flow's; PlanError for "eps" at pure noise.
    """
    choose("prediction", prediction, PREDICTIONS)
    off = [row for row in range(grid.steps + 1) if abs(grid.alphas[row] + grid.sigmas[row] - 1.0) > 1e-6]
    if off:
        raise ArgumentError(
            "flow_euler: needs a flow schedule (alpha = 1 - sigma), but level "
            f"{off[0]} has (alpha, sigma) = {grid.level(off[0])}; use ddim, which is the same step for any schedule"
        )
    steps = []
    for row in range(grid.steps):
        alpha, sigma = grid.level(row)
        change = grid.sigmas[row + 1] - sigma
        if prediction == "flow":
            ops: tuple[Affine, ...] = (affine("x", ("x", 1.0), ("out", change)),)
        else:
            (px, po), (ex, eo) = to_x0(prediction, alpha, sigma), to_eps(prediction, alpha, sigma)
            ops = (affine("m0", ("x", ex - px), ("out", eo - po)), affine("x", ("x", 1.0), ("m0", change)))
        steps.append(Step(grid.timesteps[row], alpha, sigma, ops))
    return tuple(steps)
