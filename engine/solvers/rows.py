"""What all solvers share: the first-order step, effective orders, rows from coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vivace.engine.plan import PREDICTIONS, Affine, Coef, Op, Step, Transform
from vivace.engine.prediction import to_eps, to_flow, to_x0
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError

Level = tuple[float, float]
Arrays = Mapping[str, NDArray[np.floating[Any]]]
FORMS = ("x0", "eps", "flow", "out")
HISTORIES = ("own", "lower_order", "computed")
CONVERSIONS = {"x0": to_x0, "eps": to_eps, "flow": to_flow}


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows whose coefficients are in part tensors: the side-car's arrays by the keys that their `TensorRef`s name.

    results: slots that a run of the rows hands back.
    """

    steps: tuple[Step, ...]
    arrays: Arrays
    results: tuple[str, ...] = ("x",)


@dataclass(frozen=True, slots=True)
class Update:
    """x <- keep * x + sum_k weights[k] * m[i-k] + eps * eps(out) + x0 * x0(out) + noise * (fresh draw).

    m[i]: the value row i keeps, weights newest first. stage: the sum goes to slot `u`, which the next row evaluates,
    and x stays: the row is an inner stage of a step of several evaluations.
    """

    keep: float
    weights: tuple[float, ...]
    eps: float = 0.0
    noise: float = 0.0
    x0: float = 0.0
    stage: bool = False


def first_order(start: Level, end: Level) -> tuple[float, float]:
    """(a, b) of x' = a x + b x0, exact for a constant x0; finite at alpha = 0 and at sigma = 0.

    a = sigma'/sigma, b = alpha' - sigma' alpha / sigma (= alpha' (1 - e^-h)). Levels are (alpha, sigma).
    Source: Lu et al. 2022 (DPM-Solver++), eq. 9 with a constant prediction.
    """
    keep = end[1] / start[1]
    return keep, end[0] - keep * start[0]


def first_order_eps(start: Level, end: Level) -> tuple[float, float]:
    """(a, b) of x' = a x + b eps, exact for a constant eps: a = alpha'/alpha, b = sigma' - a sigma; needs alpha > 0.

    Source: Lu et al. 2022 (DPM-Solver), eq. 3.7.
    """
    keep = end[0] / start[0]
    return keep, end[1] - keep * start[1]


def first_update(form: str, start: Level, end: Level) -> Update:
    """The first-order step with history in `form` "x0" or "eps"; from alpha = 0 it is taken on x0 of the output."""
    if form == "x0":
        keep, weight = first_order(start, end)
        return Update(keep, (weight,))
    if start[0] == 0.0:
        keep, weight = first_order(start, end)
        return Update(keep, (0.0,), x0=weight)
    keep, weight = first_order_eps(start, end)
    return Update(keep, (weight,))


def levels_of(points: Sequence[tuple[float, Level]], grid: Grid) -> Grid:
    """A grid of (timestep, level) points, one per evaluation, that ends where `grid` does."""
    levels = [level for _, level in points] + [grid.level(grid.steps)]
    alphas, sigmas = zip(*levels, strict=True)
    return Grid(tuple(timestep for timestep, _ in points), alphas, sigmas, grid.schedule)


def falling_orders(steps: int, order: int, lower_order_final: bool) -> list[int]:
    """Order asked of every row: `order`, and no more than the rows left when `lower_order_final`."""
    return [min(order, steps - row) if lower_order_final else order for row in range(steps)]


def usable_order(grid: Grid, row: int, order: int, *, to_zero: bool = False) -> int:
    """Order a row can have: of distinct history at finite log-SNR; 1 for a step to sigma = 0 or of no length.

    to_zero: the rule is finite at sigma = 0, which then lowers nothing.
    """
    return len(usable_ages(grid, row, range(order), to_zero=to_zero))


def usable_ages(grid: Grid, row: int, ages: Sequence[int], *, to_zero: bool = False) -> tuple[int, ...]:
    """Of the rows that a row would read (ages, 0 first) those it can: distinct levels at finite log-SNR.

    to_zero: as in `usable_order`.
    """
    start, end = grid.level(row), grid.level(row + 1)
    if (end[1] == 0.0 and not to_zero) or start == end:
        return (0,)
    kept = [0]
    for age in ages[1:]:
        if age > row or grid.alphas[row - age] == 0.0 or grid.level(row - age) == grid.level(row - kept[-1]):
            break
        kept.append(age)
    return tuple(kept)


def planned_ages(
    solver: str, steps: int, orders: Sequence[int], history: str, cached: Sequence[int]
) -> list[tuple[int, ...]]:
    """Of every row the rows whose values it reads, as ages, its own (0) first.

    Args:
        orders: values asked of each row.
        history: "own": the rows before it, whatever they computed. "lower_order": a row that is cached reads its own
            value only, and rows after it read no row up to the last cached one. "computed": the rows before it that
            computed everything.
        cached: rows that did not compute everything.
    Raises: ArgumentError naming the solver.
    """
    choose(f"{solver}: history", history, HISTORIES)
    numbers = set(cached)
    if any(type(row) is not int or row < 0 for row in cached):
        raise ArgumentError(f"{solver}: cached must be row numbers, got {tuple(cached)!r:.60}")
    out: list[tuple[int, ...]] = []
    last = -1  # cached row so far
    for row in range(steps):
        last = row if row in numbers else last
        first = last + 1 if history == "lower_order" else 0
        read = (row - other for other in range(row - 1, first - 1, -1) if history != "computed" or other not in numbers)
        out.append((0, *islice(read, orders[row] - 1)))
    return out


