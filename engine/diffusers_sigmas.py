"""`diffusers` schedulers of one step a noise level, on sigmas with alpha = 1 and on flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vivace.engine import diffusers_grids as grids
from vivace.engine import diffusers_rows as own
from vivace.engine.diffusers_config import Made, Request, prediction_of, transform_of
from vivace.engine.plan import Step
from vivace.engine.solvers.ddim import ddim_rows, ends_of
from vivace.engine.solvers.flow_euler import flow_euler
from vivace.engine.solvers.heun import churned_rows, flow_heun
from vivace.engine.solvers.rows import Level, Update, assemble, levels_of
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError


def _exploding(request: Request, rows: Callable[[Grid, str, int], tuple[Step, ...]]) -> Made:
    """A class on sigmas with alpha = 1; `rows` of (whole grid, prediction, first step)."""
    sigmas, fed = grids.exploding_sigmas(request)
    if grids.is_continuous(request):
        if request.timesteps is not None:
            raise ArgumentError(f"{request.name}: timesteps cannot be given with timestep_type='continuous'")
        fed = 0.25 * np.log(sigmas[:-1].astype(np.float32))
    grid, prediction = grids.exploding_grid(request, sigmas, fed), prediction_of(request)
    high = grid.sigmas[0]
    scale = high if request["timestep_spacing"] in ("linspace", "trailing") else math.hypot(high, 1.0)
    made = Made(grid, prediction, lambda first: own.exploding(rows(grid, prediction, first), prediction), scale)
    return replace(made, steps=request.steps)


def euler(request: Request) -> Made:
    """Euler and ancestral Euler: the step of DDIM with eta = 0 or 1 in sigma."""

    def rows(grid: Grid, prediction: str, first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        return ddim_rows(part, prediction, ends_of(part), eta=1.0 if "Ancestral" in request.name else 0.0)

    return _exploding(request, rows)


def heun(request: Request) -> Made:
    """Heun: two evaluations a step, one in the last."""
    transform = transform_of(request)

    def rows(grid: Grid, prediction: str, first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        corrected = [row + 1 < part.steps for row in range(part.steps)]
        return churned_rows(part, prediction, [0.0] * part.steps, corrected, transform=transform)

    return _exploding(request, rows)


def lms(request: Request) -> Made:
    """LMS of order 4, not lowered in the step to sigma = 0."""

    def rows(grid: Grid, prediction: str, first: int) -> tuple[Step, ...]:
        return assemble(grid.tail(first), prediction, own.lms_updates(grid, first), form="eps")

    return _exploding(request, rows)


def kdpm2(request: Request) -> Made:
    """KDPM2: a midpoint in log sigma, of the step down to sigma_down in the ancestral class."""
    logs, ancestral = np.log(request.table), "Ancestral" in request.name
    own_fed, own_middles = request.own_table("timesteps"), request.own_table("sigmas_interpol")

    def middle_of(row: int, start: float, down: float) -> tuple[float, float]:
        """(timestep, sigma) between a step's ends."""
        if own_fed is not None and own_middles is not None:
            return float(own_fed[2 * row + 1]), float(own_middles[2 * row + (not ancestral)])
        sigma = math.sqrt(start * down)
        return float(grids.nearest_timesteps(np.array([sigma]), logs)[0]), sigma

    def ends(row: int, start: float, end: float) -> tuple[float, float]:
        """(sigma the step goes down to, fresh noise)."""
        if not ancestral:
            return end, 0.0
        down, up = request.own_table("sigmas_down"), request.own_table("sigmas_up")
        if down is not None and up is not None:
            return float(down[2 * row]), float(up[2 * row])
        return end * end / start, end * math.sqrt(1.0 - (end / start) ** 2)

    def rows(grid: Grid, prediction: str, first: int) -> tuple[Step, ...]:
        points: list[tuple[float, Level]] = []
        updates: list[Update] = []
        for row in range(first, grid.steps):
            start, end = grid.sigmas[row], grid.sigmas[row + 1]
            points.append((grid.timesteps[row], (1.0, start)))
            if end == 0.0:
                updates.append(Update(1.0, (-start,)))
                continue
            down, fresh = ends(row, start, end)
            fed, middle = middle_of(row, start, down)
            points.append((fed, (1.0, middle)))
            updates.append(Update(1.0, (middle - start,), stage=True))
            updates.append(Update(1.0, (down - start,), noise=fresh))
        return assemble(levels_of(points, grid), prediction, updates, form="eps")

    return _exploding(request, rows)


def flow(request: Request) -> Made:
    """Flow matching: Euler, Heun, or x0 and fresh noise in every step (LCM, stochastic_sampling)."""
    sigmas, fed = grids.flow_sigmas(request)
    grid = grids.flow_grid(request, sigmas, fed)
    fresh = request.name == "FlowMatchLCMScheduler" or bool(request.config.get("stochastic_sampling"))

    def rows(first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        if fresh:
            updates = [Update(0.0, (end[0],), noise=end[1]) for end in ends_of(part)]
            return assemble(part, "flow", updates)
        return flow_heun(part, "flow") if "Heun" in request.name else flow_euler(part, "flow")

    return Made(grid, "flow", rows)
