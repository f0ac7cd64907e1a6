"""`diffusers` schedulers that read alpha^2 of integer timesteps, and iPNDM: request -> grid, prediction and rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vivace.engine import diffusers_grids as grids
from vivace.engine import diffusers_rows as own
from vivace.engine.diffusers_config import Made, Request, prediction_of, transform_of
from vivace.engine.plan import Step
from vivace.engine.solvers.ddim import ddim_rows, ends_of
from vivace.engine.solvers.pndm import ADAMS
from vivace.engine.solvers.rows import Level, Update, assemble
from vivace.engine.timesteps import spaced
from vivace.errors import ArgumentError, UnsupportedError


def _timesteps(request: Request, points: int) -> Any:
    """Integer timesteps inside the table; N of them spaced as `points` are."""
    steps, count = request.steps, request.train_steps
    if steps > count:
        raise ArgumentError(f"steps: {steps} is more than the {count} training timesteps")
    offset = request["steps_offset"]
    index = spaced(request["timestep_spacing"], count, steps, offset=offset, points=points).astype(int)
    if index.max() >= count:
        raise ArgumentError(f"steps_offset: timestep {index.max()} is beyond the {count} training timesteps")
    return index


def _given_timesteps(request: Request) -> Any:
    """Explicit integer timesteps, falling, inside the table."""
    index = np.asarray(request.timesteps).astype(np.int64)
    if (np.diff(index) >= 0).any() or index[0] >= request.train_steps or index[-1] < 0:
        raise ArgumentError(f"timesteps: must fall and lie in 0..{request.train_steps - 1}, got {index.tolist()}")
    return index


def _levels(squares: Any) -> list[Level]:
    values = squares.astype(np.float64)
    return list(zip(np.sqrt(values).tolist(), np.sqrt(1.0 - values).tolist(), strict=True))


def ddim(request: Request) -> Made:
    """DDIM: steps from t to t - T // N, whatever the next timestep is; eta = 0. CogVideoX's never clips."""
    table = request.table.astype(np.float64)
    index = _timesteps(request, request.steps)
    after = index - request.train_steps // request.steps
    final = 1.0 if request["set_alpha_to_one"] else table[0]
    ends = np.where(after >= 0, table[np.maximum(after, 0)], final)
    grid = grids.squared_grid(index, np.append(table[index], ends[-1]))
    targets, prediction = _levels(ends), prediction_of(request)
    transform = None if request.name == "CogVideoXDDIMScheduler" else transform_of(request)
    return Made(
        grid, prediction, lambda first: ddim_rows(grid.tail(first), prediction, targets[first:], transform=transform)
    )