def spread(ages: Sequence[int], weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of values of these ages as weights of all ages, with zeros for those not read."""
    out = [0.0] * (ages[-1] + 1)
    for age, weight in zip(ages, weights, strict=True):
        out[age] = weight
    return tuple(out)


def assemble(
    grid: Grid,
    prediction: str,
    updates: Sequence[Update],
    transform: Transform | None = None,
    *,
    form: str = "x0",
    slots: Sequence[int] | None = None,
    first_draw: int = 1,
) -> tuple[Step, ...]:
    """One row per update: m<k> <- the prediction in `form`, x (or a stage, u) <- the update.

    Args:
        grid: one level per evaluation, stages included.
        transform: on x0, before it is kept; with form "eps" the kept value is eps of x and the changed x0.
        form: what history holds: "x0", "eps", "flow" (eps - x0) or "out", the network's own output.
        slots: number k of every row's slot m<k>; default row mod ring, ring = the longest history any row reads.
        first_draw: number of the first draw of fresh noise.
    A row that evaluates at more noise than the row before is marked `restart`.
    """
    choose("prediction", prediction, PREDICTIONS)
    choose("form", form, FORMS)
    ring = max(len(update.weights) for update in updates)
    number = [row % ring for row in range(len(updates))] if slots is None else slots
    steps: list[Step] = []
    draw, read = first_draw, "x"
    for row, update in enumerate(updates):
        alpha, sigma = grid.level(row)
        names = [f"m{number[row - age]}" if weight else "" for age, weight in enumerate(update.weights)]
        ops = _kept(f"m{number[row]}", read, prediction, (alpha, sigma), transform, form)
        terms = [("x", update.keep), *zip(names, update.weights, strict=True)]
        for coef, convert in ((update.eps, to_eps), (update.x0, to_x0)):
            if coef != 0.0:
                p, q = convert(prediction, alpha, sigma)
                terms += [(read, coef * p), ("out", coef * q)]
        if update.noise != 0.0:
            terms.append((f"noise:{draw}", update.noise))
            draw += 1
        ops.append(affine("u" if update.stage else "x", *terms))
        before = grid.level(row - 1) if row else (0.0, 1.0)
        rises = math.atan2(sigma, alpha) > math.atan2(before[1], before[0]) + 1e-9
        steps.append(Step(grid.timesteps[row], alpha, sigma, tuple(ops), x=read, restart=rises))
        read = "u" if update.stage else "x"
    return tuple(steps)


def _kept(slot: str, read: str, prediction: str, level: Level, transform: Transform | None, form: str) -> list[Op]:
    """Ops that fill the history slot of a row from the state it evaluated and the network's output."""
    if form == "out":
        return [affine(slot, ("out", 1.0))]
    p, q = CONVERSIONS[form if transform is None else "x0"](prediction, *level)
    ops: list[Op] = [affine(slot, (read, p), ("out", q))]
    if transform is not None:
        ops.append(replace(transform, slot=slot))
        if form != "x0":
            p, q = CONVERSIONS[form]("x0", *level)
            ops.append(affine(slot, (read, p), (slot, q)))
    return ops


def affine(dst: str, *terms: tuple[str, float]) -> Affine:
    """An `Affine` of the sums of the coefficients of every slot, in order of first use; zeros are left out."""
    total: dict[str, float] = {}
    for slot, coef in terms:
        if coef != 0.0:
            total[slot] = total.get(slot, 0.0) + coef
    kept: list[tuple[str, Coef]] = [(slot, coef) for slot, coef in total.items() if coef != 0.0]
    return Affine(dst, tuple(kept))


def start_from_noise(scale: float) -> tuple[Affine, ...]:
    """First state: x <- scale * noise."""
    return (Affine("x", (("noise:0", scale),)),)


def start_from_latent(level: Level) -> tuple[Affine, ...]:
    """First state of an image-to-image run: x <- alpha * start + sigma * noise."""
    return (affine("x", ("input:start", level[0]), ("noise:0", level[1])),)


def require_order(solver: str, order: int, highest: int) -> int:
    """An integer order in 1..highest. Raises ArgumentError."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ArgumentError(f"{solver}: order must be an integer in 1..{highest}, got {order!r}")
    return order


def require_flag(solver: str, name: str, value: bool) -> bool:
    """A bool. Raises ArgumentError."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{solver}: {name} must be True or False, got {value!r}")
    return value


def require_number(solver: str, name: str, value: float, low: float = 0.0, high: float = math.inf) -> float:
    """A finite number in [low, high]. Raises ArgumentError."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        span = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f">= {low:g}"
        raise ArgumentError(f"{solver}: {name} must be a number {span}, got {value!r}")
    return float(value)
