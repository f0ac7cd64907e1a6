"""Momentum on any plan: against transcriptions on three solvers, where it changes nothing, what it refuses."""

import math

import numpy as np
import pytest
import torch

from vivace.bench import oracle
from vivace.engine.interchange.replay import replay
from vivace.engine.lower import Given, lower_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import (
    apply_afs,
    apply_dualfast,
    apply_guidance,
    apply_mask,
    apply_momentum,
    apply_restart,
    apply_tokens,
)
from vivace.engine.passes.momentum import averaged
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.02, 20.0)
FLOW = NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(16, 2)))
ADAMS = {1: (1.0,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
KINDS = ("heavy_ball", "nesterov")


def levels_of(plan, schedule):
    return [(step.alpha, step.sigma) for step in plan.steps if step.x == "x"] + [(1.0, 0.0)]


def start_of(plan, schedule):
    return NOISE * (plan.steps[0].sigma if schedule is EDM else 1.0)


def moved(v, e, beta, kind):
    """(new average, what x moves by)."""
    v = e if v is None else (1 - beta) * v + beta * e
    return v, v if kind == "heavy_ball" else (1 - beta) * v + beta * e


def adams(levels, x, beta, kind, order):
    """Adams-Bashforth of equal steps (PLMS) with momentum, in y = x / alpha; the last row the solver's own."""
    seen, v = [], None
    for i, ((alpha, sigma), (alpha_end, sigma_end)) in enumerate(zip(levels, levels[1:], strict=False)):
        seen.insert(0, (x - alpha * SEVEN.x0(x, alpha, sigma)) / sigma)
        count = min(order, len(seen)) if sigma_end else 1
        e = sum(w * m for w, m in zip(ADAMS[count], seen, strict=False))
        if i + 2 < len(levels):
            v, e = moved(v, e, beta, kind)
        x = alpha_end * (x / alpha + (sigma_end / alpha_end - sigma / alpha) * e)
    return x


def two_m(levels, x, beta, kind):
    """DPM-Solver++ 2M with momentum on D, its prediction of x0; Nesterov's on the eps of its step."""
    before, v = None, None
    for i, ((alpha, sigma), (alpha_end, sigma_end)) in enumerate(zip(levels, levels[1:], strict=False)):
        m = SEVEN.x0(x, alpha, sigma)
        d = m
        if before is not None and sigma_end:
            h = math.log(alpha_end / sigma_end) - math.log(alpha / sigma)
            last = math.log(alpha / sigma) - math.log(levels[i - 1][0] / levels[i - 1][1])
            d = m + (m - before) * h / last / 2
        before = m
        if i + 2 < len(levels) and kind == "nesterov":
            stepped = sigma_end / sigma * x + (alpha_end - sigma_end * alpha / sigma) * d
            rise = sigma_end / alpha_end - sigma / alpha
            v, e = moved(v, (stepped / alpha_end - x / alpha) / rise, beta, kind)
            x = alpha_end * (x / alpha + rise * e)
            continue
        if i + 2 < len(levels):
            v, d = moved(v, d, beta, kind)
        x = sigma_end / sigma * x + (alpha_end - sigma_end * alpha / sigma) * d
    return x


def heun(levels, x, beta, kind):
    """Heun's method in rho with momentum on the mean of its two slopes."""
    v = None
    for i, ((alpha, sigma), (alpha_end, sigma_end)) in enumerate(zip(levels, levels[1:], strict=False)):
        rise = sigma_end / alpha_end - sigma / alpha
        slope = (x - alpha * SEVEN.x0(x, alpha, sigma)) / sigma
        if sigma_end:
            inner = alpha_end * (x / alpha + rise * slope)
            slope = (slope + (inner - alpha_end * SEVEN.x0(inner, alpha_end, sigma_end)) / sigma_end) / 2
        if i + 2 < len(levels):
            v, slope = moved(v, slope, beta, kind)
        x = alpha_end * (x / alpha + rise * slope)
    return x


CASES = [
    *(("ipndm", {"order": order}, lambda *a, o=order: adams(*a, o)) for order in (1, 2, 4)),
    ("ddim", {}, lambda *a: adams(*a, 1)),
    ("dpmpp_2m", {"lower_order_final": False}, two_m),
    ("heun", {}, heun),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.9, 0.6])
@pytest.mark.parametrize(("solver", "options", "loop"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_it_is_the_loop_of_the_paper(solver, options, loop, beta, kind):
    for schedule, prediction in ((VP, "v"), (EDM, "x0")):
        plan = apply_momentum(make_plan(schedule, solver, 9, prediction=prediction, **options), beta, kind=kind)
        got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE)
        want = loop(levels_of(plan, schedule), start_of(plan, schedule), beta, kind)
        assert float((got - want).abs().max()) < 1e-10


@pytest.mark.parametrize("solver", "ddim dpmpp_2m dpmpp_3m unipc deis heun dpmpp_2s ghvb pndm".split())
def test_no_momentum_is_the_solver(solver):
    plan = make_plan(VP, solver, 8, prediction="v")
    assert apply_momentum(plan, 1.0) is plan
    through = Plan(averaged(plan.steps, 1.0, "heavy_ball"), plan.prediction, plan.init)
    results = [sample(oracle.denoiser_for(SEVEN, p), p, NOISE) for p in (plan, through)]
    assert float((results[0] - results[1]).abs().max()) < 1e-11


def test_it_falls_to_the_first_order():
    errors = []
    for steps in (80, 160):
        grid = oracle.even_grid(oracle.EDM, steps)
        plan = apply_momentum(oracle.plan_on(grid, "dpmpp_2m", "eps"), 0.8)
        data = oracle.Gaussian.narrow(16)
        noise = torch.as_tensor(np.random.default_rng(3).normal(size=(1, 16)))
        got = sample(oracle.denoiser_for(data, plan), plan, noise)
        start = math.hypot(*grid.level(0)) * noise
        errors.append(float((got - data.solve(start, grid.level(0), grid.level(steps))).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_a_point_mass_is_still_reached_exactly(schedule):
    point = oracle.Gaussian(torch.full((2,), 0.7).double(), torch.zeros(2).double())
    for solver in ("ddim", "unipc", "heun", "ghvb", "gradient_estimation"):
        plan = apply_momentum(make_plan(schedule, solver, 6, prediction="v"), 0.7)
        got = sample(oracle.denoiser_for(point, plan), plan, NOISE)
        np.testing.assert_allclose(got, 0.7, atol=1e-10)


def test_one_slot_more_and_one_launch_a_row():
    plan = make_plan(VP, "unipc", 8, prediction="v", order=3)
    made = apply_momentum(plan, 0.9)
    lowered = lower_plan(made, Given({}))
    assert all(len(lowered.launches(span)) == 1 for span in lowered.spans)
    assert {op.dst for op in made.ops()} - {op.dst for op in plan.ops()} == {"w", "w_base"}


def test_guidance_before_or_behind_gives_the_same_rows():
    plan = make_plan(VP, "dpmpp_2m", 8, prediction="v")
    one, two = apply_momentum(apply_guidance(plan, 4.0)), apply_guidance(apply_momentum(plan), 4.0)
    assert one.steps == two.steps


def test_plans_survive_files_tails_and_other_step_counts(tmp_path):
    plan = apply_momentum(apply_guidance(make_plan(VP, "dpmpp_2m", 10, prediction="v"), 4.0), 0.8, kind="nesterov")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert replay(make_plan(VP, "dpmpp_2m", 10, prediction="v"), plan.recipe.passes).steps == plan.steps
    tail = plan.tail(0.5)
    assert tail.nfe == 5 and plan.again(steps=6).nfe == 6
    first = next(op for op in tail.steps[0].ops if op.dst == "w")
    assert "w" not in dict(first.terms), "the average begins anew"


def test_the_average_begins_anew_behind_fresh_noise_and_runs_through_the_analytical_step():
    plan = apply_momentum(apply_restart(make_plan(VP, "ddim", 8, prediction="v"), [(3, 1, 0.3, 1.0)]), 0.9)
    jump = next(i for i, step in enumerate(plan.steps) if step.variant is None)
    for i in (0, jump + 1):
        assert "w" not in dict(next(op for op in plan.steps[i].ops if op.dst == "w").terms)
    got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE, seed=1)
    assert bool(torch.isfinite(got).all())
    free = apply_momentum(apply_afs(make_plan(VP, "ddim", 8, prediction="v")), 0.9)
    assert any(op.dst == "w" for op in free.steps[0].ops)


def test_it_goes_with_dualfast():
    plan = apply_momentum(apply_dualfast(make_plan(VP, "dpmpp_2m", 8, prediction="v"), 0.1), 0.9)
    assert bool(torch.isfinite(sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE)).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "apply_momentum: beta must be above 0"),
        ({"beta": 1.2}, r"apply_momentum: beta must be a number in \[0, 1\]"),
        ({"kind": "adam"}, "apply_momentum: kind: unknown 'adam'; known: heavy_ball, nesterov"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        apply_momentum(make_plan(VP, "ddim", 5), **arguments)


def test_what_it_does_not_fit_is_refused():
    plan = make_plan(VP, "dpmpp_2m", 12, prediction="v")
    with pytest.raises(PlanError, match="step 0 adds fresh noise"):
        apply_momentum(make_plan(VP, "ddpm", 5))
    with pytest.raises(PlanError, match="has slot 'w' already"):
        apply_momentum(apply_momentum(plan))
    with pytest.raises(PlanError, match="step 0 writes x more than once.*apply_mask comes after"):
        apply_momentum(apply_mask(plan))
    with pytest.raises(PlanError, match="computes some tokens; apply_tokens comes after"):
        apply_momentum(apply_tokens(make_plan(VP, "ddim", 12, prediction="v"), 0.5))
    with pytest.raises(PlanError, match="reads slot 'w' of an earlier row, which tokens left out would lack"):
        apply_tokens(apply_momentum(plan), 0.5)
    assert apply_mask(apply_momentum(plan)).nfe == 12
