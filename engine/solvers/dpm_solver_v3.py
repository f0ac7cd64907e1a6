"""DPM-Solver-v3: multistep in the parameterisation that a model's own statistics make flattest, one row a step.

D = x0 + ((l - 1)/alpha) x is kept, elementwise; with l, s, b measured of the model (see `model_statistics`)
  x' = A x + sum_k W_k D_k + bias,   A, W_k, bias [latent],
predictor of order p. The corrector redoes a step with the value D evaluated at its end; it changes x and not D, and its
change is linear in D, so as in UniPC it is merged into the next row. l = 1, s = b = 0 is
DPM-Solver++, l = 0, s = -1, b = 0 is DPM-Solver; tables that are the same for all elements give rows of numbers.
Source: Zheng et al. 2023 (DPM-Solver-v3), algorithms 1 to 4; the merged row: algebra only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.engine.plan import Affine, Coef, Step, TensorRef
from vivace.engine.prediction import to_x0
from vivace.engine.solvers.model_statistics import (
    Interval,
    Statistics,
    Weights,
    interpolation,
    plain_moments,
)
from vivace.engine.solvers.quadrature import lagrange_weights
from vivace.engine.solvers.rows import (
    Rows,
    falling_orders,
    first_order,
    require_flag,
    require_number,
    require_order,
    usable_ages,
)
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

CORRECTORS = ("all", "noisy", "clean", "none")


def dpm_solver_v3(
    grid: Grid,
    prediction: str,
    *,
    order: int = 3,
    corrector: str = "all",
    pseudo: bool = False,
    pseudo_corrector: bool = True,
    lower_order_final: bool = True,
    table: Any = None,
    l: float = 1.0,  # noqa: E741
    s: float = 0.0,
    b: float = 0.0,
) -> Rows:
    """Rows of DPM-Solver-v3.

    Args:
        order: p in 1..3; 3 without guidance, 2 under guidance (paper, section 4).
        corrector: which steps are corrected: "all"; those that end at more than half of the noise end's time
            ("noisy", the half-corrector of the authors' code) or at no more ("clean"); "none".
        pseudo: derivatives of the predictor by divided differences of the nearest values; pseudo_corrector: those of
            the corrector, which then uses p + 1 values, else p. Pseudo-order is no order: convergence is then of order
            2 from p = 1 on.
        lower_order_final: order <= rows left, at any number of steps.
        table: of `calibrate_dpm_solver_v3`; l, s, b: numbers in its place.
    A row from alpha = 0 or to sigma = 0 is of first order in x0, without statistics.
    """
    require_order("dpm_solver_v3", order, 3)
    choose("dpm_solver_v3: corrector", corrector, CORRECTORS)
    flags = {"pseudo": pseudo, "pseudo_corrector": pseudo_corrector, "lower_order_final": lower_order_final}
    for name, flag in flags.items():
        require_flag("dpm_solver_v3", name, flag)
    given = {"l": l, "s": s, "b": b}
    for name, value in given.items():
        require_number("dpm_solver_v3", name, value, low=-100.0, high=100.0)
    if table is not None and given != {"l": 1.0, "s": 0.0, "b": 0.0}:
        raise ArgumentError("dpm_solver_v3: l, s and b are in the table; give either a table or numbers")
    known = Statistics.of_numbers(l, s, b) if table is None else Statistics.of_table("dpm_solver_v3", table.arrays)
    orders = falling_orders(grid.steps, order, lower_order_final)
    read = [usable_ages(grid, row, range(asked)) for row, asked in enumerate(orders)]
    corrected = [_corrected(grid, row, corrector) for row in range(grid.steps)]
    updates = merged_updates(grid, known, read, corrected, pseudo, pseudo_corrector)
    return _Writer(grid, prediction, known).rows(updates)


def _corrected(grid: Grid, row: int, corrector: str) -> bool:
    """The step of a row is corrected by the row after it."""
    if row + 1 >= grid.steps or corrector == "none":
        return False
    if corrector == "all":
        return True
    schedule = grid.known_schedule()
    noisy = grid.timesteps[row + 1] / schedule.timestep_scale > 0.5 * schedule.noise_end
    return noisy == (corrector == "noisy")


def merged_updates(
    grid: Grid,
    statistics: Statistics,
    read: Sequence[Sequence[int]],
    corrected: Sequence[bool],
    pseudo: bool,
    pseudo_corrector: bool,
) -> list[Weights]:
    """The update of every row, the correction of the step before it included; weights of D newest first."""
    updates: list[Weights] = []
    change: list[Any] = []  # weights of D in the correction, newest first
    change_bias: Any = 0.0
    for row in range(grid.steps):
        ages = read[row]
        if bare(grid, row):
            keep, weight = first_order(grid.level(row), grid.level(row + 1))
            predicted, after = Weights(keep, [weight], 0.0), None
        else:
            interval = Interval(statistics, grid.lam(row), grid.lam(row + 1), len(ages) + 1)
            predicted = _update(grid, row, interval, ages, pseudo, ahead=False)
            used = ages if pseudo_corrector else ages[:-1]
            after = None
            if corrected[row] and used:
                after = _update(grid, row, interval, used, pseudo_corrector, ahead=True)
        of = list(predicted.of) + [0.0] * (len(change) - len(predicted.of))
        for age, weight in enumerate(change):
            of[age] = of[age] + predicted.keep * weight
        updates.append(Weights(predicted.keep, of, predicted.bias + predicted.keep * change_bias))
        change, change_bias = [], 0.0
        if after is not None:
            start, new, *older = after.of
            before = [start, *older] + [0.0] * (len(predicted.of) - len(older) - 1)
            change = [new, *(a - b for a, b in zip(before, predicted.of, strict=True))]
            change_bias = after.bias - predicted.bias
    return updates


def bare(grid: Grid, row: int) -> bool:
    """A step whose log-SNR is infinite at an end, or that has no length: first order in x0."""
    return grid.alphas[row] == 0.0 or grid.sigmas[row + 1] == 0.0 or grid.level(row) == grid.level(row + 1)


def _update(grid: Grid, row: int, interval: Interval, ages: Sequence[int], pseudo: bool, *, ahead: bool) -> Weights:
    """The step of a row from the values at `ages`; ahead: and at its end, second in order."""
    places = [row - age for age in ages]
    if ahead:
        places.insert(1, row + 1)
    end, lams = grid.level(row + 1), [grid.lam(place) for place in places]
    rule = interpolation(lams, pseudo)
    keep, base = lagrange_weights("x0", "lam", [grid.level(place) for place in places], end)
    if pseudo and len(lams) > 2:
        moments = plain_moments(end[0], lams[1] - lams[0] if ahead else interval.end - interval.start, len(lams))
        older = [float(rule[:, k] @ moments) for k in range(1, len(lams))]
        base = (sum(base) - sum(older), *older)
    return interval.weights(end[0], keep, base, lams, rule)


class _Writer:
    """Rows from updates: coefficients that are the same for all elements are numbers, the others tensors."""

    def __init__(self, grid: Grid, prediction: str, statistics: Statistics) -> None:
        self.grid, self.prediction, self.statistics = grid, prediction, statistics
        self.arrays: dict[str, NDArray[np.floating[Any]]] = {}

    def rows(self, updates: Sequence[Weights]) -> Rows:
        ring = max(len(update.of) for update in updates)
        steps = [self._row(row, update, ring) for row, update in enumerate(updates)]
        return Rows(tuple(steps), self.arrays)

    def _row(self, row: int, update: Weights, ring: int) -> Step:
        alpha, sigma = self.grid.level(row)
        p, q = to_x0(self.prediction, alpha, sigma)
        own: Any = p
        if not bare(self.grid, row):
            own = p + self.statistics.value("lean", self.grid.lam(row)) / alpha
        kept = f"m{row % ring}"
        coef = self._coef(f"{row}.kept", own)
        newest, *older = update.of
        if isinstance(coef, float) and not np.ndim(self._plain(newest)):
            terms = [("x", update.keep), (kept, newest)]
        else:  # products of tensors are taken here, so that the row stays one pass
            terms = [("x", update.keep + newest * own), ("out", newest * q)]
        terms += [(f"m{(row - age) % ring}", weight) for age, weight in enumerate(older, 1)]
        terms.append(("one", update.bias))
        named = [(slot, self._coef(f"{row}.{slot}", value)) for slot, value in terms]
        ops = (_affine(kept, [("x", coef), ("out", q)]), _affine("x", named))
        return Step(self.grid.timesteps[row], alpha, sigma, ops)

    def _coef(self, key: str, value: Any) -> Coef:
        plain = self._plain(value)
        if not np.ndim(plain):
            return float(plain)
        key = f"dpm_solver_v3.{key}"
        self.arrays[key] = np.ascontiguousarray(plain, dtype=self.statistics.dtype)
        return TensorRef(key)

    @staticmethod
    def _plain(value: Any) -> Any:
        """A number where all elements are the same."""
        array = np.asarray(value)
        return float(array.flat[0]) if (array == array.flat[0]).all() else array


def _affine(dst: str, terms: Sequence[tuple[str, Coef]]) -> Affine:
    """An Affine without terms of coefficient 0."""
    return Affine(dst, tuple((slot, coef) for slot, coef in terms if coef != 0.0))
