"""Grids and plans for the solver tests, made without a schedule's named grids."""

import math

import numpy as np

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan
from vivace.engine.solvers import solver_rows
from vivace.engine.solvers.rows import start_from_noise
from vivace.engine.timesteps import Grid

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.01, 20.0)
FLOW = NoiseSchedule.flow()
LAMS = (-3.0, -2.1, -1.6, -0.2, 0.5, 1.7, 2.2, 3.0)


def vp_grid(lams=LAMS):
    """VP levels at these log-SNRs."""
    schedule, lam = VP, np.asarray(lams)
    alphas, sigmas = 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))
    return Grid(tuple(schedule.t_of_lam(lam)[:-1].tolist()), tuple(alphas.tolist()), tuple(sigmas.tolist()), schedule)


def edm_grid(lams=LAMS):
    sigmas = [math.exp(-lam) for lam in lams]
    return Grid(tuple(sigmas[:-1]), (1.0,) * len(sigmas), tuple(sigmas), EDM)


def flow_grid(lams=LAMS):
    times = [1 / (1 + math.exp(lam)) for lam in lams]
    return Grid(tuple(times[:-1]), tuple(1 - t for t in times), tuple(times), FLOW)


def plan_on(grid, solver, prediction="x0", **options):
    return Plan(solver_rows(solver, grid, prediction, options).steps, prediction, start_from_noise(1.0))
