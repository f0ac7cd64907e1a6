"""BDIA: DDIM made symmetric in time by the state before, so that every step can be taken back exactly.

x[i+1] = DDIM(x[i]; i -> i+1) + gamma (x[i-1] - DDIM(x[i]; i -> i-1)),   both with the prediction at x[i]
The first step is DDIM's. A run hands back two neighbouring states, slots "x" and "before": what `passes.invert` solves
the same rule from, row by row, with the same evaluations.
Source: Zhang, Lewis and Kleijn 2023 (BDIA), written for any (alpha, sigma).
"""

from __future__ import annotations

from dataclasses import replace

from vivace.engine.plan import Affine, Op, Step
from vivace.engine.solvers.ddim import ddim_rows, ends_of
from vivace.engine.solvers.rows import Rows, affine, first_order, require_number
from vivace.engine.timesteps import Grid

BEFORE = "before"  # slot of the state before x
_NEXT = "ahead"  # scratch: the state after x, until x has become the one before


def bdia(grid: Grid, prediction: str, *, gamma: float = 1.0) -> Rows:
    """Rows of BDIA, one evaluation each; one more state than DDIM is kept.

    gamma: in [0, 1]; 0 is DDIM, to the bit, and keeps no second state. Taking a step back divides by gamma, so rounding
    grows as gamma^-n over n steps. Published: 1 for 40 steps, 0.5 for 10.
    """
    share = require_number("bdia", "gamma", gamma, 0.0, 1.0)
    steps = ddim_rows(grid, prediction, ends_of(grid))
    if share == 0.0 or len(steps) < 2:
        return Rows(steps, {})
    made = [replace(steps[0], ops=_keeping(steps[0]))]
    made += [replace(step, ops=_symmetric(grid, row, step, share)) for row, step in enumerate(steps) if row]
    return Rows(tuple(made), {}, ("x", BEFORE))


def _keeping(step: Step) -> tuple[Op, ...]:
    """DDIM's ops, the old state going to `before`."""
    *first, update = step.ops
    assert isinstance(update, Affine)
    return _rotated(tuple(first), Affine(_NEXT, update.terms))


def _symmetric(grid: Grid, row: int, step: Step, gamma: float) -> tuple[Op, ...]:
    """DDIM's ops with gamma times what separates the state before from DDIM's step back to it."""
    *first, update = step.ops
    assert isinstance(update, Affine)
    (kept,) = (slot for slot, _ in update.terms if slot != "x")
    keep, weight = first_order(grid.level(row), grid.level(row + 1))
    back, back_weight = first_order(grid.level(row), grid.level(row - 1))
    terms = ("x", keep - gamma * back), (kept, weight - gamma * back_weight), (BEFORE, gamma)
    return _rotated(tuple(first), affine(_NEXT, *terms))


def _rotated(first: tuple[Op, ...], update: Affine) -> tuple[Op, ...]:
    """`first`, the update into scratch, then x becomes the state before and the update becomes x."""
    return (*first, update, affine(BEFORE, ("x", 1.0)), affine("x", (_NEXT, 1.0)))
