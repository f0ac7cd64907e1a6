"""Every solver against a direct transcription of its algorithm, with a denoiser that is not linear, to 1e-13."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.interpreter import run_plan
from tests.engine.solver_grids import EDM, LAMS, VP, edm_grid, flow_grid, plan_on, vp_grid
from vivace.engine.planning import make_plan
from vivace.engine.solvers.dpmpp import dpmpp_rows
from vivace.engine.solvers.singlestep import singlestep_rows
from vivace.engine.timesteps import make_grid

NOISE = np.random.default_rng(3).normal(size=(4, 8))
DRAWS = np.random.default_rng(4).normal(size=(40, 4, 8))


def model(x, t):
    """Any smooth function of the state and the time."""
    return np.tanh(0.7 * x) + 0.2 * np.cos(np.log1p(t))


def run(plan):
    return run_plan(plan, lambda x, t, i: model(x, t), NOISE, draw=lambda k: DRAWS[k - 1])


def agree(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


def levels(grid):
    """alpha, sigma, lam of every level, timesteps of every row."""
    alpha, sigma = np.array(grid.alphas), np.array(grid.sigmas)
    return alpha, sigma, np.log(alpha / sigma), grid.timesteps


# ---------------------------------------------------------------- one evaluation a step
def test_euler_and_ddim_are_a_step_of_y_in_rho():
    for grid in (vp_grid(), edm_grid(), flow_grid()):
        alpha, sigma, _, t = levels(grid)
        rho, x = sigma / alpha, NOISE
        for i in range(grid.steps):
            x = alpha[i + 1] * (x / alpha[i] + (rho[i + 1] - rho[i]) * model(x, t[i]))
        agree(run(plan_on(grid, "euler", "eps")), x)
        agree(run(plan_on(grid, "ddim", "eps")), x)


def test_ancestral_euler():
    grid, eta, scale = edm_grid(), 0.8, 1.1
    sigma, x = np.array(grid.sigmas), NOISE
    for i in range(grid.steps):
        up = min(sigma[i + 1], eta * math.sqrt(sigma[i + 1] ** 2 * (sigma[i] ** 2 - sigma[i + 1] ** 2) / sigma[i] ** 2))
        down = math.sqrt(sigma[i + 1] ** 2 - up**2)
        slope = (x - model(x, sigma[i])) / sigma[i]
        x = x + (down - sigma[i]) * slope + scale * up * DRAWS[i]
    agree(run(plan_on(grid, "euler_ancestral", "x0", eta=eta, s_noise=scale)), x)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_posterior(variance):
    plan = make_plan(VP, "ddpm", 1000, timesteps=range(999, -1, -1), variance=variance)
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x = NOISE
    for k, t in enumerate(range(999, 899, -1)):
        beta, before = 1 - bars[t] / bars[t - 1], bars[t - 1]
        x0 = (x - math.sqrt(1 - bars[t]) * model(x, t)) / math.sqrt(bars[t])
        mean = math.sqrt(before) * beta / (1 - bars[t]) * x0
        mean = mean + math.sqrt(bars[t] / before) * (1 - before) / (1 - bars[t]) * x
        spread = beta * (1 - before) / (1 - bars[t]) if variance == "fixed_small" else beta
        x = mean + math.sqrt(spread) * DRAWS[k % 40]
    seen = []

    def watch(state, t, i):
        seen.append(state)
        return model(state, t)

    run_plan(plan, watch, NOISE, draw=lambda k: DRAWS[(k - 1) % 40])
    assert plan.steps[0].timestep == 999.0 and len(plan.steps) == 1000
    agree(seen[100], x)


def dpm_multistep(grid, form, order, variant, third, eta=0.0):
    """DPM-Solver and ++ with differences, as in the papers' algorithms."""
    alpha, sigma, lam, t = levels(grid)
    x, past = NOISE, []
    for i in range(grid.steps):
        past = [model(x, t[i]), *past][:3]
        h = lam[i + 1] - lam[i]
        if form == "x0":
            keep, outer, g = sigma[i + 1] / sigma[i] * math.exp(-eta * h), -alpha[i + 1], -(1 + eta) * h
        else:
            keep, outer, g = alpha[i + 1] / alpha[i], -(1 + eta) * sigma[i + 1], h
        phi1 = math.expm1(g)
        phi2, phi3 = phi1 / g - 1, (phi1 / g - 1) / g - 0.5
        value = phi1 * past[0]
        if min(order, i + 1) >= 2:
            r0 = (lam[i] - lam[i - 1]) / h
            d = (past[0] - past[1]) / r0
        if min(order, i + 1) == 2:
            value = value + (phi1 / 2 if variant == "midpoint" else phi2) * d
        if min(order, i + 1) == 3:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            e = (past[1] - past[2]) / r1
            d1, d2 = d + r0 / (r0 + r1) * (d - e), (d - e) / (r0 + r1)
            value = value + phi2 * d1 + (2 if third == "third_order" else 1) * phi3 * d2
        x = keep * x + outer * value
        if eta:
            noise = 1 - math.exp(-2 * eta * h) if form == "x0" else eta * math.expm1(2 * h)
            x = x + sigma[i + 1] * math.sqrt(noise) * DRAWS[i]
    return x


