"""The DPM-Solver, DEIS, UniPC and EDM schedulers of `diffusers`: request -> grid, prediction and rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from vivace.engine import diffusers_grids as grids
from vivace.engine import diffusers_rows as own
from vivace.engine.diffusers_config import Made, Request, Rows, order_of, prediction_of, transform_of
from vivace.engine.plan import Step
from vivace.engine.solvers.ddim import ddim_rows, ends_of
from vivace.engine.solvers.dpmpp import dpmpp_rows
from vivace.engine.solvers.quadrature import lagrange_rows
from vivace.engine.solvers.rows import assemble, falling_orders, usable_order
from vivace.engine.solvers.unipc import uncorrected, unipc_rows
from vivace.engine.timesteps import Grid, choose

FEW_STEPS = 15  # `lower_order_final` of the DPM-Solver and DEIS classes acts below this number of steps
OTHERS = ("logrho", "midpoint", "heun", "bh1", "bh2")  # solver types that a class replaces by its own default


def _refed(request: Request, form: str) -> tuple[str, str, own.Read | None]:
    """(prediction of the plan, of its rows, how the rows read the output).

    With use_flow_sigmas the classes convert v without its norm alpha^2 + sigma^2, so the rows read it so.
    """
    prediction = prediction_of(request)
    if prediction == "flow" and form == "eps":
        raise request.refuse("prediction_type", "the class has no noise form of it")
    if prediction != "v" or not request["use_flow_sigmas"]:
        return prediction, prediction, None
    if form == "eps":
        return prediction, "eps", lambda step: (step.sigma, step.alpha)
    return prediction, "x0", lambda step: (step.alpha, -step.sigma)


def _variant(request: Request, known: tuple[str, ...]) -> str:
    """The solver type; those of other classes mean the first of `known`."""
    kind = request["solver_type"]
    if kind in OTHERS and kind not in known:
        return known[0]
    return choose(f"{request.name}: solver_type", kind, known)


def _orders(request: Request, grid: Grid, order: int, zero: bool) -> list[int]:
    """Orders of the multistep classes: the last two rows lowered by their own rules."""
    orders = [order] * grid.steps
    few = request["lower_order_final"] and grid.steps < FEW_STEPS
    if few and grid.steps > 1:
        orders[-2] = min(order, 2)
    if few or zero or request.config.get("euler_at_final"):
        orders[-1] = 1
    return orders


def _multistep(
    request: Request, grid: Grid, prediction: str, read: Callable[[tuple[Step, ...]], tuple[Step, ...]]
) -> Rows:
    """Rows of DPM-Solver multistep on any grid, read from the network by `read`."""
    kind, variant = request["algorithm_type"], _variant(request, ("midpoint", "heun"))
    order, eta = order_of(request, 3), 1.0 if kind.startswith("sde-") else 0.0
    form = "eps" if kind in ("dpmsolver", "sde-dpmsolver") else "x0"
    orders = _orders(request, grid, order, request["final_sigmas_type"] == "zero")
    third = any(min(asked, row + 1) == 3 for row, asked in enumerate(orders))
    if third and (kind == "sde-dpmsolver" or eta and request.name.startswith("EDM")):
        raise request.refuse("solver_order", f"algorithm_type={kind!r} of the class has orders 1 and 2 only")
    transform, grid = transform_of(request), _unraised(grid) if eta else grid

    def rows(first: int) -> tuple[Step, ...]:
        part, asked = grid.tail(first), orders[first:]
        ages = request.ages(asked, first)
        made = dpmpp_rows(part, prediction, asked, variant, transform, form=form, eta=eta, ages=ages)
        if eta and order == 3:
            if request.history != "own":
                raise request.refuse("solver_order", "the third order of the SDE keeps every row in its history")
            made = own.turn_third_sde_order(made, part, [usable_order(part, k, p) for k, p in enumerate(asked)])
        return read(made)

    return rows


def _unraised(grid: Grid) -> Grid:
    """The grid with a last level that rounding put above the one before it at that one: no noise is taken away."""
    (alpha, sigma), (alpha_end, sigma_end) = grid.level(grid.steps - 1), grid.level(grid.steps)
    if sigma_end * alpha <= sigma * alpha_end:
        return grid
    return Grid(grid.timesteps, (*grid.alphas[:-1], alpha), (*grid.sigmas[:-1], sigma), grid.schedule)


def _noise_form(request: Request) -> bool:
    """Whether the algorithm keeps eps; it has no step to sigma = 0."""
    if request["algorithm_type"] not in ("dpmsolver", "sde-dpmsolver"):
        return False
    if request["final_sigmas_type"] == "zero":
        raise request.refuse("final_sigmas_type", f"algorithm_type={request['algorithm_type']!r} needs 'sigma_min'")
    return True


def dpm_multistep(request: Request) -> Made:
    """DPM-Solver and DPM-Solver++ multistep, ODE and SDE."""
    prediction, inner, read = _refed(request, "eps" if _noise_form(request) else "x0")
    sigmas, fed, last = grids.dpm_sigmas(request)
    grid = grids.sigma_grid(request, sigmas, last, fed)
    return Made(grid, prediction, _multistep(request, grid, inner, lambda steps: own.refeed(steps, read)))


def dpm_singlestep(request: Request) -> Made:
    """Blocks of orders 1, 2, .. p; the class turns lower_order_final on where it needs it."""
    form = "eps" if _noise_form(request) else "x0"
    prediction, inner, read = _refed(request, form)
    variant, order = _variant(request, ("midpoint", "heun")), order_of(request, 3)
    if form == "eps" and request["thresholding"]:
        raise request.refuse("thresholding", "algorithm_type='dpmsolver' of the class cannot run it")
    sigmas, fed, last = grids.dpm_sigmas(request)
    grid = grids.sigma_grid(request, sigmas, last, fed)
    steps, zero = grid.steps, request["final_sigmas_type"] == "zero"
    lower = request["lower_order_final"] or steps % order != 0 or zero
    orders = _blocks(steps, order, lower)
    if zero:
        orders[-1] = 1
    transform, eta = transform_of(request), 1.0 if request["algorithm_type"].startswith("sde-") else 0.0
    grid = _unraised(grid) if eta else grid

    def rows(first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        asked = [min(p, row + 1) for row, p in enumerate(orders[first:])]
        updates = own.singlestep_updates(part, asked, form, variant, eta)
        return own.refeed(assemble(part, inner, updates, transform, form=form), read)

    return Made(grid, prediction, rows)


def _blocks(steps: int, order: int, lower: bool) -> list[int]:
    """1, 2, .. p repeated; `lower`: the last block shorter, so that the last row is of order 1 where it can be."""
    block = list(range(1, order + 1))
    if not lower or order == 1:
        return block * (steps // order)
    whole, rest = divmod(steps, order)
    if rest == 0:
        return block * (whole - 1) + (block[:-1] + [1])[:order]
    return block * whole + block[:rest]


def deis(request: Request) -> Made:
    """DEIS: eps extrapolated in log rho, from x0 of the output."""
    _variant(request, ("logrho",))
    prediction, inner, read = _refed(request, "x0")
    sigmas, fed, last = grids.dpm_sigmas(request)
    grid = grids.sigma_grid(request, sigmas, last, fed)
    orders, transform = _orders(request, grid, order_of(request, 3), False), transform_of(request)

    def rows(first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        asked = orders[first:]
        ages = request.ages(asked, first)
        made = lagrange_rows(part, inner, asked, form="eps", variable="lam", transform=transform, ages=ages)
        return own.refeed(made, read)

    return Made(grid, prediction, rows)


def unipc(request: Request) -> Made:
    """UniPC. A row that ends at sigma = 0 is of order 1 even without `lower_order_final`."""
    order, variant = order_of(request, 3), _variant(request, ("bh2", "bh1"))
    form = "x0" if request["predict_x0"] else "eps"
    prediction, inner, read = _refed(request, form)
    sigmas, fed, last = grids.unipc_sigmas(request)
    grid = grids.sigma_grid(request, sigmas, last if request["final_sigmas_type"] == "sigma_min" else 0.0, fed)
    orders = falling_orders(grid.steps, order, bool(request["lower_order_final"]))
    without = {*request["disable_corrector"], *uncorrected(request.history, request.cached)}
    corrected = [row not in without for row in range(grid.steps)]
    transform = transform_of(request) if form == "x0" else None

    def rows(first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        asked = orders[first:]
        ages = request.ages(asked, first)
        made = unipc_rows(part, inner, asked, variant, corrected[first:], transform, form=form, ages=ages)
        return own.refeed(made, read)

    return Made(grid, prediction, rows)


def edm(request: Request) -> Made:
    """EDM classes. The network's output F is v of data in units of sigma_data, minus v for prediction_type "epsilon".

    With x0 = sigma_data y, c_in x = a y + b eps, a^2 + b^2 = 1, and F = -+(a eps - b y): so the plan says "v".
    """
    sigmas, fed = grids.edm_sigmas(request)
    grid = grids.make_levels(fed, np.ones(len(sigmas)), sigmas)
    sign = 1.0 if request["prediction_type"] == "epsilon" else -1.0

    def read(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return own.preconditioned(steps, float(request["sigma_data"]), sign)

    def euler(first: int) -> tuple[Step, ...]:
        part = grid.tail(first)
        return read(ddim_rows(part, "x0", ends_of(part)))

    rows = euler if request.name == "EDMEulerScheduler" else _multistep(request, grid, "x0", read)
    return Made(grid, "v", rows, math.hypot(float(request["sigma_max"]), 1.0))
