"""GHVB: Adams-Bashforth on a moving average of eps, with weights that undo the lag of the average.

  v_i = (1 - b) v_{i-1} + b eps_i, v_0 = eps_0       x' = (alpha'/alpha) x + alpha' (rho' - rho) sum_j w_j v_{i-j}
  order 1  w = 1
  order 2  w = (2 + b, -(2 - b)) / (2 b)
  order 3  w = (18 + 5 b, -(24 - 8 b), 6 - b) / (12 b)
  order 4  w = (46 + 9 b, -(78 - 19 b), 42 - 5 b, -(10 - b)) / (24 b)
  order 5  w = (1650 + 251 b, -(3420 - 646 b), 2880 - 264 b, -(1380 - 106 b), 270 - 19 b) / (720 b)
b is `momentum`: 1 is Adams-Bashforth (`ipndm`), less damps what changes from row to row and enlarges the region of
stability. The weights are those of steps equal in rho.
Source: Wizadwongsa and Suwajanakorn 2023 (arXiv 2307.11118), appendix.
"""

from __future__ import annotations

from dataclasses import replace

from vivace.engine.plan import Affine, Coef, Step
from vivace.engine.solvers.ddim import ends_of
from vivace.engine.solvers.rows import (
    Update,
    assemble,
    first_order_eps,
    first_update,
    require_number,
    require_order,
    usable_order,
)
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError

# Of every order: ((constant, factor of b) of each weight, newest first), divisor; the weight is their sum over both b.
WEIGHTS: dict[int, tuple[tuple[tuple[float, float], ...], float]] = {
    1: (((0.0, 1.0),), 1.0),
    2: (((2.0, 1.0), (-2.0, 1.0)), 2.0),
    3: (((18.0, 5.0), (-24.0, 8.0), (6.0, -1.0)), 12.0),
    4: (((46.0, 9.0), (-78.0, 19.0), (42.0, -5.0), (-10.0, 1.0)), 24.0),
    5: (((1650.0, 251.0), (-3420.0, 646.0), (2880.0, -264.0), (-1380.0, 106.0), (270.0, -19.0)), 720.0),
}


def ghvb(grid: Grid, prediction: str, *, order: int = 2, momentum: float = 0.8) -> tuple[Step, ...]:
    """Rows of GHVB (generalised heavy ball): orders 1, 2, .. up to `order`, one evaluation a row.

    Args:
        order: values combined, 1..5; published names: 1.8 is order 2 with momentum 0.8, 3.8 order 4.
        momentum: b in (0, 1]; 1: no damping, the rows of `ipndm`.
    A row to sigma = 0 is the first-order step on its own eps, undamped. The average begins anew behind alpha = 0.
    Memory: `order` slots of sample size, as the same order without momentum.
    Raises: ArgumentError.
    """
    require_order("ghvb", order, len(WEIGHTS))
    share = require_number("ghvb", "momentum", momentum, 0.0, 1.0)
    if share == 0.0:
        raise ArgumentError("ghvb: momentum must be above 0; 1 is no damping")
    updates = []
    for row, end in enumerate(ends_of(grid)):
        start = grid.level(row)
        if start[0] == 0.0:
            updates.append(first_update("eps", start, end))
            continue
        keep, weight = first_order_eps(start, end)
        if end[1] == 0.0 and share < 1.0:
            updates.append(Update(keep, (0.0,), eps=weight))
            continue
        weights = ghvb_weights(usable_order(grid, row, order), share)
        updates.append(Update(keep, tuple(weight * w for w in weights)))
    steps = assemble(grid, prediction, updates, form="eps")
    return steps if share == 1.0 else _averaged(steps, share)


def ghvb_weights(order: int, momentum: float) -> tuple[float, ...]:
    """w of the head of the file, newest first."""
    pairs, divisor = WEIGHTS[order]
    return tuple((constant / momentum + factor) / divisor for constant, factor in pairs)


def _averaged(steps: tuple[Step, ...], share: float) -> tuple[Step, ...]:
    """Rows whose history slots m<k> hold eps as rows whose slots v<k> hold its moving average."""
    out: list[Step] = []
    before = ""
    for step in steps:
        kept, update = step.ops
        assert isinstance(kept, Affine) and isinstance(update, Affine), "as `assemble` makes them"
        slot = f"v{kept.dst[1:]}"
        own: list[tuple[str, Coef]] = list(kept.terms)
        if before:
            own = [(before, 1.0 - share), *((name, share * c) for name, c in kept.terms if isinstance(c, float))]
        terms = tuple((f"v{name[1:]}" if name.startswith("m") else name, coef) for name, coef in update.terms)
        out.append(replace(step, ops=(Affine(slot, tuple(own)), Affine("x", terms))))
        before = slot if step.alpha else ""
    return tuple(out)
