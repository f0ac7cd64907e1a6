"""Score calibration: the mean of a network's error, measured and taken off, against a plain loop."""

import math

import numpy as np
import pytest
import torch

from vivace.bench import oracle
from vivace.engine import tables
from vivace.engine.calibrate.mean_score import calibrate_score_calibration
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.noise import normals
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance, apply_score_calibration
from vivace.engine.plan import Plan, TensorRef, coefs
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.timesteps import make_grid
from vivace.errors import ArgumentError, ModelError, PlanError, ShapeError

EDM = NoiseSchedule.edm(math.exp(-4.0), math.exp(4.0))
FLOW = NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(16, 2)))
END = {"grid": "logsnr", "final": "sigma_min"}


def table_of(lams, scale=0.05, branches=("cond",), **changes):
    draw = np.random.default_rng(8)
    arrays = {"lam": np.asarray(lams, np.float64)}
    arrays |= {name: scale * draw.normal(size=(len(lams), 2)) for name in branches}
    return CalibrationTable(
        tables.KIND, "callable", {**arrays, **changes}, {"method": "score_calibration", "latent_shape": [2]}
    )


def wrong(schedule, prediction):
    """The oracle's denoiser with an error that has a mean: for eps, a constant by time and element."""
    exact = oracle.schedule_denoiser(SEVEN, schedule, prediction)
    return lambda x, t: exact(x, t) + error_at(t)


def error_at(t):
    return 0.1 * torch.stack((torch.cos(t), torch.sin(t)), dim=-1)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "dpm_solver_v3"])
def test_a_loop_that_subtracts_the_mean_from_eps(solver):
    steps = 6
    plan = make_plan(EDM, solver, steps, prediction="eps", **END)
    table = table_of([step.lam for step in plan.steps])
    made = apply_score_calibration(plan, table)
    got = sample(oracle.schedule_denoiser(SEVEN, EDM, "eps"), made, NOISE)
    means = {step.timestep: table.arrays["cond"][row] for row, step in enumerate(plan.steps)}

    def calibrated(x, t):
        return oracle.schedule_denoiser(SEVEN, EDM, "eps")(x, t) - torch.as_tensor(means[float(t[0])])

    np.testing.assert_allclose(got, sample(calibrated, plan, NOISE), rtol=0, atol=1e-12)
    if solver != "ddim":
        return
    grid, x = make_grid(EDM, steps, **END), plan.init[0].terms[0][1] * NOISE.numpy()
    for i in range(steps):
        (a, s), (b, r) = grid.level(i), grid.level(i + 1)
        eps = oracle.prediction_of(SEVEN, "eps", torch.as_tensor(x), a, s).numpy() - table.arrays["cond"][i]
        x = b * (x - s * eps) / a + r * eps
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)


