"""USF: a schedule of decisions, one a row: timestep, order, form, variable, corrector, relaxation; a free first row.

Every decision ends in coefficients. With u the variable (lam, rho or t) and W_p the weights of the Lagrange rule of p
values (`quadrature.lagrange_weights`), the row of order p is
  x' = a x + sum_j w_j m_{i-j},   w = W_1 + sum_{k=1}^{p-1} r_k (W_{k+1} - W_k),
where W_{k+1} - W_k holds the k-th divided difference of Newton's form and r_k is its relaxation, 1 when neutral. The
published choices are values of r: 1 + c h on the first derivative; the presets of DPM-Solver-2, bh1 and bh2;
derivatives estimated by differences of lower order. A corrected step is redone with the value evaluated at its end, by
the rule of one more value; the change is linear in the history and merged into the next row, as in UniPC.
Source: Liu et al. 2023 (Unified Sampling Framework, S3), section 3.2 and table 1; AFS: Dockhorn et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vivace.engine.plan import PREDICTIONS, Step, Variant
from vivace.engine.solvers.quadrature import VARIABLES, lagrange_weights, time_of_lam
from vivace.engine.solvers.rows import (
    CONVERSIONS,
    Level,
    Update,
    affine,
    first_update,
    require_flag,
    require_number,
    require_order,
    usable_order,
)
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

HIGHEST = 4  # order of a row
FORMS = ("x0", "eps")

Terms = list[tuple[str, float]]
Weights = dict[tuple[str, int], float]  # by form and row of the value


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided of a row; relaxation: r_1, r_2, ..., missing ones are 1."""

    order: int
    form: str
    variable: str
    corrected: bool
    relaxation: tuple[float, ...]


def usf(
    grid: Grid,
    prediction: str,
    *,
    orders: Sequence[int] | int = 3,
    forms: Sequence[str] | str = "x0",
    variables: Sequence[str] | str = "lam",
    corrected: Sequence[bool] | bool = False,
    relaxation: Sequence[Sequence[float]] | None = None,
    fed: Sequence[float] | None = None,
    afs: float | None = None,
) -> tuple[Step, ...]:
    """Rows of a schedule of decisions; what is given once holds for every row.

    Args:
        orders: values a row extrapolates, 1..4; lowered where history is missing, and to 1 in a step to sigma = 0
            unless its form is "eps" and its variable "rho".
        forms: what is extrapolated, "x0" or "eps"; where forms differ from row to row both are kept.
        variables: in which it is a polynomial, "lam", "rho" or "t".
        corrected: the step of the row is redone with the next row's value; never the last one.
        relaxation: of every row the factors r_1, r_2, ... of its divided differences; missing ones are 1.
        fed: timesteps the network is fed, one a row; None: the grid's.
        afs: the first row is not evaluated: x0 is taken to be this number everywhere (0: eps = x / sigma). The plan
            has one evaluation less than rows. None: it is evaluated.
    Neutral, it is `lagrange` of the same order, form and variable. Tails have no free row.
    Raises: ArgumentError.
    """
    choose("prediction", prediction, PREDICTIONS)
    made = decisions(grid.steps, orders, forms, variables, corrected, relaxation)
    times = grid.timesteps if fed is None else tuple(_each("fed", fed, grid.steps))
    for row, time in enumerate(times):
        require_number("usf", f"fed[{row}]", time)
    if afs is not None:
        require_number("usf", "afs", afs, -math.inf)
    free = afs if grid.first == 0 else None
    if free is not None and grid.steps < 2:
        raise ArgumentError("usf: a plan with a free first row needs two rows or more; give steps=2 or drop afs")
    updates, forms = _updates(grid, made), [decision.form for decision in made]
    return _assemble(grid, prediction, forms, updates, [float(time) for time in times], free)


def decisions(
    steps: int, orders: Any, forms: Any, variables: Any, corrected: Any, relaxation: Any = None
) -> tuple[Decision, ...]:
    """One decision a row, checked. Raises ArgumentError naming the option and the row."""
    columns = (
        [require_order("usf", order, HIGHEST) for order in _each("orders", orders, steps)],
        [choose("usf: forms", form, FORMS) for form in _each("forms", forms, steps)],
        [choose("usf: variables", variable, VARIABLES) for variable in _each("variables", variables, steps)],
        [require_flag("usf", "corrected", flag) for flag in _each("corrected", corrected, steps)],
        [_factors(row, values) for row, values in enumerate(_each("relaxation", relaxation or ((),) * steps, steps))],
    )
    return tuple(Decision(*row) for row in zip(*columns, strict=True))


def _each(name: str, given: Any, steps: int) -> list[Any]:
    """One value a row of an option that may be given once for all."""
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence):
        return [given] * steps
    if len(given) != steps:
        raise ArgumentError(f"usf: {name} holds {len(given)} values, the plan {steps} rows; give one a row")
    return list(given)


def _factors(row: int, values: Any) -> tuple[float, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence) or len(values) >= HIGHEST:
        raise ArgumentError(
            f"usf: relaxation[{row}] is {values!r:.60}; a list of at most {HIGHEST - 1} factors is needed, 1 is neutral"
        )
    return tuple(require_number("usf", f"relaxation[{row}]", value, -math.inf) for value in values)


