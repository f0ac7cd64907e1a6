"""IIA, improved integration approximation: a base solver whose coefficients are moved by fitted numbers.

  x' = base(x, m_i, m_{i-1}, ...) + g x + sum_k g_k m_{i-k}

with m the predictions that the base keeps: eps of DDIM, Heun and DPM-Solver, x0 of DPM-Solver++. The numbers g of a
step are the least-squares answer to many small steps from the same state (`calibrate_iia`). All 0: the base solver.
  ddim                                IIA-DDIM of guided sampling: one number on the guided eps
  ddim, state                         IIA-DDIM otherwise: numbers on x and eps, the same span as x0 and eps
  heun, depth 1                     BIIA-EDM: numbers on both slopes of a step; depth 3: of the step before too
  dpm_solver, dpmpp_2m, depth 1     IIA-DPM-Solver: numbers on the newest value and the one before
Source: Zhang, Niwa and Kleijn 2023 (IIA), sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.engine.plan import Step
from vivace.engine.solvers.ddim import ddim, ends_of
from vivace.engine.solvers.dpmpp import dpmpp_updates
from vivace.engine.solvers.fitted import Table, check_grid, settled
from vivace.engine.solvers.heun import churned_updates
from vivace.engine.solvers.rows import Update, assemble, falling_orders, first_update
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

NAME = "iia"
DEPTHS: Mapping[str, int] = {"ddim": 0, "heun": 1, "dpm_solver": 1, "dpmpp_2m": 1}
"""Bases, with how many earlier values get numbers unless the caller says so."""
OPTIONS: Mapping[str, Any] = {"base": "ddim", "depth": None, "state": False}
MOST_DEPTH = 3


def iia(
    grid: Grid,
    prediction: str,
    *,
    shifts: Sequence[Sequence[float]] | None = None,
    base: str | None = None,
    depth: int | None = None,
    state: bool | None = None,
    table: Table | None = None,
) -> tuple[Step, ...]:
    """Rows of IIA.

    Args:
        shifts: of every row (g, g_0, ..., g_depth); default: the table's, without one 0. An inner stage's are 0.
        base: "ddim" (default), "heun" (two evaluations a step), "dpm_solver" or "dpmpp_2m" (both of order 2, the last
            row of order 1).
        depth: earlier values that get a number, 0..3; default 0 for ddim, else 1. state: x gets one too, default no.
        table: of `calibrate_iia`, for one number of steps; settles base, depth and state.
    A tail keeps the numbers of its rows, but rows that lack a value they were fitted with are the base's.
    Raises: ArgumentError.
    """
    options = settled(NAME, {"base": base, "depth": depth, "state": state}, OPTIONS, table)
    levels, form, updates, depth = base_rows(grid, options)
    if table is not None:
        if shifts is not None:
            raise ArgumentError(f"{NAME}: give a table or shifts, not both")
        if table.metadata["steps"] != grid.first + grid.steps:
            raise ArgumentError(
                f"{NAME}: the table is for {table.metadata['steps']} steps, the plan has {grid.first + grid.steps}; "
                "calibrate for as many"
            )
        check_grid(NAME, grid, table)
        shifts = [[float(number) for number in row] for row in table.arrays["shifts"]]
    given = _checked(shifts, updates, depth, grid.first > 0)
    if options["base"] == "ddim" and not any(map(any, given)):
        return ddim(grid, prediction)  # in its own form
    return iia_rows(levels, prediction, form, updates, given)


def base_rows(grid: Grid, options: Mapping[str, Any]) -> tuple[Grid, str, list[Update], int]:
    """(levels of the evaluations, form of the values kept, coefficients, depth) of the base. Raises ArgumentError."""
    base = choose(f"{NAME}: base", options["base"], tuple(DEPTHS))
    depth = DEPTHS[base] if options["depth"] is None else options["depth"]
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= MOST_DEPTH:
        raise ArgumentError(f"{NAME}: depth must be an integer in 0..{MOST_DEPTH}, got {depth!r}")
    if not isinstance(options["state"], bool):
        raise ArgumentError(f"{NAME}: state must be True or False, got {options['state']!r}")
    rows = range(grid.steps)
    if base == "heun":
        levels, updates = churned_updates(grid, [0.0] * grid.steps, [row + 1 < grid.steps for row in rows])
        return levels, "eps" if grid.steps > 1 else "x0", updates, depth
    if base == "ddim":
        ends = ends_of(grid)
        return grid, "eps", [first_update("eps", grid.level(row), ends[row]) for row in rows], depth
    form = "x0" if base == "dpmpp_2m" else "eps"
    ages = [range(order) for order in falling_orders(grid.steps, 2, True)]
    third = "published" if base == "dpmpp_2m" else "third_order"
    return grid, form, dpmpp_updates(grid, ages, (form, "midpoint", third, 0.0)), depth


def iia_rows(
    levels: Grid,
    prediction: str,
    form: str,
    updates: Sequence[Update],
    shifts: Sequence[Sequence[float]],
    ring: int | None = None,
) -> tuple[Step, ...]:
    """Rows of updates moved by (g, g_0, ...) each. ring: slots of history, default as many as are read."""
    moved = [shifted(update, row) for update, row in zip(updates, shifts, strict=True)]
    slots = None if ring is None else [row % ring for row in range(len(moved))]
    return assemble(levels, prediction, moved, form=form, slots=slots)


def shifted(update: Update, numbers: Sequence[float]) -> Update:
    """The update with (g, g_0, g_1, ...) added to the coefficients of x and of the values, newest first."""
    if not any(numbers):
        return update
    weights = [old + new for old, new in zip_longest(update.weights, numbers[1:], fillvalue=0.0)]
    while len(weights) > 1 and weights[-1] == 0.0:
        weights.pop()
    return replace(update, keep=update.keep + numbers[0], weights=tuple(weights))


def fitting(update: Update, row: int, depth: int, state: bool) -> NDArray[np.bool_]:
    """Which of (g, g_0, ..., g_depth) a row has: none of an inner stage, those of values that there are."""
    mask = np.zeros(depth + 2, dtype=np.bool_)
    if not update.stage:
        mask[0] = state
        mask[1 : min(depth, row) + 2] = True
    return mask


def _checked(
    shifts: Sequence[Sequence[float]] | None, updates: Sequence[Update], depth: int, tail: bool
) -> list[list[float]]:
    """Numbers of every row; of a tail the last rows' of the full plan. Raises ArgumentError."""
    none = [0.0] * (depth + 2)
    if shifts is None:
        return [none for _ in updates]
    rows = [list(row) if isinstance(row, Sequence) and not isinstance(row, str) else row for row in shifts]
    if len(rows) < len(updates) or (len(rows) > len(updates) and not tail):
        raise ArgumentError(
            f"{NAME}: shifts for {len(rows)} rows, the plan has {len(updates)}; give them for every row"
        )
    out: list[list[float]] = []
    for number, (update, row) in enumerate(zip(updates, rows[-len(updates) :], strict=True)):
        wanted = isinstance(row, list) and len(row) == depth + 2
        if not wanted or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in row):
            raise ArgumentError(f"{NAME}: shifts[{number}] is {row!r:.60}; {depth + 2} finite numbers are needed")
        needs = np.flatnonzero(row)
        if needs.size and (update.stage or needs[-1] - 1 > number):
            if not tail:
                raise ArgumentError(f"{NAME}: shifts[{number}] moves a value that the row has not; give 0 there")
            row = none
        out.append([float(value) for value in row])
    return out