FULL = {"lower_order_final": False}


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_dpm_solvers_in_differences(variant):
    for grid in (vp_grid(), edm_grid(), flow_grid()):
        agree(run(plan_on(grid, "dpmpp_2m", variant=variant, **FULL)), dpm_multistep(grid, "x0", 2, variant, ""))
        want = dpm_multistep(grid, "eps", 2, variant, "")
        agree(run(plan_on(grid, "dpm_solver", "eps", solver_type=variant, **FULL)), want)
        for eta in (0.5, 1.0):
            want = dpm_multistep(grid, "x0", 2, variant, "", eta)
            agree(run(plan_on(grid, "dpmpp_2m_sde", variant=variant, eta=eta, **FULL)), want)
    want = dpm_multistep(vp_grid(), "x0", 3, "midpoint", "published")
    agree(run(plan_on(vp_grid(), "dpmpp_3m", variant="published", **FULL)), want)
    want = dpm_multistep(vp_grid(), "x0", 3, "heun", "third_order")
    agree(run(plan_on(vp_grid(), "dpmpp_3m", **FULL)), want)
    want = dpm_multistep(vp_grid(), "eps", 3, variant, "third_order")
    agree(run(plan_on(vp_grid(), "dpm_solver", "eps", order=3, solver_type=variant, **FULL)), want)


def test_dpm_solver_of_the_sde():
    """eps form: x' = (alpha'/alpha) x - 2 sigma' (e^h - 1) (m0 + D1/2) + sigma' sqrt(e^2h - 1) z."""
    grid = vp_grid()
    for order in (1, 2):
        rows = dpmpp_rows(grid, "eps", [order] * grid.steps, "midpoint", form="eps", eta=1.0)
        plan = replace(plan_on(grid, "ddim", "eps"), steps=rows)
        agree(run(plan), dpm_multistep(grid, "eps", order, "midpoint", "", 1.0))


def test_dpmpp_and_unipc_on_a_flow_start_at_pure_noise():
    """x0 = x - t v, lam = log((1 - t)/t); the first step is x' = t' x + (1 - t') x0."""
    plan = make_plan(flow_grid().schedule, "dpmpp_2m", 6, prediction="flow", lower_order_final=False)
    t = [step.sigma for step in plan.steps]
    x, before = NOISE, None
    for i in range(6):
        x0, end = x - t[i] * model(x, t[i]), (t[i + 1] if i < 5 else 0.0)
        value = x0
        if 1 < i < 5:
            lam = [math.log((1 - s) / s) for s in (t[i - 1], t[i], end)]
            value = x0 + (lam[2] - lam[1]) / (lam[1] - lam[0]) / 2 * (x0 - before)
        x, before = end / t[i] * x + (1 - end - end * (1 - t[i]) / t[i]) * value, x0
    agree(run(plan), x)
    one = make_plan(flow_grid().schedule, "unipc", 6, prediction="flow", corrector=False, lower_order_final=False)
    agree(run(one), x)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_integrates_lagrange_polynomials(order):
    grid = edm_grid()
    sigma, x, past = np.array(grid.sigmas), NOISE, []
    for i in range(grid.steps):
        past = [model(x, sigma[i]), *past][:order]
        nodes = sigma[i - len(past) + 1 : i + 1][::-1]
        for j, value in enumerate(past):
            rest = np.delete(nodes, j)
            basis = np.poly1d(np.poly(rest) / np.prod(nodes[j] - rest)).integ()
            x = x + (basis(sigma[i + 1]) - basis(sigma[i])) * value
    agree(run(plan_on(grid, "lms", "eps", order=order, **FULL)), x)
    agree(run(plan_on(grid, "deis", "eps", order=order, variant="rhoab", **FULL)), x)


