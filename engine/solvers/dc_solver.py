"""DC-Solver: a multistep rule whose newest value is replaced by its interpolation at a nearby time, and stays replaced.

A corrector moves the state but not the value evaluated before; the two no longer belong together. With t' = r t_i +
(1 - r) t_{i-1} and the Lagrange basis L_k over t_i, t_{i-1}, t_{i-2} of the values in memory,

  m_i <- sum_k L_k(t') m_{i-k},    then x' from m_i, m_{i-1}, ... by the base rule

r = 1 changes nothing. The corrector of the step before still reads the value as it was evaluated. One ratio r a step is
fitted to a converged trajectory (`calibrate_dc_solver`); ratios of other numbers of steps and scales of guidance come
from a polynomial through those that were fitted (cascade polynomial regression).
Source: Zhao et al. 2024 (DC-Solver): dynamic compensation, cascade polynomial regression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.engine.plan import Affine, Op, Step
from vivace.engine.solvers.dpmpp import VARIANTS as DPMPP_VARIANTS
from vivace.engine.solvers.dpmpp import dpmpp_updates
from vivace.engine.solvers.fitted import Table, check_grid, per_row, same_times, settled
from vivace.engine.solvers.rows import Update, affine, assemble, falling_orders, require_flag, require_order
from vivace.engine.solvers.unipc import VARIANTS as UNIPC_VARIANTS
from vivace.engine.solvers.unipc import unipc_updates
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

NAME = "dc_solver"
BASES = {"unipc": UNIPC_VARIANTS, "dpmpp": DPMPP_VARIANTS}
BASE: Mapping[str, Any] = {
    "base": "unipc",
    "order": 2,
    "variant": None,
    "corrector": True,
    "disable_corrector": (),
    "form": "x0",
    "lower_order_final": True,
    "points": 3,
}
"""Options that a table settles, with their defaults; variant None: "bh2" of UniPC, "midpoint" of DPM-Solver++."""
RAW = "raw"  # slot of the newest value as it was evaluated
DEGREES = (4, 2, 2)  # of the polynomial in the share of the steps, guidance, number of steps
GUIDANCE_UNIT, STEPS_UNIT = 12.0, 50.0


def dc_solver(
    grid: Grid,
    prediction: str,
    *,
    ratios: float | Sequence[float] | None = None,
    points: int | None = None,
    base: str | None = None,
    order: int | None = None,
    variant: str | None = None,
    corrector: bool | None = None,
    disable_corrector: Sequence[int] | None = None,
    form: str | None = None,
    lower_order_final: bool | None = None,
    guidance: float | None = None,
    table: Table | None = None,
) -> tuple[Step, ...]:
    """Rows of DC-Solver.

    Args:
        ratios: r of every row, or one for all; default: the table's, without one 1, which is the base solver. Rows with
            fewer than points - 1 values before them keep 1, and so do rows at a timestep of the row before.
        points: values that are interpolated, 2 or 3 (default).
        base: "unipc" (default) or "dpmpp" (no corrector); order (default 2), variant, corrector, disable_corrector,
            form, lower_order_final: as of `unipc`, or of DPM-Solver++.
        guidance: scale for which the table's ratios are wanted; not needed when it was measured at one scale.
        table: of `calibrate_dc_solver`; settles the base. Ratios of a number of steps and guidance that were measured
            are those measured, others are the polynomial's.
    Raises: ArgumentError.
    """
    if disable_corrector is not None and table is not None:  # a table counts rows of the full plan
        disable_corrector = [row + grid.first for row in disable_corrector]
    given = {
        "base": base, "order": order, "variant": variant, "corrector": corrector, "form": form, "points": points,
        "disable_corrector": disable_corrector, "lower_order_final": lower_order_final,
    }  # fmt: skip
    options = settled(NAME, given, BASE, table)
    if table is not None:
        if ratios is not None:
            raise ArgumentError(f"{NAME}: give a table or ratios, not both")
        check_grid(NAME, grid, table)
        ratios = ratios_of(table, grid, guidance)
        options["disable_corrector"] = [row - grid.first for row in options["disable_corrector"]]
    elif guidance is not None:
        raise ArgumentError(f"{NAME}: guidance says which ratios of a table are wanted; without a table leave it out")
    values = per_row(NAME, "ratios", 1.0 if ratios is None else ratios, grid.steps)
    return dc_rows(grid, prediction, values, options)


def dc_rows(
    grid: Grid, prediction: str, ratios: Sequence[float], options: Mapping[str, Any], *, same_slots: bool = False
) -> tuple[Step, ...]:
    """Rows with a ratio each.

    options: a value for every name in `BASE`; same_slots: whatever the ratios, so that rows of different ones mix.
    """
    points = options["points"]
    if points not in (2, 3) or isinstance(points, bool):
        raise ArgumentError(f"{NAME}: points must be 2 or 3, got {points!r}")
    updates, plain = base_updates(grid, options)
    weights = {row: w for row in range(grid.steps) if (w := compensation(grid, row, ratios[row], points))}
    form = options["form"]
    if not weights and not same_slots:
        return assemble(grid, prediction, updates, form=form)
    ring = ring_of(updates, points)
    rows = assemble(grid, prediction, updates, form=form, slots=[row % ring for row in range(grid.steps)])
    return tuple(
        _compensated(step, row, ring, weights[row], plain[row].weights[0]) if row in weights else step
        for row, step in enumerate(rows)
    )


def base_updates(grid: Grid, options: Mapping[str, Any]) -> tuple[list[Update], list[Update]]:
    """Rows of the base solver, and the same with no step corrected. Raises ArgumentError."""
    base = choose(f"{NAME}: base", options["base"], tuple(BASES))
    order, form = require_order(NAME, options["order"], 3), choose(f"{NAME}: form", options["form"], ("x0", "eps"))
    default = BASES[base][-1] if base == "unipc" else BASES[base][0]
    variant = choose(f"{NAME}: variant", options["variant"] or default, BASES[base])
    orders = falling_orders(grid.steps, order, require_flag(NAME, "lower_order_final", options["lower_order_final"]))
    without = options["disable_corrector"]
    if any(isinstance(row, bool) or not isinstance(row, int) for row in without):
        raise ArgumentError(f"{NAME}: disable_corrector must be row numbers, got {tuple(without)!r}")
    wanted = require_flag(NAME, "corrector", options["corrector"])
    if base == "dpmpp":
        made = dpmpp_updates(grid, [range(n) for n in orders], (form, variant, "third_order", 0.0))
        return made, made
    corrected = [wanted and row not in without for row in range(grid.steps)]
    plain = unipc_updates(grid, orders, variant, [False] * grid.steps, form=form)
    return unipc_updates(grid, orders, variant, corrected, form=form), plain


def ring_of(updates: Sequence[Update], points: int) -> int:
    """Slots of history where values are interpolated: row i keeps its value in m<i mod ring>."""
    return max(points, *(len(update.weights) for update in updates))


def compensation(grid: Grid, row: int, ratio: float, points: int) -> tuple[float, ...]:
    """Weights of m_i, m_{i-1}, ... in the new m_i: the Lagrange basis at r t_i + (1 - r) t_{i-1}; () where r is 1."""
    if ratio == 1.0 or row < points - 1:
        return ()
    times = [grid.timesteps[row - age] for age in range(points)]
    if len(set(times)) < points:
        return ()
    at = ratio * times[0] + (1.0 - ratio) * times[1]
    return tuple(math.prod((at - u) / (own - u) for u in times if u != own) for own in times)


def _compensated(step: Step, row: int, ring: int, weights: Sequence[float], newest: float) -> Step:
    """The row with its value replaced; what the corrector of the step before adds still reads it as it was."""
    slots = [f"m{(row - age) % ring}" for age in range(len(weights))]
    ops: list[Op] = []
    for op in step.ops:
        assert isinstance(op, Affine)
        if op.dst == slots[0]:
            mixed = [(RAW, weights[0]), *zip(slots[1:], weights[1:], strict=True)]
            ops += [replace(op, dst=RAW), affine(slots[0], *mixed)]
            continue
        terms: list[tuple[str, float]] = []
        for slot, coef in op.terms:
            assert isinstance(coef, float)
            terms += [(slot, newest), (RAW, coef - newest)] if slot == slots[0] else [(slot, coef)]
        ops.append(affine(op.dst, *terms))
    return replace(step, ops=tuple(ops))


# --- ratios of a table -----------------------------------------------------------------------------------------------
def ratios_of(table: Table, grid: Grid, guidance: float | None = None) -> list[float]:
    """Ratios of a table for the rows of a grid: those measured, or the polynomial's. Raises ArgumentError."""
    steps = grid.first + grid.steps
    measured: Sequence[Sequence[float]] = table.metadata["configurations"]
    scales = sorted({scale for _, scale in measured})
    if guidance is None:
        if len(scales) > 1:
            raise ArgumentError(f"{NAME}: the table was measured at guidance {scales}; say which is wanted: guidance=")
        guidance = scales[0]
    for number, (count, scale) in enumerate(measured):
        times = table.arrays[f"timesteps.{number}"]
        if count == steps and scale == guidance and same_times(times[grid.first :], grid.timesteps):
            return [float(ratio) for ratio in table.arrays[f"ratios.{number}"][grid.first :]]
    shares = [(grid.first + row + 1) / steps for row in range(grid.steps)]
    low, high = table.metadata["range"]
    made = [regressed(table.arrays["polynomial"], share, guidance, steps) for share in shares]
    return [1.0 if grid.first + row < 2 else min(max(ratio, low), high) for row, ratio in enumerate(made)]


