"""DC-Solver against a plain transcription of its paper; its ratios, regression, tables and recipes."""

import json
import math

import numpy as np
import pytest
import torch

from vivace.bench.oracle import Mixture, denoiser_for, schedule_denoiser
from vivace.engine.bind import ModelSpec
from vivace.engine.calibrate.compensation import calibrate_dc_solver
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.walk import converged_states, golden
from vivace.engine.lower import Given, lower_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.solvers import solver_rows
from vivace.engine.solvers.dc_solver import regressed, regression
from vivace.engine.timesteps import make_grid
from vivace.errors import ArgumentError, ModelError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
FLOW = NoiseSchedule.flow()
MIXTURE = Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(32, 2)))
RATIOS = [1.0, 1.0, 0.8, 1.3, 0.6, 1.1, 0.9, 1.2]


def problem(schedule=VP, prediction="v", seed=0):
    return Problem.of_callable(schedule_denoiser(MIXTURE, schedule, prediction), schedule, prediction, (2,), seed=seed)


def unipc_weights(order, h, nodes, variant):
    """(rho of the predictor, rho of the corrector) of UniPC, x0 form, from the linear systems of the paper."""
    scale = -h if variant == "bh1" else math.expm1(-h)
    moments, value = [], math.expm1(-h) / -h - 1.0
    for k in range(1, order + 1):
        moments.append(math.factorial(k) * value / scale)
        value = value / -h - 1.0 / math.factorial(k + 1)
    full = [*nodes, 1.0]
    ahead = (
        [0.5] * (order - 1)
        if order < 3
        else np.linalg.solve([[r**k for r in nodes] for k in range(order - 1)], moments[:-1])
    )
    both = [0.5] if order == 1 else np.linalg.solve([[r**k for r in full] for k in range(order)], moments)
    return ahead, both, scale


def transcribed(grid, x, ratios, order, variant, points=3, corrector=True):
    """Predictor, evaluation and corrector with two states, and the newest value replaced before every step."""
    lam = [math.log(a / s) if s else math.inf for a, s in zip(grid.alphas, grid.sigmas, strict=True)]
    values, times = [MIXTURE.x0(x, *grid.level(0))], [grid.timesteps[0]]
    for i in range(grid.steps):
        if ratios[i] != 1.0 and i >= points - 1:
            at = ratios[i] * times[-1] + (1 - ratios[i]) * times[-2]
            fresh = torch.zeros_like(x)
            for k in range(1, points + 1):
                factor = 1.0
                for other in range(1, points + 1):
                    if other != k:
                        factor *= (at - times[-other]) / (times[-k] - times[-other])
                fresh = fresh + factor * values[-k]
            values[-1] = fresh
        (_, sigma), (alpha1, sigma1) = grid.level(i), grid.level(i + 1)
        p = min(order, i + 1, grid.steps - i)
        if sigma1 == 0.0:
            return alpha1 * values[-1]
        h = lam[i + 1] - lam[i]
        nodes = [(lam[i - k] - lam[i]) / h for k in range(1, p)]
        ahead, both, scale = unipc_weights(p, h, nodes, variant)
        base = sigma1 / sigma * x - alpha1 * math.expm1(-h) * values[-1]
        slopes = [(values[-1 - k] - values[-1]) / nodes[k - 1] for k in range(1, p)]
        predicted = base - alpha1 * scale * sum((r * d for r, d in zip(ahead, slopes, strict=False)), torch.zeros(1))
        if i == grid.steps - 1:
            return predicted
        new = MIXTURE.x0(predicted, alpha1, sigma1)
        x = predicted
        if corrector:
            change = sum((r * d for r, d in zip(both, slopes, strict=False)), torch.zeros(1))
            x = base - alpha1 * scale * (change + both[-1] * (new - values[-1]))
        values.append(new)
        times.append(grid.timesteps[i + 1])
    raise AssertionError


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("order", "variant"), [(2, "bh2"), (3, "bh1"), (3, "bh2")])
@pytest.mark.parametrize("points", [2, 3])
def test_rows_do_what_the_paper_says(final, order, variant, points):
    options = {"order": order, "variant": variant, "points": points, "ratios": RATIOS}
    plan = make_plan(VP, "dc_solver", 8, prediction="v", final=final, **options)
    want = transcribed(make_grid(VP, 8, final=final), NOISE, RATIOS, order, variant, points)
    torch.testing.assert_close(sample(denoiser_for(MIXTURE, plan), plan, NOISE), want, rtol=0, atol=1e-10)


