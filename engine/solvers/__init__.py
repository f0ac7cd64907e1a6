"""Solvers: functions from a grid to rows of float64 coefficients, none with a loop over a network.

A solver is `solver(grid, prediction, *, option=default, ...) -> tuple[Step, ...]`, or `Rows` where some coefficients
are tensors: its keywords are its options. One with an option `table` is handed the calibration table itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vivace.engine.plan import Step
from vivace.engine.solvers.adams import deis, lagrange, lms
from vivace.engine.solvers.bdia import bdia
from vivace.engine.solvers.dc_solver import dc_solver
from vivace.engine.solvers.ddim import ddim, ddpm, euler_ancestral
from vivace.engine.solvers.dpm_solver_v3 import dpm_solver_v3
from vivace.engine.solvers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from vivace.engine.solvers.flow_euler import flow_euler
from vivace.engine.solvers.ghvb import ghvb
from vivace.engine.solvers.gradient_estimation import gradient_estimation
from vivace.engine.solvers.heun import euler, flow_heun, heun
from vivace.engine.solvers.iia import iia
from vivace.engine.solvers.lcm import lcm
from vivace.engine.solvers.pndm import ipndm, pndm
from vivace.engine.solvers.rows import Rows
from vivace.engine.solvers.singlestep import dpm_solver, dpmpp_2s
from vivace.engine.solvers.unipc import unipc
from vivace.engine.solvers.usf import usf
from vivace.engine.timesteps import Grid, choose

__all__ = ["PER_ROW", "SOLVERS", "solver_options", "solver_rows"]

# Options that hold one value a row; a tail takes those of its rows.
PER_ROW = frozenset({"ratios", "orders", "forms", "variables", "corrected", "relaxation", "fed"})

SOLVERS: Mapping[str, Callable[..., tuple[Step, ...] | Rows]] = {
    solver.__name__: solver
    for solver in (
        bdia,
        dc_solver,
        ddim,
        ddpm,
        deis,
        dpm_solver,
        dpm_solver_v3,
        dpmpp_2m,
        dpmpp_2m_sde,
        dpmpp_2s,
        dpmpp_3m,
        euler,
        euler_ancestral,
        flow_euler,
        flow_heun,
        ghvb,
        gradient_estimation,
        heun,
        iia,
        ipndm,
        lagrange,
        lcm,
        lms,
        pndm,
        unipc,
        usf,
    )
}


def solver_options(name: str) -> dict[str, Any]:
    """Options of a solver with their defaults. Raises ArgumentError for an unknown solver."""
    solver = SOLVERS[choose("solver", name, tuple(SOLVERS))]
    parameters = inspect.signature(solver).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def solver_rows(name: str, grid: Grid, prediction: str, options: Mapping[str, Any]) -> Rows:
    """The rows of solver `name` on a grid. Raises ArgumentError for an unknown solver, option or option value."""
    known = tuple(solver_options(name))
    for option in options:
        choose(f"{name}: option", option, known)
    made = SOLVERS[name](grid, prediction, **options)
    return made if isinstance(made, Rows) else Rows(made, {})