def regressed(polynomial: NDArray[Any], share: float, guidance: float, steps: int) -> float:
    """sum_pqr c_pqr share^p (guidance/12)^q (steps/50)^r; share: (row + 1)/steps. polynomial: c, [P, Q, R]."""
    return float(np.einsum("pqr,pqr->", polynomial, _monomials(share, guidance, steps, polynomial.shape)))


def _monomials(share: float, guidance: float, steps: int, shape: Sequence[int]) -> NDArray[np.float64]:
    scaled = (share, guidance / GUIDANCE_UNIT, steps / STEPS_UNIT)
    p, q, r = (value ** np.arange(size, dtype=np.float64) for value, size in zip(scaled, shape, strict=True))
    return p[:, None, None] * q[None, :, None] * r[None, None, :]


def regression(configurations: Sequence[tuple[int, float]], ratios: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The polynomial of `regressed` through measured ratios, by least squares of smallest norm: float64 [P, Q, R].

    configurations: (steps, guidance) of every list of ratios. Degrees are those of the paper, or as far as the numbers
    of different steps and scales go. The first two rows, which have no ratio, are left out.
    """
    scales, counts = {scale for _, scale in configurations}, {count for count, _ in configurations}
    longest = max(counts) - 2
    shape = tuple(
        max(1, min(degree + 1, known))
        for degree, known in zip(DEGREES, (longest, len(scales), len(counts)), strict=True)
    )
    rows, wanted = [], []
    for (steps, guidance), values in zip(configurations, ratios, strict=True):
        for row in range(2, steps):
            rows.append(_monomials((row + 1) / steps, guidance, steps, shape).ravel())
            wanted.append(values[row])
    if not rows:
        return np.ones((1, 1, 1))
    solved = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return np.asarray(solved, dtype=np.float64).reshape(shape)