def test_without_a_corrector_it_is_dpm_solver_pp_with_values_replaced():
    ratios, grid = [1.0, 1.0, 0.7, 1.2, 1.4, 0.9], make_grid(VP, 6)
    plan = make_plan(VP, "dc_solver", 6, prediction="x0", base="dpmpp", ratios=ratios)
    want = transcribed(grid, NOISE, ratios, 2, "bh2", corrector=False)
    torch.testing.assert_close(sample(denoiser_for(MIXTURE, plan), plan, NOISE), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", [VP, FLOW, NoiseSchedule.edm()], ids=["vp", "flow", "edm"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_ratios_of_one_are_the_base_solver_to_the_bit(schedule, order):
    grid = make_grid(schedule, 7)
    for form in ("x0", "eps"):
        own = {"order": order, "form": form, "disable_corrector": (0,)}
        want = solver_rows("unipc", grid, "x0", own).steps
        assert solver_rows("dc_solver", grid, "x0", own).steps == want
        assert solver_rows("dc_solver", grid, "x0", {**own, "ratios": [1.0] * 7}).steps == want
    two = {"order": min(order, 2)}
    want = solver_rows("dpmpp_2m", grid, "x0", two).steps
    assert solver_rows("dc_solver", grid, "x0", {**two, "base": "dpmpp"}).steps == want


def test_rows_without_enough_values_keep_theirs():
    grid = make_grid(VP, 6)
    steps = solver_rows("dc_solver", grid, "v", {"ratios": [0.5, 0.5, 1, 1, 1, 1]}).steps
    assert steps == solver_rows("unipc", grid, "v", {}).steps


def test_any_base_in_any_form_reaches_a_point_mass():
    """Weights of a replaced value add up to one, so a constant x0 stays."""
    for options in ({"order": 3}, {"order": 3, "form": "eps"}, {"base": "dpmpp", "order": 3}):
        plan = make_plan(VP, "dc_solver", 8, prediction="x0", ratios=RATIOS, **options)
        got = sample(lambda x, t: torch.full_like(x, 0.7), plan, NOISE)
        torch.testing.assert_close(got, torch.full_like(NOISE, 0.7), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- calibration
def test_a_fitted_ratio_is_the_best_one():
    """Against a search on a fine net of ratios, each by the transcription."""
    table = calibrate_dc_solver(problem(), steps=5, samples=24, evaluations=60)
    ratios, noise, grid = table.arrays["ratios.0"].tolist(), problem().noise(range(24)), make_grid(VP, 5)
    target = converged_states(problem(), [grid.level(5)], range(24), evaluations=60)[0]

    def loss(ratio):
        return float((transcribed(grid, noise, [*ratios[:4], ratio], 2, "bh2") - target).square().mean())

    net = np.linspace(0.5, 1.5, 2001)
    best = net[np.argmin([loss(ratio) for ratio in net])]
    assert abs(ratios[4] - best) <= 1e-3
    assert loss(ratios[4]) < loss(1.0)


def test_states_between_rows_are_those_of_the_solution():
    """Dense states against the mixture's own integrator, at levels that no row of the run has."""
    grid = make_grid(VP, 6)
    levels = [grid.level(row) for row in (1, 4)]
    got = converged_states(problem(), levels, range(8), evaluations=400)
    x, start = problem().noise(range(8)), grid.level(0)
    for level, state in zip(levels, got, strict=True):
        assert (state - MIXTURE.solve(x, start, level)).abs().max() < 1e-4


@pytest.mark.parametrize("objective", ["predictor", "corrected"])
def test_ratios_help_samples_that_were_not_measured(objective):
    own = problem()
    table = calibrate_dc_solver(own, steps=6, samples=48, evaluations=80, objective=objective)
    held = range(48, 112)
    want = own.run(own.plan("unipc", 300, grid="karras", order=3), held)
    plain, fitted = own.run(own.plan("unipc", 6), held), own.run(own.plan("dc_solver", 6, table=table), held)
    assert (fitted - want).square().mean() < (plain - want).square().mean()


def test_the_table_is_the_same_each_time_and_goes_on_from_a_file(tmp_path):
    told = []
    options = {"steps": (4, 5), "samples": 6, "evaluations": 20, "resume": tmp_path / "work"}
    one = calibrate_dc_solver(problem(), **options, progress=lambda *now: told.append(now))
    assert told[-1] == ("ratios of 5 steps", 5, 5)
    told.clear()
    again = calibrate_dc_solver(problem(), **options, progress=lambda *now: told.append(now))
    assert again.hash == one.hash and not told
    assert calibrate_dc_solver(problem(), **{**options, "resume": None}).hash == one.hash
    with pytest.raises(ArgumentError, match="another calibration"):
        calibrate_dc_solver(problem(seed=1), **options)


def test_golden_finds_a_minimum_and_is_never_worse_than_its_start():
    assert golden(lambda r: (r - 0.83) ** 2, 0.5, 1.5, 1.0, 40) == pytest.approx(0.83, abs=1e-4)
    assert golden(lambda r: 0.0 if r == 1.0 else 1.0, 0.5, 1.5, 1.0, 12) == 1.0


# ---------------------------------------------------------------- regression
def test_regression_finds_a_polynomial_of_its_degrees():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(5, 3, 3))
    counts, scales = (8, 11, 15, 20), (1.0, 4.0, 7.5)
    pairs = [(n, g) for n in counts for g in scales]

    def value(share, guidance, steps):
        return sum(
            true[p, q, r] * share**p * (guidance / 12) ** q * (steps / 50) ** r
            for p in range(5)
            for q in range(3)
            for r in range(3)
        )

    ratios = [[1.0, 1.0, *(value((row + 1) / n, g, n) for row in range(2, n))] for n, g in pairs]
    found = regression(pairs, ratios)
    for steps, guidance in ((10, 2.0), (17, 6.0)):
        assert regressed(found, 0.5, guidance, steps) == pytest.approx(value(0.5, guidance, steps), abs=1e-6)


def test_few_configurations_give_a_polynomial_of_few_degrees():
    found = regression([(6, 4.0)], [[1.0, 1.0, 0.9, 0.8, 0.85, 1.1]])
    assert found.shape == (4, 1, 1)
    assert regressed(found, 4 / 6, 4.0, 6) == pytest.approx(0.8)
    assert regression([(2, 4.0)], [[1.0, 1.0]]).tolist() == [[[1.0]]]


def test_steps_that_were_not_measured_take_the_polynomial_within_the_measured_range():
    table = calibrate_dc_solver(problem(), steps=(6, 9, 12), samples=8, evaluations=40)
    low, high = table.metadata["range"]
    plan = make_plan(VP, "dc_solver", 8, prediction="v", table=table)
    shares = [(row + 1) / 8 for row in range(8)]
    fitted = [min(max(regressed(table.arrays["polynomial"], s, 1.0, 8), low), high) for s in shares]
    by_hand = make_plan(VP, "dc_solver", 8, prediction="v", ratios=[1.0, 1.0, *fitted[2:]])
    assert plan.steps == by_hand.steps
    measured = make_plan(VP, "dc_solver", 9, prediction="v", ratios=table.arrays["ratios.1"].tolist())
    assert make_plan(VP, "dc_solver", 9, prediction="v", table=table).steps == measured.steps


# ---------------------------------------------------------------- recipes and files
@pytest.fixture(scope="module")
def table():
    return calibrate_dc_solver(problem(), steps=8, samples=8, evaluations=40, order=3)


def test_a_plan_reads_back_and_is_made_again(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.save(path)
    plan = make_plan(VP, "dc_solver", 8, prediction="v", table=path)
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan and back.hash == plan.hash
    assert back.again() == plan
    assert back.again(steps=10).nfe == 10
    assert json.loads((tmp_path / "plan.json").read_text())["recipe"]["arguments"]["table"]["sha256"] == table.hash


def test_a_tail_keeps_the_ratios_of_its_rows(table):
    tail = make_plan(VP, "dc_solver", 8, prediction="v", table=table).tail(0.5)
    ratios = table.arrays["ratios.0"].tolist()
    by_hand = make_plan(VP, "dc_solver", 8, prediction="v", order=3, ratios=ratios).tail(0.5)
    assert tail.steps == by_hand.steps and tail.nfe == 4
    grid = make_grid(VP, 8).tail(4)
    assert tail.steps == solver_rows("dc_solver", grid, "v", {"order": 3, "ratios": ratios[4:]}).steps


def test_a_table_is_of_one_model_one_method_and_one_grid(table):
    plan = make_plan(VP, "dc_solver", 8, prediction="v", table=table)
    spec = ModelSpec("other", "f" * 64, "v", (2,), 1, ())
    with pytest.raises(ModelError, match="dc_solver: measured on model callable"):
        plan.bind(spec)
    with pytest.raises(ModelError, match="measured for 'dc_solver', not for 'iia'"):
        make_plan(VP, "iia", 8, prediction="v", table=table)
    with pytest.raises(ArgumentError, match="measured on another grid"):
        make_plan(VP, "dc_solver", 8, prediction="v", table=table, grid="karras")
    with pytest.raises(ArgumentError, match="order=2, but the table was measured with 3"):
        make_plan(VP, "dc_solver", 8, prediction="v", table=table, order=2)
    with pytest.raises(ArgumentError, match="a table or ratios, not both"):
        make_plan(VP, "dc_solver", 8, prediction="v", table=table, ratios=1.1)


def test_a_table_of_several_scales_must_be_told_which():
    pipe = lambda x, t, branch="cond": {"cond": 1.0, "uncond": 0.9}[branch] * schedule_denoiser(MIXTURE, VP, "v")(x, t)  # noqa: E731
    guided = Problem.of_callable(pipe, VP, "v", (2,), guidance=2.0)
    made = calibrate_dc_solver(guided, steps=4, guidances=(1.0, 3.0), samples=4, evaluations=20)
    with pytest.raises(ArgumentError, match="guidance \\[1.0, 3.0\\]; say which"):
        make_plan(VP, "dc_solver", 4, prediction="v", table=made)
    plans = [make_plan(VP, "dc_solver", 4, prediction="v", table=made, guidance=scale) for scale in (1.0, 3.0)]
    assert plans[0].steps != plans[1].steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [1.0, 0.9]}, "2 ratios for 4 rows"),
        ({"ratios": float("nan")}, r"ratios\[0\] is nan"),
        ({"ratios": [1, 1, 1, True]}, r"ratios\[3\] is True"),
        ({"points": 4}, "points must be 2 or 3"),
        ({"base": "ddim"}, "base: unknown 'ddim'"),
        ({"variant": "midpoint"}, "variant: unknown 'midpoint'"),
        ({"order": 4}, "order must be an integer in 1..3"),
        ({"guidance": 4.0}, "without a table leave it out"),
        ({"disable_corrector": [0.5]}, "row numbers"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_plan(VP, "dc_solver", 4, prediction="v", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"steps": (5, 5)}, "give different numbers"),
        ({"guidances": ()}, "give different numbers"),
        ({"samples": 0}, "samples must be"),
        ({"objective": "final"}, "objective: unknown"),
        ({"bound": -1.0}, "bound must be"),
        ({"order": 7}, "order must be"),
        ({"evaluations": 2}, "4 or more"),
    ],
)
def test_bad_calibrations_are_told(options, message):
    with pytest.raises(ArgumentError, match=message):
        calibrate_dc_solver(problem(), **options)


