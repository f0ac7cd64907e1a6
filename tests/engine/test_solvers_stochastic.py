"""Stochastic solvers on a Gaussian: exact moments of the plan, their limit, and samples that have them."""

import math

import numpy as np
import pytest
import torch

from tests.engine.interpreter import Gaussian, run_plan
from vivace.bench import oracle
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.timesteps import make_grid

EDM = NoiseSchedule.edm(0.02, 50.0)
DATA = Gaussian(np.array([0.4, -1.1]), np.sqrt(np.array([0.3, 1.5])))

# solver, options, weak order of the variance as steps grow
CASES = [
    ("ddim", {"eta": 0.5}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "fixed_large"}, 1),
    ("euler", {"s_churn": 20.0, "s_tmin": 0.1, "s_tmax": 10.0}, 1),
    ("euler_ancestral", {}, 1),
    ("euler_ancestral", {"eta": 0.6}, 1),
    ("heun", {"s_churn": 20.0, "s_tmin": 0.1, "s_tmax": 10.0}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"eta": 0.5}, 2),
    ("dpmpp_2m_sde", {"variant": "heun"}, 2),
]


def moments(plan):
    """Mean and variance [2] of the result. A linear denoiser makes it affine in the draws: one response a draw."""
    draws = sorted({int(s[6:]) for op in plan.ops() for s, _ in op.terms if s.startswith("noise:")})
    place = {k: n + 1 for n, k in enumerate(draws)}

    def one_hot(k):
        value = np.zeros((len(draws) + 1, 2))
        value[place[k]] = 1.0
        return value

    out = run_plan(plan, DATA.denoiser(plan), one_hot(0), draw=one_hot)
    return out[0], ((out[1:] - out[0]) ** 2).sum(0)


@pytest.mark.parametrize(("solver", "options", "order"), CASES)
def test_moments_approach_those_of_the_data(solver, options, order):
    """The error of the variance falls with the steps at least as fast as its order says."""
    errors = []
    for steps in (200, 400):
        plan = make_plan(EDM, solver, steps, grid="logsnr", **options)
        mean, variance = moments(plan)
        np.testing.assert_allclose(mean, DATA.mean, atol=0.03)  # what the start at sigma = 50 leaves out, and 1 / steps
        errors.append(np.abs(variance / DATA.std**2 - 1.0).max())
    assert errors[1] < 0.06 * (1.0 if order == 1 else 0.1)
    assert errors[1] < errors[0] * 2.0 ** (0.4 - order) or errors[1] < 2e-3


SAMPLES = 20_000


@pytest.mark.parametrize(("solver", "options", "order"), CASES)
def test_samples_have_the_moments_of_their_plan(solver, options, order):
    """Mean, variance and covariance of 20,000 samples lie within 4.5 standard errors of the exact moments."""
    plan = make_plan(EDM, solver, 24, grid="logsnr", **options)
    mean, variance = moments(plan)
    data = oracle.Gaussian(torch.as_tensor(DATA.mean), torch.as_tensor(DATA.std**2))
    noise = torch.from_numpy(np.random.default_rng(7).normal(size=(1, SAMPLES, 2)))
    got = sample(oracle.denoiser_for(data, plan), plan, noise, seed=11)[0].numpy()
    unit = (got - mean) / np.sqrt(variance)
    bound = 4.5 / math.sqrt(SAMPLES)
    assert np.abs(unit.mean(0)).max() < bound
    assert np.abs((unit**2).mean(0) - 1.0).max() < bound * math.sqrt(2.0)
    assert abs((unit[:, 0] * unit[:, 1]).mean()) < bound
    # Neighbours in memory share a Philox word pair: they must not be correlated either.
    assert np.abs((unit[1:] * unit[:-1]).mean(0)).max() < bound


def test_the_statistical_bound_can_fail():
    """Noise 5% too strong, or one draw used twice, moves the variance by more than the bound."""
    right = moments(make_plan(EDM, "euler_ancestral", 24, grid="logsnr"))[1]
    wrong = moments(make_plan(EDM, "euler_ancestral", 24, grid="logsnr", s_noise=1.05))[1]
    assert (wrong / right - 1.0).min() > 4.5 * math.sqrt(2.0 / SAMPLES)


def test_two_seeds_differ_and_one_repeats():
    plan = make_plan(EDM, "ddpm", 5)
    data = oracle.Gaussian(torch.as_tensor(DATA.mean), torch.as_tensor(DATA.std**2))
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 2)))
    one, same, two = (sample(oracle.denoiser_for(data, plan), plan, noise, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, two)


@pytest.mark.parametrize("kind", ["vp", "edm", "flow"])
@pytest.mark.parametrize("solver", ["ddpm", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_point_mass_keeps_its_marginals(kind, solver):
    """From the marginal at the first level every level's marginal follows: mean alpha x0, deviation sigma."""
    schedule = {"vp": NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000)), "edm": EDM, "flow": NoiseSchedule.flow()}[kind]
    plan = make_plan(schedule, solver, 6, prediction="v", grid="logsnr", final="sigma_min")
    grid = make_grid(schedule, 6, grid="logsnr", final="sigma_min")
    point = Gaussian(np.full(1, 0.3), np.zeros(1))
    draws = sorted({int(s[6:]) for op in plan.ops() for s, _ in op.terms if s.startswith("noise:")})
    scale = dict(plan.init[0].terms)["noise:0"]
    alpha, sigma = grid.level(0)
    first = np.full((len(draws) + 1, 1), alpha * 0.3 / scale)
    first[1] += sigma / scale

    def one_hot(k):
        value = np.zeros((len(draws) + 1, 1))
        value[1 + draws.index(k)] = 1.0
        return value

    out = run_plan(plan, point.denoiser(plan), first, draw=one_hot)
    assert out[0] == pytest.approx(grid.alphas[6] * 0.3, rel=1e-9)
    assert math.sqrt(((out[1:] - out[0]) ** 2).sum()) == pytest.approx(grid.sigmas[6], rel=1e-9)


def test_strength_zero_of_the_noise_is_the_deterministic_method():
    for stochastic, options, plain in (
        ("ddim", {"eta": 0.0}, ("ddim", {})),
        ("euler_ancestral", {"eta": 0.0}, ("ddim", {})),
        ("dpmpp_2m_sde", {"eta": 0.0}, ("dpmpp_2m", {})),
        ("heun", {"s_churn": 0.0}, ("heun", {})),
    ):
        one, two = make_plan(EDM, stochastic, 6, **options), make_plan(EDM, plain[0], 6, **plain[1])
        assert one.steps == two.steps
    small, large = make_plan(EDM, "ddpm", 6), make_plan(EDM, "ddim", 6, eta=1.0)
    for a, b in zip(small.steps, large.steps, strict=True):
        got, want = dict(a.ops[-1].terms), dict(b.ops[-1].terms)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-13)
