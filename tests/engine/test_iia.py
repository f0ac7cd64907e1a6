"""IIA against plain loops of its paper and their normal equations; its bases, tables and recipes."""

import json
import math

import numpy as np
import pytest
import torch

from vivace.bench.oracle import Mixture, denoiser_for, schedule_denoiser
from vivace.engine.bind import ModelSpec
from vivace.engine.calibrate.iia import calibrate_iia
from vivace.engine.calibrate.problem import Problem
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.solvers import solver_rows
from vivace.engine.timesteps import make_grid
from vivace.errors import ArgumentError, ModelError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.01, 20.0)
MIXTURE = Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(32, 2)))


def problem(schedule=VP, prediction="v", seed=0):
    return Problem.of_callable(schedule_denoiser(MIXTURE, schedule, prediction), schedule, prediction, (2,), seed=seed)


def eps_of(x, level):
    return (x - level[0] * MIXTURE.x0(x, *level)) / level[1]


def run(plan, x=NOISE):
    return sample(denoiser_for(MIXTURE, plan), plan, x)


def close(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# ---------------------------------------------------------------- rows
def test_ddim_with_a_number_on_the_noise():
    grid, betas, x = make_grid(VP, 6), [0.1, -0.2, 0.05, 0.3, -0.1, 0.02], NOISE
    for i in range(6):
        (a, s), (b, r) = grid.level(i), grid.level(i + 1)
        eps = eps_of(x, (a, s))
        x = b / a * (x - s * eps) + r * eps + betas[i] * eps
    plan = make_plan(VP, "iia", 6, prediction="v", shifts=[[0.0, beta] for beta in betas])
    close(run(plan), x)


def test_heun_with_numbers_on_both_slopes():
    """BIIA-EDM: z + dt (w_0 d + w_1 d'), w = 1/2 + a fitted part; the last step has one slope."""
    grid = make_grid(EDM, 4)
    numbers = [(0.05, -0.1), (0.2, 0.1), (-0.3, 0.15)]
    sigma, x = grid.sigmas, grid.sigmas[0] * NOISE
    shifts = []
    for i in range(4):
        d, dt = eps_of(x, (1.0, sigma[i])), sigma[i + 1] - sigma[i]
        if i == 3:
            x = x + dt * d
            shifts.append([0.0, 0.0, 0.0])
            break
        guess = x + dt * d
        after = eps_of(guess, (1.0, sigma[i + 1]))
        x = x + dt * ((0.5 + numbers[i][0]) * d + (0.5 + numbers[i][1]) * after)
        shifts += [[0.0, 0.0, 0.0], [0.0, dt * numbers[i][1], dt * numbers[i][0]]]
    plan = make_plan(EDM, "iia", 4, prediction="x0", base="heun", shifts=shifts)
    assert plan.nfe == 7
    close(run(plan), x)


@pytest.mark.parametrize("base", ["dpmpp_2m", "dpm_solver"])
def test_second_order_steps_with_numbers_on_two_values_and_the_state(base):
    grid, x, before = make_grid(VP, 6), NOISE, None
    rng = np.random.default_rng(2)
    shifts = (0.1 * rng.normal(size=(6, 3))).tolist()
    shifts[0][2] = 0.0
    lam = [math.log(a / s) if s else math.inf for a, s in zip(grid.alphas, grid.sigmas, strict=True)]
    for i in range(6):
        (a, s), (b, r) = grid.level(i), grid.level(i + 1)
        h = lam[i + 1] - lam[i]
        value = MIXTURE.x0(x, a, s) if base == "dpmpp_2m" else eps_of(x, (a, s))
        used = value
        if 0 < i < 5:
            used = value + (value - before) / (2 * (lam[i] - lam[i - 1]) / h)
        if base == "dpmpp_2m":
            step = r / s * x - b * math.expm1(-h) * used
        elif r == 0.0:
            step = b / a * (x - s * used)
        else:
            step = b / a * x - r * math.expm1(h) * used
        state = step + shifts[i][0] * x + shifts[i][1] * value
        x, before = (state + shifts[i][2] * before if i else state), value
    close(run(make_plan(VP, "iia", 6, prediction="v", base=base, state=True, shifts=shifts)), x)


@pytest.mark.parametrize("base", ["ddim", "heun", "dpm_solver", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", [VP, EDM, NoiseSchedule.flow()], ids=["vp", "edm", "flow"])
def test_without_numbers_it_is_its_base_to_the_bit(schedule, base):
    for steps in (1, 2, 6):
        grid = make_grid(schedule, steps)
        want = solver_rows(base, grid, "x0", {}).steps
        assert solver_rows("iia", grid, "x0", {"base": base}).steps == want
        rows = [[0.0] * 4] * len(want)
        assert solver_rows("iia", grid, "x0", {"base": base, "depth": 2, "shifts": rows}).steps == want


# ---------------------------------------------------------------- calibration
def fine_ddim(x, start, end, parts):
    """DDIM in equal steps of lam; the last to sigma = 0 starts at the smallest trained level."""
    low, last = math.log(start[0] / start[1]), end[1] == 0.0
    high = VP.lam(0.0) if last else math.log(end[0] / end[1])
    lams = np.linspace(low, high, parts if last else parts + 1)
    levels = [(1 / math.sqrt(1 + math.exp(-2 * v)), 1 / math.sqrt(1 + math.exp(2 * v))) for v in lams]
    for now, then in zip(levels, [*levels[1:], end] if last else levels[1:], strict=False):
        eps = eps_of(x, now)
        x = then[0] / now[0] * (x - now[1] * eps) + then[1] * eps
    return x


def test_numbers_are_those_of_the_papers_least_squares():
    """beta = <z_fine - z_ddim, eps> / <eps, eps> over all samples and elements, each step from the corrected state."""
    table = calibrate_iia(problem(), steps=5, samples=20, substeps=7, target="local")
    grid, x, want = make_grid(VP, 5), problem().noise(range(20)), []
    for i in range(5):
        (a, s), (b, r) = grid.level(i), grid.level(i + 1)
        eps = eps_of(x, (a, s))
        coarse = b / a * (x - s * eps) + r * eps
        gap = fine_ddim(x, (a, s), (b, r), 7) - coarse
        want.append(float((gap * eps).sum() / (eps * eps).sum()))
        x = coarse + want[-1] * eps
    np.testing.assert_allclose(table.arrays["shifts"][:, 1], want, atol=1e-9)
    assert not table.arrays["shifts"][:, 0].any()
    assert (table.arrays["errors"][:, 1] <= table.arrays["errors"][:, 0]).all()


@pytest.mark.parametrize(
    ("base", "options"),
    [("ddim", {"depth": 1}), ("ddim", {"state": True}), ("dpmpp_2m", {}), ("dpm_solver", {}), ("heun", {})],
)
def test_a_fit_leaves_nothing_along_what_it_was_fitted_on(base, options):
    """The normal equations, seen from outside: no small change of a row's numbers brings its step nearer."""
    table = calibrate_iia(problem(), steps=4, samples=16, base=base, target="trajectory", evaluations=40, **options)
    shifts, own = table.arrays["shifts"], problem()
    free = {**options, "base": base}
    levels = [step.timestep for step in make_plan(VP, "iia", 4, prediction="v", base=base).steps]
    assert table.arrays["timesteps"].tolist() == levels
    want = own.run(own.plan("unipc", 40, grid="karras", order=3), range(16))

    def loss(numbers):
        got = own.run(own.plan("iia", 4, shifts=numbers.tolist(), **free), range(16))
        return float((got - want).square().mean())

    best = loss(shifts)
    for column in np.flatnonzero(shifts[-1]):
        for change in (-1e-3, 1e-3):
            other = shifts.copy()
            other[-1, column] += change
            assert loss(other) > best


@pytest.mark.parametrize("target", ["local", "trajectory"])
def test_numbers_help_samples_that_were_not_measured(target):
    own, held = problem(), range(64, 128)
    table = calibrate_iia(own, steps=6, samples=64, depth=1, target=target, evaluations=80)
    want = own.run(own.plan("unipc", 300, grid="karras", order=3), held)
    plain, fitted = own.run(own.plan("ddim", 6), held), own.run(own.plan("iia", 6, table=table), held)
    assert (fitted - want).square().mean() < (plain - want).square().mean()


def test_the_table_is_the_same_each_time_and_goes_on_from_a_file(tmp_path):
    options = {"steps": 4, "samples": 6, "substeps": 3, "base": "heun", "target": "local"}
    one = calibrate_iia(problem(), **options, resume=tmp_path / "work")
    told = []
    again = calibrate_iia(problem(), **options, resume=tmp_path / "work", progress=lambda *now: told.append(now))
    assert again.hash == one.hash == calibrate_iia(problem(), **options).hash
    assert told[-1] == ("rows", 7, 7)


def test_a_ridge_keeps_the_numbers_small():
    free = calibrate_iia(problem(), steps=5, samples=8, depth=1, target="local", substeps=4).arrays["shifts"]
    held = calibrate_iia(problem(), steps=5, samples=8, depth=1, target="local", substeps=4, ridge=0.1).arrays["shifts"]
    assert np.abs(held).max() < np.abs(free).max()


def test_a_grid_of_ones_own_is_given_by_its_timesteps():
    times = [999.0, 800.0, 500.0, 120.0]
    table = calibrate_iia(problem(), steps=4, samples=8, base="dpmpp_2m", timesteps=times, substeps=3)
    plan = make_plan(VP, "iia", 4, prediction="v", table=table, timesteps=times)
    assert [step.timestep for step in plan.steps] == times
    with pytest.raises(ArgumentError, match="measured on another grid; make the plan with timesteps=\\[999.0, "):
        make_plan(VP, "iia", 4, prediction="v", table=table)
    with pytest.raises(ArgumentError, match="give grid or timesteps, not both"):
        calibrate_iia(problem(), steps=4, timesteps=times, grid="karras")


# ---------------------------------------------------------------- recipes and files
@pytest.fixture(scope="module")
def table():
    return calibrate_iia(problem(), steps=6, samples=8, target="local", substeps=4, base="dpmpp_2m", state=True)


def test_a_plan_reads_back_and_is_made_again(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.save(path)
    plan = make_plan(VP, "iia", 6, prediction="v", table=path)
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan and back.hash == plan.hash and back.again() == plan
    assert json.loads((tmp_path / "plan.json").read_text())["recipe"]["arguments"]["table"]["sha256"] == table.hash
    with pytest.raises(ArgumentError, match="for 6 steps, the plan has 8"):
        back.again(steps=8)


@pytest.mark.parametrize("base", ["dpmpp_2m", "heun"])
def test_a_tail_keeps_the_numbers_of_its_rows(base):
    made = calibrate_iia(problem(), steps=6, samples=8, target="local", substeps=4, base=base)
    full = make_plan(VP, "iia", 6, prediction="v", table=made)
    tail = full.tail(0.5)
    grid, rows = make_grid(VP, 6).tail(3), len(tail.steps)
    shifts = made.arrays["shifts"][-rows:].tolist()
    if base == "dpmpp_2m":
        shifts[0] = [0.0] * 3  # it was fitted with a value that the tail has not
    assert tail.steps == solver_rows("iia", grid, "v", {"base": base, "shifts": shifts}).steps


def test_a_table_is_of_one_model_one_method_and_one_grid(table):
    plan = make_plan(VP, "iia", 6, prediction="v", table=table)
    with pytest.raises(ModelError, match="iia: measured on model callable"):
        plan.bind(ModelSpec("other", "f" * 64, "v", (2,), 1, ()))
    with pytest.raises(ModelError, match="measured for 'iia', not for 'dc_solver'"):
        make_plan(VP, "dc_solver", 6, prediction="v", table=table)
    with pytest.raises(ArgumentError, match="measured on another grid"):
        make_plan(VP, "iia", 6, prediction="v", table=table, grid="karras")
    with pytest.raises(ArgumentError, match="base='ddim', but the table was measured with 'dpmpp_2m'"):
        make_plan(VP, "iia", 6, prediction="v", table=table, base="ddim")
    with pytest.raises(ArgumentError, match="a table or shifts, not both"):
        make_plan(VP, "iia", 6, prediction="v", table=table, shifts=[[0.0] * 3] * 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "unipc"}, "base: unknown 'unipc'"),
        ({"depth": 4}, r"depth must be an integer in 0\.\.3"),
        ({"state": 1}, "state must be True or False"),
        ({"shifts": [[0.0, 0.0]] * 3}, "shifts for 3 rows, the plan has 4"),
        ({"shifts": [[0.0]] * 4}, r"shifts\[0\] is \[0.0\]; 2 finite numbers"),
        ({"shifts": [[0.0, float("inf")]] * 4}, "2 finite numbers"),
        ({"shifts": [[0.0, 0.0, 0.5]] * 4, "depth": 1}, r"shifts\[0\] moves a value that the row has not"),
        ({"shifts": [[0.0, 0.5, 0.0]] * 7, "base": "heun"}, r"shifts\[0\] moves a value"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_plan(VP, "iia", 4, prediction="v", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"samples": 0}, "samples must be"),
        ({"substeps": 0}, "substeps must be"),
        ({"target": "final"}, "target: unknown"),
        ({"fine": "nothing"}, "fine: unknown"),
        ({"ridge": -1}, "ridge must be"),
        ({"base": "unipc"}, "base: unknown"),
        ({"target": "trajectory", "evaluations": 2}, "4 or more"),
    ],
)
def test_bad_calibrations_are_told(options, message):
    with pytest.raises(ArgumentError, match=message):
        calibrate_iia(problem(), **options)


@pytest.mark.parametrize("target", ["local", "trajectory"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    ("schedule", "prediction"), [(NoiseSchedule.flow(3.0, timestep_scale=1000.0), "flow"), (EDM, "x0")]
)
def test_flows_and_edm_are_fitted_too(schedule, prediction, final, target):
    """From pure noise, where lam is infinite, and to it."""
    own, held = problem(schedule, prediction), range(32, 64)
    table = calibrate_iia(own, steps=5, samples=32, depth=1, final=final, target=target, evaluations=60)
    want = own.run(own.plan("unipc", 200, grid="karras", order=3), held)
    plain, fitted = (
        own.run(own.plan(*what, final=final, **rest), held)
        for what, rest in ((("ddim", 5), {}), (("iia", 5), {"table": table}))
    )
    assert (fitted - want).square().mean() < (plain - want).square().mean()
