"""Golden rows, transcriptions of the papers, measured orders, and exactness where theory promises it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.interpreter import Gaussian, row, run_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.solvers import SOLVERS, solver_options, solver_rows
from vivace.engine.solvers.rows import start_from_noise
from vivace.engine.timesteps import Grid, make_grid
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.01, 20.0)
FLOW = NoiseSchedule.flow()
DATA = Gaussian.of(8)
NOISE = np.random.default_rng(3).normal(size=(4, 8))


def grid_of(lams):
    """VP levels at these log-SNRs; timesteps are their numbers."""
    alphas = [1 / math.sqrt(1 + math.exp(-2 * lam)) for lam in lams]
    sigmas = [1 / math.sqrt(1 + math.exp(2 * lam)) for lam in lams]
    return Grid(tuple(map(float, range(len(lams) - 1))), tuple(alphas), tuple(sigmas))


def plan_on(grid, solver, prediction="x0", **options):
    return Plan(solver_rows(solver, grid, prediction, options).steps, prediction, start_from_noise(1.0))


# Last step of lam = (-2, -1, 0.2, 1.5), newest history first, eight decimals.
GOLDEN = [
    ("ddim", {}, [0.71000827]),
    ("dpmpp_2m", {}, [1.09459609, -0.38458781]),
    ("dpmpp_2m", {"variant": "heun"}, [1.17566701, -0.46565873]),
    ("unipc", {"order": 2, "corrector": False}, [1.09459609, -0.38458781]),
    ("unipc", {"order": 3, "corrector": False}, [1.63112382, -1.46766373, 0.54654818]),
    ("unipc", {"order": 2, "variant": "bh1"}, [1.49186278, -0.95356104, 0.17170653]),
    ("unipc", {"order": 2, "variant": "bh2"}, [1.18918460, -0.57089504, 0.09171871]),
    ("unipc", {"order": 3, "variant": "bh1"}, [1.72571233, -1.73395878, 0.71825471]),
    ("unipc", {"order": 3, "variant": "bh2"}, [1.72571233, -1.65397096, 0.63826689]),
]


@pytest.mark.parametrize(("solver", "options", "weights"), GOLDEN)
def test_golden_rows(solver, options, weights):
    if solver != "ddim":
        options = {**options, "lower_order_final": False}
    got = row(plan_on(grid_of([-2.0, -1.0, 0.2, 1.5]), solver, **options), 2)
    want = {"x": 0.34376876} | {f"m:{age}": weight for age, weight in enumerate(weights)}
    assert got == pytest.approx(want, abs=1.01e-8)


CASES = [("ddim", {}), ("dpmpp_2m", {}), ("dpmpp_2m", {"variant": "heun"})]
CASES += [("unipc", {"order": p, "variant": v}) for p in (1, 2, 3) for v in ("bh1", "bh2")]
CASES += [("unipc", {"order": 3, "disable_corrector": (0, 2)}), ("unipc", {"order": 2, "corrector": False})]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.05, 2.0), min_size=1, max_size=9), st.sampled_from(CASES))
def test_weights_of_every_row_sum_to_the_first_order_weight(steps, case):
    """The p = 1 moment: a constant x0 is integrated exactly, whatever the order."""
    grid = grid_of(list(np.cumsum([-3.0, *steps])))
    plan = plan_on(grid, case[0], **case[1])
    for index in range(grid.steps):
        terms = row(plan, index)
        keep = grid.sigmas[index + 1] / grid.sigmas[index]
        assert terms.pop("x") == pytest.approx(keep, rel=1e-12)
        total = grid.alphas[index + 1] - keep * grid.alphas[index]
        assert sum(terms.values()) == pytest.approx(total, abs=1e-11 * sum(map(abs, terms.values())))
        assert len(terms) <= case[1].get("order", 2) + 1


def paper_unipc(model, x, grid, form, variant, corrected, orders):
    """UniPC with two states, predictor and corrector as in algorithms 1 and 2 of the paper."""
    lam = [grid.lam(i) for i in range(grid.steps + 1)]
    history = [model(x, 0)]
    for i in range(grid.steps):
        p, h = orders[i], lam[i + 1] - lam[i]
        r = np.array([(lam[i - k] - lam[i]) / h for k in range(1, p)] + [1.0])
        power = -h if form == "x0" else h
        keep, outer = (grid.sigmas, grid.alphas) if form == "x0" else (grid.alphas, grid.sigmas)
        scale = power if variant == "bh1" else np.expm1(power)
        psi, moments = np.expm1(power) / power - 1.0, []
        for k in range(1, p + 1):
            moments.append(math.factorial(k) * psi / scale)
            psi = psi / power - 1.0 / math.factorial(k + 1)
        powers = np.vander(r, p, increasing=True).T
        differences = [(history[-1 - k] - history[-1]) / r[k - 1] for k in range(1, p)]
        base = keep[i + 1] / keep[i] * x - outer[i + 1] * np.expm1(power) * history[-1]
        ahead = np.array([0.5]) if p == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
        guess = base - outer[i + 1] * scale * sum(a * d for a, d in zip(ahead, differences, strict=True))
        if i + 1 == grid.steps:
            return guess
        new = model(guess, i + 1)
        both = np.array([0.5]) if p == 1 else np.linalg.solve(powers, moments)
        change = sum(a * d for a, d in zip(both, [*differences, new - history[-1]], strict=True))
        x = base - outer[i + 1] * scale * change if corrected[i] else guess
        history.append(new)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("disabled", [(), (0,), (1, 3)])
@pytest.mark.parametrize("form", ["x0", "eps"])
def test_one_row_unipc_is_the_two_state_method_of_the_paper(order, variant, disabled, form):
    grid = grid_of([-3.0, -2.1, -1.6, -0.2, 0.5, 1.7, 2.2, 3.0])
    plan = plan_on(grid, "unipc", form, order=order, variant=variant, disable_corrector=disabled, form=form)
    orders = [min(order, i + 1, grid.steps - i) for i in range(grid.steps)]

    def model(x, i):
        return np.tanh(x) + 0.1 * i

    want = paper_unipc(model, NOISE, grid, form, variant, [i not in disabled for i in range(7)], orders)
    got = run_plan(plan, lambda x, t, i: model(x, i), NOISE)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


def test_unipc_2_bh2_without_corrector_is_dpmpp_2m_midpoint():
    grid = make_grid(VP, 9)
    one, two = plan_on(grid, "unipc", corrector=False), plan_on(grid, "dpmpp_2m")
    for index in range(9):
        assert row(one, index) == pytest.approx(row(two, index), rel=1e-12)


def error(solver, schedule, steps, prediction, grid, **options):
    options = options if solver == "ddim" else {"lower_order_final": False, **options}
    plan = make_plan(schedule, solver, steps, prediction=prediction, grid=grid, final="sigma_min", **options)
    levels = make_grid(schedule, steps, grid=grid, final="sigma_min")
    start = dict(plan.init[0].terms)["noise:0"] * NOISE
    exact = DATA.flow(start, levels.level(0), levels.level(steps))
    return np.abs(run_plan(plan, DATA.denoiser(plan), NOISE) - exact).max()


ORDERS = [("ddim", {}, 1), ("dpmpp_2m", {"order": 1}, 1), ("dpmpp_2m", {}, 2), ("dpmpp_2m", {"variant": "heun"}, 2)]
ORDERS += [("unipc", {"order": p, "variant": v}, p + 1) for p in (1, 2, 3) for v in ("bh1", "bh2")]
ORDERS += [("unipc", {"order": 2, "corrector": False}, 2), ("unipc", {"order": 3, "corrector": False}, 3)]


@pytest.mark.parametrize(("solver", "options", "order"), ORDERS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_measured_order_of_convergence(solver, options, order, prediction):
    errors = [error(solver, EDM, steps, prediction, "karras", **options) for steps in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    if options.get("order") != 3:
        errors = [error(solver, VP, steps, prediction, "logsnr", **options) for steps in (80, 160)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "flow_euler"])
def test_a_point_mass_is_reached_exactly_from_any_level(solver):
    """A constant x0 prediction is integrated without error by every solver, at both infinite ends too."""
    point = Gaussian(np.full(8, 0.7), np.zeros(8))
    for schedule, kinds in ((VP, ("eps", "x0", "v", "flow")), (EDM, ("eps", "x0")), (FLOW, ("x0", "v", "flow"))):
        if solver == "flow_euler" and schedule is not FLOW:
            continue
        for kind in kinds:
            for steps in (1, 2, 5):
                plan = make_plan(schedule, solver, steps, prediction=kind)
                got = run_plan(plan, point.denoiser(plan), NOISE)
                np.testing.assert_allclose(got, 0.7, atol=1e-11)


def test_flow_euler_is_ddim_on_a_flow():
    for kind in ("flow", "v", "x0"):
        got, want = (
            run_plan(plan, DATA.denoiser(plan), NOISE)
            for plan in (make_plan(FLOW, solver, 6, prediction=kind) for solver in ("flow_euler", "ddim"))
        )
        np.testing.assert_allclose(got, want, atol=1e-13)
    terms = make_plan(FLOW, "flow_euler", 4, prediction="flow").steps[0].ops[-1].terms
    assert terms == (("x", 1.0), ("out", -0.25))


def test_solvers_approach_the_exact_flow_from_pure_noise():
    """Both ends infinite: flow t = 1 and zero-terminal-SNR VP to sigma = 0."""
    zero = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})
    for schedule in (FLOW, zero):
        for solver, options in (("dpmpp_2m", {}), ("unipc", {}), ("unipc", {"variant": "bh1", "order": 3})):
            plan = make_plan(schedule, solver, 100, prediction="v", **options)
            assert plan.steps[0].alpha == 0.0
            got = run_plan(plan, DATA.denoiser(plan), NOISE)
            np.testing.assert_allclose(got, DATA.flow(NOISE, (0.0, 1.0), (1.0, 0.0)), atol=0.02)


def test_eps_from_pure_noise_is_refused_with_advice():
    for solver in SOLVERS:
        with pytest.raises(PlanError, match="pure noise.*predicts v, x0 or flow"):
            make_plan(FLOW, solver, 4)


def test_history_rotates_through_a_ring_just_large_enough():
    def slots(plan):
        return [step.ops[0].dst for step in plan.steps]

    assert slots(make_plan(VP, "ddim", 3)) == ["m0"] * 3
    assert slots(make_plan(VP, "dpmpp_2m", 4)) == ["m0", "m1", "m0", "m1"]
    assert slots(make_plan(VP, "unipc", 5)) == ["m0", "m1", "m2", "m0", "m1"]
    assert slots(make_plan(VP, "unipc", 6, order=3)) == ["m0", "m1", "m2", "m3", "m0", "m1"]
    assert slots(make_plan(VP, "unipc", 1, order=3)) == ["m0"]


def test_order_falls_towards_the_end_and_is_one_at_sigma_zero():
    last = make_plan(VP, "unipc", 30, order=3, lower_order_final=False).steps[-1].ops[-1]
    assert last.terms == (("m1", 1.0),)
    plan = make_plan(VP, "dpmpp_2m", 30, final="sigma_min")
    assert set(row(plan, 29)) == {"x", "m:0"} and set(row(plan, 28)) == {"x", "m:0", "m:1"}
    kept = make_plan(VP, "dpmpp_2m", 30, final="sigma_min", lower_order_final=False)
    assert set(row(kept, 29)) == {"x", "m:0", "m:1"}


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW])
def test_ddim_with_fresh_noise_has_the_mean_and_variance_of_its_marginals(schedule):
    """Each eta keeps q(x_t) for a point mass: x_t ~ N(alpha_t x0, sigma_t^2)."""
    rng = np.random.default_rng(0)
    point = Gaussian(np.full(1, 0.3), np.zeros(1))
    kind = "v" if schedule is FLOW else "eps"
    options = {"final": "sigma_min", "grid": "logsnr"}
    for eta in (0.3, 1.0):
        plan = make_plan(schedule, "ddim", 6, prediction=kind, eta=eta, **options)
        draws = [slot for op in plan.ops() for slot, _ in getattr(op, "terms", ()) if slot.startswith("noise:")]
        assert draws == [f"noise:{k}" for k in range(7)]
        level = make_grid(schedule, 6, **options).level(6)
        noise = rng.normal(size=(200_000, 1))
        if schedule is VP:  # the first level still holds a little data
            noise = plan.steps[0].alpha * 0.3 + plan.steps[0].sigma * noise
        if schedule is EDM:
            noise = noise + 0.3 / EDM.sigma_max
        got = run_plan(plan, point.denoiser(plan), noise, draw=lambda k: rng.normal(size=(200_000, 1)))
        assert got.mean() == pytest.approx(level[0] * 0.3, abs=5 * level[1] / math.sqrt(200_000))
        assert got.std() == pytest.approx(level[1], rel=0.01)


def test_ddim_with_fresh_noise_is_equation_16():
    plan = make_plan(VP, "ddim", 4, eta=0.7)
    alpha, sigma = plan.steps[1].alpha, plan.steps[1].sigma
    after, noise = plan.steps[2].alpha, plan.steps[2].sigma
    want = 0.7 * noise / sigma * math.sqrt(1 - alpha**2 / after**2)
    assert dict(plan.steps[1].ops[-1].terms)["noise:2"] == pytest.approx(want, rel=1e-12)
    assert "noise" not in str(plan.steps[-1].ops)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("unipic", {}, "known: bdia, .*, ddim, ddpm, .*; did you mean 'unipc'"),
        ("unipc", {"ordre": 2}, "unipc: option: unknown 'ordre'.*did you mean 'order'"),
        ("unipc", {"order": 4}, "order must be an integer in 1..3"),
        ("unipc", {"order": True}, "order"),
        ("unipc", {"variant": "bh3"}, "variant"),
        ("unipc", {"corrector": 1}, "corrector"),
        ("unipc", {"disable_corrector": ("0",)}, "disable_corrector"),
        ("dpmpp_2m", {"order": 3}, "1..2"),
        ("dpmpp_2m", {"variant": "midpiont"}, "did you mean 'midpoint'"),
        ("dpmpp_2m", {"lower_order_final": "no"}, "lower_order_final"),
        ("ddim", {"eta": 1.5}, "eta"),
        ("ddim", {"eta": math.nan}, "eta"),
        ("ddim", {"order": 2}, "option: unknown 'order'; known: eta"),
        ("flow_euler", {"order": 2}, "known: none"),
        ("flow_euler", {}, "needs a flow schedule"),
    ],
)
def test_wrong_options_are_one_clear_line(solver, options, message):
    with pytest.raises(ArgumentError, match=message) as raised:
        make_plan(VP, solver, 5, **options)
    assert "\n" not in str(raised.value)


def test_every_solver_declares_its_options():
    assert solver_options("unipc")["order"] == 2 and solver_options("ddim") == {"eta": 0.0}
    assert all(isinstance(solver_options(name), dict) for name in SOLVERS)