@pytest.mark.parametrize("order", [2, 3])
def test_a_row_is_one_pass_over_memory_guided_or_not(order):
    """The replaced value and the state are two outputs of one kernel row; the value as it was evaluated is none."""
    plan = make_plan(VP, "dc_solver", 8, prediction="v", order=order, ratios=RATIOS)
    for made in (plan, apply_guidance(plan, 4.0)):
        lowered = lower_plan(made, Given({"guidance_scale": 4.0}))
        assert [last - first for first, last in lowered.spans] == [1] * 8


def test_a_tail_corrects_the_rows_that_the_table_corrects():
    made = calibrate_dc_solver(problem(), steps=8, samples=4, evaluations=40, disable_corrector=[5])
    of_table = make_plan(VP, "dc_solver", 8, prediction="v", table=made)
    told = make_plan(VP, "dc_solver", 8, prediction="v", table=made, disable_corrector=[5])
    assert of_table.steps == told.steps
    tails = of_table.tail(0.5), told.tail(0.5)
    assert tails[0].steps == tails[1].steps
    coefs = [[coef for op in plan.steps[-2].ops for _, coef in op.terms] for plan in (tails[0], of_table)]
    assert coefs[0] == coefs[1]  # the ring of slots turns otherwise in a shorter plan


def test_a_table_of_another_final_level_is_refused(table):
    with pytest.raises(ArgumentError, match="another grid"):
        make_plan(VP, "dc_solver", 8, prediction="v", table=table, final="sigma_min")