def test_ipndm_has_equal_step_weights():
    weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    grid = vp_grid()
    alpha, sigma, _, t = levels(grid)
    x, past = NOISE, []
    for i in range(grid.steps):
        past = [model(x, t[i]), *past][:4]
        e = sum(w * m for w, m in zip(weights[len(past) - 1], past, strict=True))
        x = alpha[i + 1] / alpha[i] * x + alpha[i + 1] * (sigma[i + 1] / alpha[i + 1] - sigma[i] / alpha[i]) * e
    agree(run(plan_on(grid, "ipndm", "eps")), x)


def test_lcm_jumps_and_adds_noise():
    plan = make_plan(VP, "lcm", 4)
    assert [step.timestep for step in plan.steps] == [999.0, 759.0, 499.0, 259.0]
    x = NOISE
    for i, step in enumerate(plan.steps):
        tau = 10.0 * step.timestep
        x0 = (x - step.sigma * model(x, step.timestep)) / step.alpha
        x = 0.25 / (tau**2 + 0.25) * x + tau / math.sqrt(tau**2 + 0.25) * x0
        if i < 3:
            x = plan.steps[i + 1].alpha * x + plan.steps[i + 1].sigma * DRAWS[i]
    agree(run(plan), x)


# ---------------------------------------------------------------- several evaluations a step
def karras_heun(sigma, s_churn, s_tmin, s_tmax, s_noise):
    """Algorithm 2 of Karras et al. 2022 on a denoiser of x0, with the last step Euler's."""
    x, count, draws = NOISE * sigma[0], len(sigma) - 1, iter(DRAWS)
    for i in range(count):
        gamma = min(s_churn / count, math.sqrt(2) - 1) if s_tmin <= sigma[i] <= s_tmax else 0.0
        hat = sigma[i] * (1 + gamma)
        if gamma:
            x = x + math.sqrt(hat**2 - sigma[i] ** 2) * s_noise * next(draws)
        slope = (x - model(x, hat)) / hat
        after = x + (sigma[i + 1] - hat) * slope
        if i + 1 < count:
            second = (after - model(after, sigma[i + 1])) / sigma[i + 1]
            after = x + (sigma[i + 1] - hat) * (slope + second) / 2
        x = after
    return x


@pytest.mark.parametrize("churn", [(0.0, 0.0, None, 1.0), (3.0, 0.05, 10.0, 1.007), (40.0, 0.0, None, 1.0)])
def test_heun_is_algorithm_2_of_edm(churn):
    s_churn, s_tmin, s_tmax, s_noise = churn
    options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    plan = make_plan(EDM, "heun", 7, prediction="x0", **options)
    assert plan.nfe == 13
    order = {int(k): i for i, k in enumerate(draws_of(plan))}
    got = run_plan(plan, lambda x, t, i: model(x, t), NOISE, draw=lambda k: DRAWS[order[k]])
    sigma = make_grid(EDM, 7).sigmas
    agree(got, karras_heun(sigma, s_churn, s_tmin, math.inf if s_tmax is None else s_tmax, s_noise))
    raised = [step.restart for step in plan.steps if step.x == "x" and step.variant]
    assert raised == [bool(s_churn) and s_tmin <= s <= (s_tmax or math.inf) for s in sigma[:7]]


def draws_of(plan):
    """Numbers of the draws in the order of their use."""
    names = [slot for op in plan.ops() for slot, _ in op.terms if slot.startswith("noise:") and slot != "noise:0"]
    return [name.removeprefix("noise:") for name in names]


def test_euler_with_churn_is_the_stochastic_euler_of_edm():
    plan = make_plan(EDM, "euler", 6, prediction="x0", s_churn=2.0, s_tmax=5.0)
    sigma, x, draws = make_grid(EDM, 6).sigmas, NOISE * 20.0, iter(DRAWS)
    for i in range(6):
        hat = sigma[i] * (1 + 1 / 3) if sigma[i] <= 5.0 else sigma[i]
        if hat > sigma[i]:
            x = x + math.sqrt(hat**2 - sigma[i] ** 2) * next(draws)
        x = x + (sigma[i + 1] - hat) * (x - model(x, hat)) / hat
    agree(run(plan), x)
    assert plan.nfe == 6


def test_flow_heun():
    plan = make_plan(flow_grid().schedule, "flow_heun", 5, prediction="flow")
    t, x = np.linspace(1, 0, 6), NOISE
    for i in range(5):
        v = model(x, t[i])
        if i < 4:
            v = (v + model(x + (t[i + 1] - t[i]) * v, t[i + 1])) / 2
        x = x + (t[i + 1] - t[i]) * v
    agree(run(plan), x)
    assert plan.nfe == 9


def stage_grid(grid, places):
    """Levels inside every step at shares of it in lam."""
    return [[grid.at_lam(grid.lam(i) + r * (grid.lam(i + 1) - grid.lam(i))) for r in places] for i in range(grid.steps)]