def test_every_branch_has_its_own_mean():
    plan = apply_guidance(make_plan(EDM, "dpmpp_2m", 5, **END), 3.0)
    table = table_of([step.lam for step in plan.steps], branches=("cond", "uncond"))
    wide = oracle.Gaussian(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    exact = {
        "cond": oracle.schedule_denoiser(SEVEN, EDM, "eps"),
        "uncond": oracle.schedule_denoiser(wide, EDM, "eps"),
    }
    rows = {step.timestep: row for row, step in enumerate(plan.steps)}

    def calibrated(x, t, branch):
        return exact[branch](x, t) - torch.as_tensor(table.arrays[branch][rows[float(t[0])]])

    got = sample(lambda x, t, branch: exact[branch](x, t), apply_score_calibration(plan, table), NOISE)
    np.testing.assert_allclose(got, sample(calibrated, plan, NOISE), rtol=0, atol=1e-12)


def test_a_mean_of_zero_changes_no_row():
    plan = make_plan(EDM, "unipc", 6, **END)
    made = apply_score_calibration(plan, table_of([-4.0, 4.0], scale=0.0))
    assert made.steps == plan.steps and made.init == plan.init and not made.tensors
    assert made.recipe.passes[-1][0] == "apply_score_calibration"


def test_one_mean_for_all_elements_is_a_number():
    plan = make_plan(EDM, "ddim", 3, **END)
    made = apply_score_calibration(plan, table_of([0.0], cond=np.full((1, 2), 0.25)))
    assert not made.tensors
    assert [dict(step.ops[0].terms) for step in made.steps] == [{"out": 1.0, "one": -0.25}] * 3


def test_between_log_snrs_the_mean_is_linear_and_beyond_them_constant():
    plan = make_plan(EDM, "ddim", 8, **END)
    table = table_of([-1.0, 1.0])
    made = apply_score_calibration(plan, table)
    low, high = table.arrays["cond"]
    for row, step in enumerate(plan.steps):
        share = min(max((step.lam + 1.0) / 2.0, 0.0), 1.0)
        want = (1.0 - share) * low + share * high
        np.testing.assert_allclose(-made.arrays[f"score_calibration.{row}.cond"], want, atol=1e-15)


def test_a_row_from_pure_noise_stays():
    plan = make_plan(FLOW, "dpmpp_2m", 4, prediction="flow")
    made = apply_score_calibration(plan, table_of([-2.0, 2.0]))
    assert made.steps[0] == plan.steps[0] and made.steps[1] != plan.steps[1]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_the_mean_is_that_of_the_networks_error_over_noised_data(prediction):
    network, data, count = wrong(EDM, prediction), _draws(512), 512
    problem = Problem.of_callable(network, EDM, prediction, (2,), seed=2)
    table = calibrate_score_calibration(problem, steps=6, grid="logsnr", samples=count, data=data)
    z = np.stack([normals((2,), 2, picture=j, draw=1) for j in range(count)]).astype(np.float64)
    for lam, mean in zip(table.arrays["lam"], table.arrays["cond"], strict=True):
        sigma = math.exp(-lam)
        target = {"eps": z, "x0": data, "v": z - sigma * data, "flow": z - data}[prediction]
        out = network(torch.as_tensor(data + sigma * z), torch.full((count,), sigma, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(mean, (out - target).mean(0), rtol=0, atol=1e-9 * np.abs(out).max())
        spread = (out - target).std(0) / math.sqrt(count)
        assert (np.abs(mean - error_at(torch.tensor(sigma)).numpy()) <= 5.0 * spread).all()


def _draws(count):
    draw = np.random.default_rng(1)
    mode = draw.choice(7, size=count, p=SEVEN.weights.numpy())
    return SEVEN.means.numpy()[mode] + SEVEN.deviations.numpy()[mode, None] * draw.normal(size=(count, 2))


def test_calibration_is_deterministic_resumes_and_tells(tmp_path):
    problem = Problem.of_callable(wrong(EDM, "eps"), EDM, "eps", (2,), seed=2)
    told = []
    once = calibrate_score_calibration(problem, steps=3, samples=8, progress=lambda *now: told.append(now))
    assert told == [("log-SNRs", n, 3) for n in range(4)]
    again = calibrate_score_calibration(problem, steps=3, samples=8, resume=tmp_path / "work")
    counted = Problem.of_callable(lambda x, t: pytest.fail("evaluated"), EDM, "eps", (2,), seed=2)
    resumed = calibrate_score_calibration(counted, steps=3, samples=8, resume=tmp_path / "work")
    assert once.hash == again.hash == resumed.hash
    with pytest.raises(ArgumentError, match="another calibration"):
        calibrate_score_calibration(counted, steps=4, samples=8, resume=tmp_path / "work")


def test_guided_problems_give_both_branches():
    shifts = {"cond": 0.5, "uncond": -0.25}
    exact = oracle.schedule_denoiser(SEVEN, EDM, "eps")
    problem = Problem.of_callable(lambda x, t, branch: exact(x, t) + shifts[branch], EDM, "eps", (2,), guidance=4.0)
    table = calibrate_score_calibration(problem, steps=2, samples=16, data=_draws(16))
    np.testing.assert_allclose(table.arrays["cond"] - table.arrays["uncond"], 0.75, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error"), [({"samples": 1}, ArgumentError), ({"data": np.zeros((4, 3)), "samples": 4}, ShapeError)]
)
def test_bad_calibrations_are_refused(options, error):
    problem = Problem.of_callable(wrong(EDM, "eps"), EDM, "eps", (2,))
    with pytest.raises(error, match="calibrat"):
        calibrate_score_calibration(problem, steps=2, **options)


def test_what_the_pass_refuses():
    plan = make_plan(EDM, "ddim", 3, **END)
    table = table_of([0.0])
    made = apply_score_calibration(plan, table)
    with pytest.raises(PlanError, match="calibrated already"):
        apply_score_calibration(made, table)
    with pytest.raises(PlanError, match="'uncond'"):
        apply_score_calibration(apply_guidance(plan, 2.0), table)
    for changes in ({"cond": np.zeros((2, 2))}, {"lam": np.zeros(0)}, {"cond": np.full((1, 2), np.nan)}):
        with pytest.raises(ModelError, match="calibrate again"):
            apply_score_calibration(plan, table_of([0.0], **changes))
    other = CalibrationTable(tables.KIND, "callable", dict(table.arrays), {"method": "dc_solver"})
    with pytest.raises(ModelError, match="dc_solver"):
        apply_score_calibration(plan, other)
    with pytest.raises(ArgumentError, match="table is int"):
        apply_score_calibration(plan, 3)


def test_files_tails_and_plans_made_again(tmp_path):
    table = table_of(np.linspace(-4.0, 4.0, 9))
    table.save(tmp_path / "table.safetensors")
    plan = apply_score_calibration(make_plan(EDM, "unipc", 8, **END), tmp_path / "table.safetensors")
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.hash == plan.hash
    denoiser = oracle.schedule_denoiser(SEVEN, EDM, "eps")
    assert torch.equal(sample(denoiser, loaded, NOISE), sample(denoiser, plan, NOISE))
    assert plan.again() == plan
    tail = plan.tail(0.5)
    assert len(tail.steps) == 4 and sum(isinstance(c, TensorRef) for s in tail.steps for op in s.ops for c in coefs(op))
    for row in range(4):
        key = f"score_calibration.{row}.cond"
        np.testing.assert_array_equal(tail.arrays[key], plan.arrays[f"score_calibration.{row + 4}.cond"])
