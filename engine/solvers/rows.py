"""What all solvers share: the first-order step, effective orders, rows from coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vivace.engine.plan import PREDICTIONS, Affine, Coef, Op, Step, Transform
from vivace.engine.prediction import to_eps, to_x0
from vivace.engine.timesteps import Grid, choose
from vivace.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Update:
    """x <- keep * x + sum_k weights[k] * m[i-k] + eps * eps(out) + noise * (fresh draw); weights newest first."""

    keep: float
    weights: tuple[float, ...]
    eps: float = 0.0
    noise: float = 0.0


def first_order(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """(a, b) of x' = a x + b x0, exact for a constant x0; finite at alpha = 0 and at sigma = 0.

    a = sigma'/sigma, b = alpha' - sigma' alpha / sigma (= alpha' (1 - e^-h)). Levels are (alpha, sigma).
    Source: Lu et al. 2022 (DPM-Solver++), eq. 9 with a constant prediction.
    """
    keep = end[1] / start[1]
    return keep, end[0] - keep * start[0]


def falling_orders(steps: int, order: int, lower_order_final: bool) -> list[int]:
    """Order asked of every row: `order`, and no more than the rows left when `lower_order_final`."""
    return [min(order, steps - row) if lower_order_final else order for row in range(steps)]


def usable_order(grid: Grid, row: int, order: int) -> int:
    """Order a row can have: of history at finite log-SNR; 1 for a step to sigma = 0 or of no length."""
    order = min(order, row + 1)
    ends = grid.level(row), grid.level(row + 1)
    if ends[1][1] == 0.0 or ends[0] == ends[1]:
        return 1
    while order > 1 and grid.alphas[row - order + 1] == 0.0:
        order -= 1
    return order


def assemble(
    grid: Grid, prediction: str, updates: Sequence[Update], transform: Transform | None = None
) -> tuple[Step, ...]:
    """One row per update: m<k> <- x0(x, out), the transform on it if any, x <- update.

    m of row i lives in slot m<i mod ring>, ring = the longest history any row reads; nothing is copied.
    Draws of fresh noise count from `noise:1`.
    """
    choose("prediction", prediction, PREDICTIONS)
    ring = max(len(update.weights) for update in updates)
    steps, draws = [], 0
    for row, update in enumerate(updates):
        alpha, sigma = grid.level(row)
        slots = [f"m{(row - age) % ring}" for age in range(len(update.weights))]
        p, q = to_x0(prediction, alpha, sigma)
        ops: list[Op] = [affine(f"m{row % ring}", ("x", p), ("out", q))]
        if transform is not None:
            ops.append(replace(transform, slot=f"m{row % ring}"))
        keep, raw = update.keep, 0.0
        if update.eps != 0.0:
            ex, eo = to_eps(prediction, alpha, sigma)
            keep, raw = keep + update.eps * ex, update.eps * eo
        terms = [("x", keep), *zip(slots, update.weights, strict=True), ("out", raw)]
        if update.noise != 0.0:
            draws += 1
            terms.append((f"noise:{draws}", update.noise))
        ops.append(affine("x", *terms))
        steps.append(Step(grid.timesteps[row], alpha, sigma, tuple(ops)))
    return tuple(steps)


def affine(dst: str, *terms: tuple[str, float]) -> Affine:
    """An `Affine` of the terms whose coefficient is not 0."""
    kept: list[tuple[str, Coef]] = [(slot, coef) for slot, coef in terms if coef != 0.0]
    return Affine(dst, tuple(kept))


def start_from_noise(scale: float) -> tuple[Affine, ...]:
    """First state: x <- scale * noise."""
    return (Affine("x", (("noise:0", scale),)),)


def start_from_latent(level: tuple[float, float]) -> tuple[Affine, ...]:
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