def _updates(grid: Grid, made: Sequence[Decision]) -> list[tuple[Update, Weights]]:
    """The first-order step of every row and its weights, the last step's correction merged in."""
    timed = time_of_lam(grid) if any(decision.variable == "t" for decision in made) else (None, None)
    updates: list[tuple[Update, Weights]] = []
    delta: Weights = {}
    for row, decision in enumerate(made):
        rule = _Rule(grid, row, decision, timed if decision.variable == "t" else (None, None))
        first = first_update(decision.form, grid.level(row), grid.level(row + 1))
        weights = rule.predictor(first)
        merged = dict(weights)
        for value, weight in delta.items():
            merged[value] = merged.get(value, 0.0) + first.keep * weight
        updates.append((first, merged))
        delta = rule.correction(weights) if decision.corrected and row + 1 < grid.steps else {}
    return updates


@dataclass(frozen=True, slots=True)
class _Rule:
    """The rules that a row's decision names; timed: t of lam and its kinks, for "t"."""

    grid: Grid
    row: int
    decision: Decision
    timed: tuple[Any, Any]

    def order(self) -> int:
        """Order asked for, as far as history goes."""
        to_zero = (self.decision.form, self.decision.variable) == ("eps", "rho")
        return usable_order(self.grid, self.row, self.decision.order, to_zero=to_zero)

    def weights(self, ages: Sequence[int]) -> tuple[float, ...]:
        """Of values that many rows old, -1 for the one at the step's end."""
        levels = [self.grid.level(self.row - age) for age in ages]
        start, end = self.grid.level(self.row), self.grid.level(self.row + 1)
        return lagrange_weights(self.decision.form, self.decision.variable, levels, end, *self.timed, start=start)[1]

    def predictor(self, first: Update) -> Weights:
        """The rule of the row's order, its divided differences relaxed."""
        order = self.order()
        if order == 1:
            return {(self.decision.form, self.row): first.weights[0]}
        total = np.array(self.weights(range(order)))
        for k, factor in enumerate(self.decision.relaxation[: order - 1], 1):
            if factor != 1.0:
                low, high = (np.resize([*self.weights(range(p)), *[0.0] * order], order) for p in (k, k + 1))
                total += (factor - 1.0) * (high - low)
        return {(self.decision.form, self.row - age): float(weight) for age, weight in enumerate(total)}

    def correction(self, used: Weights) -> Weights:
        """What the rule with the value at the step's end adds; nothing where a level has no finite log-SNR."""
        ages = range(-1, self.order())
        if any(0.0 in self.grid.level(self.row - age) for age in ages):
            return {}
        form = self.decision.form
        delta = {(form, self.row - age): weight for age, weight in zip(ages, self.weights(ages), strict=True)}
        for value, weight in used.items():
            delta[value] = delta.get(value, 0.0) - weight
        return delta


def _assemble(
    grid: Grid,
    prediction: str,
    forms: Sequence[str],
    updates: Sequence[tuple[Update, Weights]],
    times: Sequence[float],
    free: float | None,
) -> tuple[Step, ...]:
    """One row per update; a row keeps its own form, and the other where a later row reads it."""
    read = {value for _, weights in updates for value in weights}
    ring = 1 + max(row - value for row, (_, weights) in enumerate(updates) for _, value in weights)
    letters = {"x0": "m", "eps": "e" if "x0" in forms else "m"}
    steps = []
    for row, (first, weights) in enumerate(updates):
        level, blank = grid.level(row), row == 0 and free is not None
        kept = [form for form in FORMS if form == forms[row] or (form, row) in read]
        names = {(form, value): f"{letters[form]}{value % ring}" for form, value in weights}
        terms = [(names[v], weight) for v, weight in weights.items() if not (free == 0.0 and v == ("x0", 0))]
        if blank:
            assert free is not None
            ops = [affine(f"{letters[form]}0", *_free(form, level, free)) for form in kept if form == "eps" or free]
        else:
            ops = [affine(f"{letters[form]}{row % ring}", *_kept(form, prediction, level)) for form in kept]
        if first.x0 != 0.0:  # eps form from pure noise
            start = _free("x0", level, free) if free is not None and blank else _kept("x0", prediction, level)
            terms += [(slot, first.x0 * coef) for slot, coef in start]
        ops.append(affine("x", ("x", first.keep), *terms))
        steps.append(Step(times[row], *level, tuple(ops), variant=None if blank else Variant()))
    return tuple(steps)


def _kept(form: str, prediction: str, level: Level) -> Terms:
    """The value of a form from the state and the network's output."""
    p, q = CONVERSIONS[form](prediction, *level)
    return [("x", p), ("out", q)]


def _free(form: str, level: Level, x0: float) -> Terms:
    """The same where x0 is taken to be a number."""
    if form == "x0":
        return [("one", x0)]
    return [("x", 1.0 / level[1]), ("one", -level[0] * x0 / level[1])]
