"""The gradient-estimation sampler against its paper, its reductions, its moments, per-token history, and refusals."""

import numpy as np
import pytest
import torch

from tests.engine.interpreter import Gaussian, run_plan
from vivace.bench import oracle
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance, apply_tokens
from vivace.engine.plan import AgeRef, Plan, coefs
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.errors import ArgumentError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.02, 20.0)
FLOW = NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(16, 2)))
DATA = Gaussian(np.array([0.4, -1.1]), np.sqrt(np.array([0.3, 1.5])))


def transcribed(levels, gamma, x):
    """Algorithm 2 in y = x / alpha: the estimate of the gradient, then the step down in rho."""
    before = None
    for (alpha, sigma), (alpha_end, sigma_end) in zip(levels, levels[1:], strict=False):
        y, rho, rho_end = x / alpha, sigma / alpha, sigma_end / alpha_end
        eps = (x - alpha * SEVEN.x0(x, alpha, sigma)) / sigma
        estimate = eps if before is None or sigma_end == 0.0 else gamma * eps + (1.0 - gamma) * before
        before = eps
        x = alpha_end * (y - (rho - rho_end) * estimate)
    return x


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 2.4])
def test_it_is_the_loop_of_the_paper(gamma, final):
    for schedule, prediction in ((VP, "v"), (VP, "eps"), (EDM, "x0")):
        plan = make_plan(schedule, "gradient_estimation", 9, prediction=prediction, gamma=gamma, final=final)
        got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE)
        end = (1.0, 0.0) if final == "zero" else (schedule.alpha(schedule.data_end), schedule.sigma(schedule.data_end))
        levels = [*((step.alpha, step.sigma) for step in plan.steps), end]
        want = transcribed(levels, gamma, NOISE * (levels[0][1] if schedule is EDM else 1.0))
        assert float((got - want).abs().max()) < 1e-10


def test_its_rows_are_those_of_known_solvers_at_known_gammas():
    for schedule, prediction in ((VP, "eps"), (EDM, "x0"), (FLOW, "flow")):

        def made(solver, prediction=prediction, schedule=schedule, **options):
            return make_plan(schedule, solver, 8, prediction=prediction, **options)

        assert made("gradient_estimation", gamma=1.0).steps == made("ipndm", order=1).steps, "DDIM in eps form"
        assert made("gradient_estimation", gamma=1.5).steps == made("ipndm", order=2).steps
    plan, plain = (make_plan(VP, name, 8, prediction="v") for name in ("gradient_estimation", "ddim"))
    plan = plan.again(gamma=1.0)
    results = [sample(oracle.denoiser_for(SEVEN, p), p, NOISE) for p in (plan, plain)]
    assert float((results[0] - results[1]).abs().max()) < 1e-12


def moments(plan):
    """Mean and variance [2] of the result: a linear denoiser makes it affine in the draws."""
    draws = sorted({int(s[6:]) for op in plan.ops() for s, _ in op.terms if s.startswith("noise:")})
    place = {k: n + 1 for n, k in enumerate(draws)}

    def one_hot(k):
        value = np.zeros((len(draws) + 1, 2))
        value[place[k]] = 1.0
        return value

    out = run_plan(plan, DATA.denoiser(plan), one_hot(0), draw=one_hot)
    return out[0], ((out[1:] - out[0]) ** 2).sum(0)


def test_half_noise_without_extrapolation_is_ddpm():
    for schedule, prediction in ((VP, "eps"), (EDM, "x0"), (FLOW, "flow")):
        noisy = make_plan(schedule, "gradient_estimation", 7, prediction=prediction, gamma=1.0, mu=0.5)
        plain = make_plan(schedule, "ddpm", 7, prediction=prediction)
        for got, want in zip(moments(noisy), moments(plain), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_noise_of_a_step_is_what_its_mu_says():
    """rho' = rho^mu rho_p^(1 - mu): the step goes down to rho_p, noise leads up to rho'."""
    mu = 0.3
    plan = make_plan(EDM, "gradient_estimation", 6, prediction="x0", mu=mu)
    for step, after in zip(plan.steps, plan.steps[1:], strict=False):
        inner = (after.sigma / step.sigma**mu) ** (1.0 / (1.0 - mu))
        terms = dict(step.ops[-1].terms)
        fresh = next(coef for slot, coef in terms.items() if slot.startswith("noise:"))
        assert fresh == pytest.approx(np.sqrt(after.sigma**2 - inner**2), rel=1e-12)
    assert not any(slot.startswith("noise") for slot, _ in plan.steps[-1].ops[-1].terms)


@pytest.mark.parametrize("options", [{"mu": 0.5, "gamma": 1.0}, {"mu": 0.2, "gamma": 1.0}, {"mu": 0.5, "gamma": 2.0}])
def test_samples_have_the_mean_and_variance_of_the_data(options):
    """The plan's exact moments approach the data's; 20,000 samples have them within 4.5 standard errors."""
    errors = []
    for steps in (100, 400):
        mean, variance = moments(make_plan(EDM, "gradient_estimation", steps, grid="logsnr", **options))
        np.testing.assert_allclose(mean, DATA.mean, atol=0.08)
        errors.append(np.abs(variance / DATA.std**2 - 1.0).max())
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.08
    plan = make_plan(EDM, "gradient_estimation", 24, grid="logsnr", **options)
    mean, variance = moments(plan)
    data = oracle.Gaussian(torch.as_tensor(DATA.mean), torch.as_tensor(DATA.std**2))
    noise = torch.from_numpy(np.random.default_rng(7).normal(size=(1, 20_000, 2)))
    unit = (sample(oracle.denoiser_for(data, plan), plan, noise, seed=11)[0].numpy() - mean) / np.sqrt(variance)
    bound = 4.5 / np.sqrt(20_000)
    assert np.abs(unit.mean(0)).max() < bound
    assert np.abs((unit**2).mean(0) - 1.0).max() < bound * np.sqrt(2.0)


def test_plans_survive_files_tails_and_other_step_counts(tmp_path):
    plan = apply_guidance(make_plan(VP, "gradient_estimation", 10, prediction="v", mu=0.25), 4.0)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.tail(0.5).nfe == 5 and plan.again(gamma=1.5, mu=None).nfe == 10


def test_tokens_have_a_history_of_their_own():
    plan = apply_tokens(make_plan(VP, "gradient_estimation", 12, prediction="v"), 0.5)
    assert any(isinstance(coef, AgeRef) for op in plan.ops() for coef in coefs(op))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, r"gradient_estimation: gamma must be a number in \[0, 4\]"),
        ({"gamma": "2"}, "gradient_estimation: gamma"),
        ({"mu": 1.0}, "gradient_estimation: mu must be below 1"),
        ({"mu": float("nan")}, "gradient_estimation: mu"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_plan(VP, "gradient_estimation", 5, **options)
