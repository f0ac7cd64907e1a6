"""Empirical model statistics: against derivatives by autograd, against closed forms, and what calibration promises."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import jvp

from vivace.bench import oracle
from vivace.engine.calibrate import statistics
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.statistics import calibrate_dpm_solver_v3
from vivace.engine.noise import normals
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.errors import ArgumentError, ShapeError

EDM, FLOW = NoiseSchedule.edm(math.exp(-4.0), math.exp(4.0)), NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()


def problem_of(data, schedule, prediction="eps", **options):
    return Problem.of_callable(
        oracle.schedule_denoiser(data, schedule, prediction), schedule, prediction, (2,), **options
    )


def level(schedule, lam):
    return (1.0, math.exp(-lam)) if schedule is EDM else (1 / (1 + math.exp(-lam)), 1 / (1 + math.exp(lam)))


def by_autograd(data, schedule, lams, x0, z, signs):
    """l, s, b over the samples: exact directional derivatives, least squares a element."""

    def eps(x, lam):
        alpha, sigma = (1.0, torch.exp(-lam)) if schedule is EDM else (torch.sigmoid(lam), torch.sigmoid(-lam))
        return (x - alpha * data.x0(x, alpha, sigma)) / sigma

    rows = []
    for lam in lams:
        alpha, sigma = level(schedule, lam)
        at, x = torch.tensor(lam, dtype=torch.float64), alpha * x0 + sigma * z
        _, jv = jvp(lambda x, at=at: eps(x, at), (x,), (signs,))
        e = eps(x, at)
        slope = 0.0 if schedule is EDM else 1.0 - alpha  # d log alpha / d lam
        _, change = jvp(eps, (x, at), (slope * x - sigma * e, torch.ones_like(at)))
        rows.append((alpha, sigma, x, e, change, (sigma * jv * signs).mean(0)))
    linear = torch.stack([row[-1] for row in rows]).numpy()
    tilt = np.gradient(linear, lams, axis=0)
    s, b = np.zeros_like(linear), np.zeros_like(linear)
    for n, (alpha, sigma, x, e, change, _) in enumerate(rows):
        f = ((sigma * e - torch.as_tensor(linear[n]) * x) / alpha).numpy()
        first = sigma / alpha * ((torch.as_tensor(linear[n]) - 1.0) * e + change) - torch.as_tensor(tilt[n]) * x / alpha
        for k in range(2):
            fit = np.linalg.lstsq(np.stack((f[:, k], np.ones(len(f))), axis=1), first.numpy()[:, k], rcond=None)[0]
            s[n, k], b[n, k] = fit
    return {"l": linear, "s": s, "b": b}


@pytest.mark.parametrize(("schedule", "prediction"), [(EDM, "eps"), (EDM, "v"), (FLOW, "flow")])
def test_differences_find_what_autograd_finds(schedule, prediction, monkeypatch):
    monkeypatch.setattr(statistics, "PROBE", 1e-4)
    monkeypatch.setattr(statistics, "STRIDE", 1e-4)
    count = 64
    draw = np.random.default_rng(4)
    x0 = SEVEN.means[draw.integers(0, 7, count)] + 0.2 * torch.as_tensor(draw.normal(size=(count, 2)))
    problem = problem_of(SEVEN, schedule, prediction, seed=9)
    table = calibrate_dpm_solver_v3(problem, nodes=7, samples=count, data=x0)
    z, signs = (torch.as_tensor(np.stack([normals((2,), 9, picture=j, draw=d) for j in range(count)])) for d in (1, 2))
    signs = torch.where(signs < 0, -1.0, 1.0).double()
    lams = table.arrays["lam"]
    want = by_autograd(SEVEN, schedule, lams.tolist(), x0, z.double(), signs)
    inner = slice(1, -1)  # at the ends the difference is one-sided
    np.testing.assert_allclose(table.arrays["l"], want["l"], rtol=0, atol=1e-6)
    for name in ("s", "b"):
        scale = max(1.0, float(np.abs(want[name]).max()))
        np.testing.assert_allclose(table.arrays[name][inner], want[name][inner], rtol=0, atol=1e-5 * scale)


def test_a_gaussian_has_statistics_in_closed_form():
    data = oracle.Gaussian(
        torch.tensor([0.4, -1.0], dtype=torch.float64), torch.tensor([0.5, 1.2], dtype=torch.float64)
    )
    table = calibrate_dpm_solver_v3(problem_of(data, EDM), nodes=21, samples=8)
    square = np.exp(-2.0 * table.arrays["lam"])[:, None]
    np.testing.assert_allclose(table.arrays["l"], square / (square + data.variance.numpy()), rtol=1e-9)


def test_statistics_lower_the_error_of_first_order_rows():
    problem = problem_of(SEVEN, EDM, seed=3)
    table = calibrate_dpm_solver_v3(problem, nodes=21, samples=128)
    judged = range(1000, 1064)
    ends = {"grid": "logsnr", "final": "sigma_min"}
    want = problem.run(problem.plan("unipc", 200, order=3, **ends), judged)

    def error(**options):
        plan = problem.plan("dpm_solver_v3", 20, order=1, corrector="none", **ends, **options)
        return float((problem.run(plan, judged) - want).square().mean())

    assert error(table=table) < error()


def test_calibration_is_deterministic_resumes_and_tells(tmp_path):
    told = []
    options = {"nodes": 3, "samples": 4}
    once = calibrate_dpm_solver_v3(problem_of(SEVEN, EDM), **options, progress=lambda *now: told.append(now))
    assert told == [("log-SNRs", n, 3) for n in range(4)]
    again = calibrate_dpm_solver_v3(problem_of(SEVEN, EDM), **options, resume=tmp_path / "work")
    unused = Problem.of_callable(lambda x, t: pytest.fail("evaluated"), EDM, "eps", (2,))
    resumed = calibrate_dpm_solver_v3(unused, **options, resume=tmp_path / "work")
    assert once.hash == again.hash == resumed.hash
    shared = calibrate_dpm_solver_v3(unused, **options, share="all", resume=tmp_path / "work")
    assert all((shared.arrays[name] == shared.arrays[name][:, :1]).all() for name in ("l", "s", "b"))
    with pytest.raises(ArgumentError, match="another calibration"):
        calibrate_dpm_solver_v3(unused, nodes=4, samples=4, resume=tmp_path / "work")
    assert calibrate_dpm_solver_v3(problem_of(SEVEN, EDM, seed=1), **options).hash != once.hash


def test_five_evaluations_a_sample_and_log_snr_three_with_l_fixed():
    count = 0

    def network(x, t):
        nonlocal count
        count += len(x)
        return torch.tanh(x)

    problem = Problem.of_callable(network, EDM, "eps", (2,))
    data = np.zeros((6, 2))
    calibrate_dpm_solver_v3(problem, nodes=4, samples=6, data=data)
    assert count == 5 * 4 * 6
    table = calibrate_dpm_solver_v3(problem, nodes=4, samples=6, data=data, fixed_l=1.0)
    assert count == (5 + 3) * 4 * 6 and (table.arrays["l"] == 1.0).all()
    assert table.metadata["method"] == "dpm_solver_v3" and table.metadata["latent_shape"] == [2]


def test_data_where_everything_is_the_same_gives_no_slope():
    problem = Problem.of_callable(lambda x, t: 0.0 * x + 0.5, EDM, "eps", (2,))
    table = calibrate_dpm_solver_v3(problem, nodes=4, samples=6)
    assert all(np.isfinite(array).all() for array in table.arrays.values()) and np.abs(table.arrays["s"]).max() < 0.01


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"nodes": 1}, ArgumentError),
        ({"samples": 1}, ArgumentError),
        ({"share": "row"}, ArgumentError),
        ({"fixed_l": "1"}, ArgumentError),
        ({"fixed_l": math.inf}, ArgumentError),
        ({"samples": 4, "data": np.zeros((3, 2))}, ShapeError),
    ],
)
def test_bad_input_is_refused_before_work(options, error):
    problem = Problem.of_callable(lambda x, t: pytest.fail("evaluated"), EDM, "eps", (2,))
    with pytest.raises(error):
        calibrate_dpm_solver_v3(problem, **options)