def ddpm(request: Request) -> Made:
    """DDPM: every step goes to the next timestep, the last to alpha = 1."""
    index = _timesteps(request, request.steps) if request.timesteps is None else _given_timesteps(request)
    grid = grids.squared_grid(index, np.append(request.table[index].astype(np.float64), 1.0))
    prediction, transform = prediction_of(request), transform_of(request)
    variance = "fixed_large" if request["variance_type"] == "fixed_large" else "fixed_small"

    def rows(first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        return assemble(part, prediction, own.ddpm_updates(part, ends_of(part), variance), transform)

    return Made(grid, prediction, rows)


def pndm(request: Request) -> Made:
    """PNDM: Runge-Kutta rows first unless skipped, then Adams rows; steps of T // N from every timestep."""
    steps, count, warm = request.steps, request.train_steps, bool(request["skip_prk_steps"])
    index = _timesteps(request, steps)
    stride, table = count // steps, request.table.astype(np.float64)
    if warm:
        fed, runge = [*index[:2], *index[1:]], 0
    else:
        if steps < 4:
            raise request.refuse("skip_prk_steps", f"its Runge-Kutta rows need 4 steps, got {steps}")
        half = [time + stride // 2 for time in index[:4]]
        parts = [[index[k], half[k + 1], half[k + 1], index[k + 1]] for k in range(3)]
        fed, runge = [time for part in parts for time in part] + list(index[3:]), 12
    ends = [time - stride for time in fed]
    starts = list(fed)
    for row in range(runge):
        starts[row] = fed[row // 4 * 4]
        ends[row] = fed[row] - (0 if row % 2 else stride // 2)
    final = 1.0 if request["set_alpha_to_one"] else table[0]
    prediction = prediction_of(request)
    grid = grids.squared_grid(np.array(fed), np.append(table[fed], final))

    def rows(first: int) -> tuple[Step, ...]:
        if first and runge:
            raise request.refuse("skip_prk_steps", "an image-to-image run needs skip_prk_steps=True")
        begins, stops = starts[first:], ends[first:]
        if warm and len(begins) > 1:  # the second row redoes the step before it
            begins[1], stops[1] = begins[1] + stride, begins[1]
        if max(begins) >= count:
            raise ArgumentError(f"{request.name}: timestep {max(begins)} is beyond the {count} training timesteps")
        from_to = [
            _levels(np.array([table[a], table[b] if b >= 0 else final])) for a, b in zip(begins, stops, strict=True)
        ]
        updates, slots = own.pndm_updates(prediction, [(a, b) for a, b in from_to], runge, warm)
        return assemble(grid.tail(first), prediction, updates, form="out", slots=slots)

    return Made(grid, prediction, rows, steps=steps)


def lcm(request: Request) -> Made:
    """LCM: every floor-th timestep of the distillation grid, from its noisy end; strength shortens that grid."""
    steps, count, origin = request.steps, request.train_steps, int(request["original_inference_steps"])
    strength = 1.0 if request.strength is None else request.strength
    if origin > count:
        raise ArgumentError(f"original_inference_steps: {origin} is more than the {count} training timesteps")
    if request.timesteps is not None:
        index = _given_timesteps(request)
        index = index[len(index) - min(int(len(index) * strength), len(index)) :]
    else:
        known = np.arange(1, int(origin * strength) + 1) * (count // origin) - 1
        if len(known) < steps:
            raise ArgumentError(f"steps: {steps} is more than the {len(known)} of original_inference_steps * strength")
        index = known[::-1][np.floor(np.linspace(0, len(known), steps, endpoint=False)).astype(int)]
    table = request.table.astype(np.float64)
    grid = grids.squared_grid(index, np.append(table[index], 1.0))
    scaled = index * float(request["timestep_scaling"])
    scalings = [(0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)) for s in scaled.tolist()]
    ends: list[Level | None] = [*_levels(table[index[1:]])]
    ends.append(None if len(index) == steps else grid.level(len(index) - 1))  # cut explicit timesteps end in noise
    prediction, updates = prediction_of(request), own.lcm_updates(grid, scalings, ends)
    transform = transform_of(request)
    return Made(grid, prediction, lambda first: assemble(grid, prediction, updates, transform), tailed=True)


def ipndm(request: Request) -> Made:
    """iPNDM: v at t in [0, 1], eps history in Adams weights of equal steps; from alpha = 0 the state is only scaled."""
    if request["trained_betas"] is not None:
        sigmas = np.asarray(request["trained_betas"], dtype=np.float32).astype(np.float64)
    else:
        sigmas = np.sin(np.append(np.linspace(1.0, 0.0, request.steps + 1)[:-1], 0.0) * math.pi / 2) ** 2
    alphas = np.sqrt(1.0 - sigmas**2)
    fed = np.arctan2(sigmas, alphas)[:-1] / math.pi * 2
    own_sigmas, own_alphas, own_fed = (request.own_table(key) for key in ("betas", "alphas", "timesteps"))
    if own_sigmas is not None and own_alphas is not None and own_fed is not None:
        sigmas, alphas, fed = own_sigmas, own_alphas, own_fed
    grids.require_falling(request, sigmas)
    if sigmas[0] == 1.0 and sigmas[1] == 0.0:
        raise UnsupportedError(f"{request.name}: steps=1 is not covered; the class returns 0 whatever is predicted")
    grid = grids.make_levels(fed, alphas, sigmas)

    def rows(first: int) -> tuple[Step, ...]:
        updates = []
        for row in range(first, grid.steps):
            (alpha, sigma), end = grid.level(row), grid.level(row + 1)
            keep = end[0] / max(alpha, 1e-8)
            weights = ADAMS[min(row - first + 1, 4)]
            if alpha == 0.0:
                updates.append(Update(end[1], (0.0,)))
            else:
                updates.append(Update(keep, tuple(w * (end[1] - keep * sigma) for w in weights)))
        made = assemble(grid.tail(first), "eps", updates, form="eps")
        return own.refeed(made, lambda step: (step.sigma, step.alpha))

    return Made(grid, "v", rows, steps=request.steps)
