"""The exponential and beta grids, the beta quantile, and the shift with resolution."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.planning import make_plan
from vivace.engine.timesteps import beta_quantile, make_grid, resolution_shift
from vivace.errors import ArgumentError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm()
FLOW = NoiseSchedule.flow(shift=3.0, timestep_scale=1000.0)


@pytest.mark.parametrize(
    ("a", "b", "inverse"),
    [
        (1.0, 1.0, lambda p: p),
        (0.5, 0.5, lambda p: np.sin(np.pi * p / 2) ** 2),
        (0.5, 1.0, lambda p: p**2),
        (1.0, 0.5, lambda p: 1 - (1 - p) ** 2),
        (3.0, 1.0, lambda p: p ** (1 / 3)),
        (1.0, 2.5, lambda p: 1 - (1 - p) ** (1 / 2.5)),
    ],
)
def test_beta_quantile_where_it_is_elementary(a, b, inverse):
    p = np.linspace(0.0, 1.0, 101)
    np.testing.assert_allclose(beta_quantile(p, a, b), inverse(p), rtol=0, atol=1e-12)


@given(st.floats(0.01, 0.99), st.floats(0.3, 4.0))
def test_beta_quantile_is_symmetric(p, a):
    one, two = beta_quantile(np.array([p, 1.0 - p]), a, a)
    assert one + two == pytest.approx(1.0, abs=1e-9)


def test_beta_quantile_of_the_grid():
    """I_x(0.6, 0.6) by integration in theta, x = sin^2(theta), gives the shares back."""
    p = np.array([0.05, 0.25, 0.5, 0.8, 0.99])
    nodes, masses = np.polynomial.legendre.leggauss(400)
    for share, x in zip(p, beta_quantile(p, 0.6, 0.6), strict=True):
        top = x**0.6  # u = s^a takes the singularity at 0 away
        u = 0.5 * top * (nodes + 1)
        total = 0.5 * top * masses @ (1 - u ** (1 / 0.6)) ** -0.4 / 0.6
        whole = math.gamma(0.6) ** 2 / math.gamma(1.2)
        assert total / whole == pytest.approx(share, abs=2e-6 if x > 0.99 else 1e-9)


def test_exponential_is_even_in_log_sigma():
    for schedule in (VP, EDM):
        np.testing.assert_allclose(
            make_grid(schedule, 9, grid="exponential").sigmas, make_grid(schedule, 9, grid="logsnr").sigmas, rtol=1e-14
        )
    grid = make_grid(FLOW, 9, grid="exponential")
    np.testing.assert_allclose(np.diff(np.log(grid.sigmas[:9]), 2), 0.0, atol=1e-12)
    assert grid.sigmas[0] == 1.0 and grid.sigmas[8] == pytest.approx(FLOW.data_end) and grid.sigmas[9] == 0.0


def test_beta_is_dense_at_both_ends():
    for schedule in (VP, EDM, FLOW):
        for final, last in (("zero", 8), ("sigma_min", 9)):
            grid = make_grid(schedule, 9, grid="beta", final=final)
            assert grid.timesteps[0] == pytest.approx(schedule.timestep(schedule.noise_end))
            assert grid.sigmas[last] == pytest.approx(schedule.sigma(schedule.data_end))
            assert grid.schedule is schedule
    steps = -np.diff(make_grid(VP, 9, grid="beta").timesteps)
    assert steps[0] < steps[3] and steps[-1] < steps[3]
    np.testing.assert_allclose(steps, steps[::-1], rtol=1e-9)
    t = np.array(make_grid(NoiseSchedule.flow(), 9, grid="beta").sigmas[:9])
    np.testing.assert_allclose(make_grid(FLOW, 9, grid="beta").sigmas[:9], 3 * t / (1 + 2 * t), rtol=1e-12)


@pytest.mark.parametrize("grid", ["exponential", "beta"])
def test_any_number_of_steps(grid):
    for schedule in (VP, EDM, FLOW):
        for steps in (1, 2, 50):
            plan = make_plan(schedule, "ddim", steps, prediction="v", grid=grid)
            assert plan.nfe == steps and plan.recipe is not None


def test_resolution_shift_is_the_line_of_mu():
    assert resolution_shift(256) == 0.5 and resolution_shift(4096) == pytest.approx(1.15, rel=1e-15)
    assert resolution_shift(1024) == pytest.approx(0.5 + 0.65 / 3840 * 768)
    assert resolution_shift(8192) > 1.15
    shift = math.exp(resolution_shift(1024))
    grid = make_grid(NoiseSchedule.flow(shift=shift), 4)
    u = np.array([1.0, 0.75, 0.5, 0.25])
    mu = resolution_shift(1024)
    np.testing.assert_allclose(grid.sigmas[:4], math.exp(mu) / (math.exp(mu) + 1 / u - 1), rtol=1e-14)
    with pytest.raises(ArgumentError, match="token counts above 0"):
        resolution_shift(0)
    with pytest.raises(ArgumentError, match="token counts"):
        resolution_shift(10, 256, 256)