@pytest.mark.parametrize("r1", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_dpmpp_2s(r1, variant):
    grid = vp_grid()
    alpha, sigma, lam, t = levels(grid)
    x = NOISE
    for i, [(t1, (a1, s1))] in enumerate(stage_grid(grid, [r1])):
        h = lam[i + 1] - lam[i]
        m = model(x, t[i])
        u = s1 / sigma[i] * x - a1 * math.expm1(-r1 * h) * m
        d = (model(u, t1) - m) / r1
        phi = math.expm1(-h) / 2 if variant == "midpoint" else -math.expm1(-h) / h - 1
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (math.expm1(-h) * m + phi * d)
    agree(run(plan_on(grid, "dpmpp_2s", r1=r1, variant=variant)), x)
    if (r1, variant) == (0.5, "midpoint"):
        step = plan_on(grid, "dpmpp_2s").steps[1]
        assert {slot for slot, _ in step.ops[-1].terms} == {"x", "m1"} and step.x == "u"


@pytest.mark.parametrize("variant", ["midpoint", "heun"])
def test_dpm_solver_3_singlestep(variant):
    grid, r1, r2 = vp_grid(), 1 / 3, 2 / 3
    alpha, sigma, lam, t = levels(grid)
    x = NOISE
    for i, [(t1, (a1, s1)), (t2, (a2, s2))] in enumerate(stage_grid(grid, [r1, r2])):
        h = lam[i + 1] - lam[i]
        m = model(x, t[i])
        d1 = model(a1 / alpha[i] * x - s1 * math.expm1(r1 * h) * m, t1) - m
        u = a2 / alpha[i] * x - s2 * math.expm1(r2 * h) * m
        u = u - r2 / r1 * s2 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = model(u, t2) - m
        phi2 = math.expm1(h) / h - 1
        x = alpha[i + 1] / alpha[i] * x - sigma[i + 1] * math.expm1(h) * m
        if variant == "midpoint":
            x = x - sigma[i + 1] / r2 * phi2 * d2
        else:
            one, two = d1 / r1, d2 / r2
            slope, bend = (r2 * one - r1 * two) / (r2 - r1), 2 * (two - one) / (r2 - r1)
            x = x - sigma[i + 1] * (phi2 * slope + (phi2 / h - 0.5) * bend)
    plan = plan_on(grid, "dpm_solver", "eps", order=3, variant="singlestep", solver_type=variant)
    agree(run(plan), x)
    assert plan.nfe == 21


def test_singlestep_groups_on_a_grid_of_evaluations():
    """Groups of 3, 2 and 1 evaluations; every group alone is the step of that order."""
    grid = vp_grid(LAMS[:7])
    plan = plan_on(grid, "ddim", "eps")
    rows = singlestep_rows(grid, "eps", [3, 2, 1], "midpoint", form="eps")
    assert [step.x for step in rows] == ["x", "u", "u", "x", "u", "x"]
    assert dict(rows[-1].ops[-1].terms) == pytest.approx(
        {
            "x": grid.alphas[6] / grid.alphas[5],
            rows[-1].ops[0].dst: grid.sigmas[6] - grid.alphas[6] / grid.alphas[5] * grid.sigmas[5],
        }
    )
    assert len(plan.steps) == len(rows)


def test_pndm_is_runge_kutta_then_adams():
    grid = vp_grid()
    alpha, sigma, _, t = levels(grid)

    def move(x, e, start, end):
        return end[0] / start[0] * x + end[0] * (end[1] / end[0] - start[1] / start[0]) * e

    x, past = NOISE, []
    for i in range(grid.steps):
        start, end = grid.level(i), grid.level(i + 1)
        e = model(x, t[i])
        past = [e, *past][:4]
        if i < 3:
            inner = (t[i] + t[i + 1]) / 2
            middle = VP.alpha(inner), VP.sigma(inner)
            e2 = model(move(x, e, start, middle), inner)
            e3 = model(move(x, e2, start, middle), inner)
            e4 = model(move(x, e3, start, end), t[i + 1])
            e = (e + 2 * e2 + 2 * e3 + e4) / 6
        else:
            e = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
        x = move(x, e, start, end)
    plan = plan_on(grid, "pndm", "eps")
    np.testing.assert_allclose(run(plan), x, rtol=0, atol=1e-11 * np.abs(x).max())  # t of lam and back
    assert plan.nfe == 7 + 9
    assert plan_on(grid, "pndm", "eps", skip_prk=True).nfe == 8
