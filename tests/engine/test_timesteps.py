import math

import numpy as np
import pytest
from diffusers import schedulers
from hypothesis import given, settings
from hypothesis import strategies as st

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.timesteps import GRIDS, make_grid
from vivace.errors import ArgumentError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
ZERO = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})
EDM = NoiseSchedule.edm()
FLOW = NoiseSchedule.flow(shift=3.0, timestep_scale=1000.0)


def test_uniform_is_even_and_unrounded():
    grid = make_grid(VP, 7)
    np.testing.assert_allclose(grid.timesteps, np.linspace(999, 0, 8)[:7], rtol=1e-15)
    assert grid.level(7) == (1.0, 0.0)
    assert make_grid(VP, 7, final="sigma_min").level(7) == (VP.alpha(0.0), VP.sigma(0.0))
    u = np.linspace(1, 0, 8)[:7]
    np.testing.assert_allclose(make_grid(FLOW, 7).sigmas[:7], 3 * u / (1 + 2 * u), rtol=1e-14)
    np.testing.assert_allclose(make_grid(FLOW, 7).timesteps, 3000 * u / (1 + 2 * u), rtol=1e-14)
    np.testing.assert_allclose(make_grid(EDM, 4, grid="uniform").sigmas[:4], np.linspace(80, 0.002, 5)[:4], rtol=1e-14)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_rounded_grids_are_those_of_diffusers(spacing):
    scheduler = schedulers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
    for steps in range(1, 200, 3):
        scheduler.set_timesteps(steps)
        # At some numbers of steps (61, ...) its trailing grid goes on to a timestep of -1, which no network knows.
        want = [float(t) for t in scheduler.timesteps if t >= 0]
        assert list(make_grid(VP, steps, grid=spacing).timesteps) == want


def test_trailing_starts_at_pure_noise():
    assert make_grid(ZERO, 5, grid="trailing").timesteps[0] == 999.0
    assert make_grid(FLOW, 5, grid="trailing").timesteps[0] == 1000.0


def test_karras_and_logsnr_are_even_in_their_variable():
    ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 10) ** 7
    np.testing.assert_allclose(make_grid(EDM, 10).sigmas, [*ramp, 0.0], rtol=1e-12)
    longer = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 11) ** 7
    np.testing.assert_allclose(make_grid(EDM, 10, final="sigma_min").sigmas, longer, rtol=1e-12)
    for schedule in (VP, EDM):
        grid = make_grid(schedule, 9, grid="logsnr", final="sigma_min")
        np.testing.assert_allclose(np.diff([grid.lam(i) for i in range(10)], 2), 0.0, atol=1e-9)
        assert grid.timesteps[0] == schedule.noise_end
    grid = make_grid(VP, 9, grid="karras")
    ratio = np.divide(grid.sigmas[:9], grid.alphas[:9]) ** (1 / 7)
    np.testing.assert_allclose(np.diff(ratio, 2), 0.0, atol=1e-9)
    assert grid.timesteps[-1] == 0.0 and grid.level(9) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["logsnr", "karras"])
def test_an_infinite_end_is_spaced_from_one_training_step_inside(name):
    for schedule in (ZERO, FLOW):
        grid = make_grid(schedule, 6, grid=name)
        assert grid.alphas[0] == 0.0 and grid.timesteps[0] == schedule.timestep(schedule.noise_end)
        if name == "logsnr":
            inner = np.linspace(schedule.lam(schedule.finite_end), schedule.lam(schedule.data_end), 6)
            np.testing.assert_allclose([grid.lam(i) for i in range(1, 6)], inner[1:], atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([VP, ZERO, EDM, FLOW]), st.sampled_from(GRIDS), st.integers(1, 400), st.booleans())
def test_noise_falls_on_every_grid(schedule, name, steps, zero):
    if schedule is EDM and name in ("linspace", "leading", "trailing"):
        return
    grid = make_grid(schedule, steps, grid=name, final="zero" if zero else "sigma_min")
    angles = np.arctan2(grid.sigmas, grid.alphas)
    assert grid.steps == steps and len(grid.sigmas) == steps + 1 and (np.diff(angles) < 0).all()
    assert all(math.isfinite(value) for value in (*grid.timesteps, *grid.alphas, *grid.sigmas))
    assert grid.level(steps)[1] == 0.0 if zero else grid.level(steps)[1] > 0.0


def test_defaults_and_explicit_levels():
    assert make_grid(EDM, 5) == make_grid(EDM, 5, grid="karras")
    assert make_grid(VP, 5) == make_grid(VP, 5, grid="uniform")
    grid = make_grid(VP, 3, timesteps=[900, 500.5, 20])
    assert grid.timesteps == (900.0, 500.5, 20.0) and grid.alphas[1] == VP.alpha(500.5)
    ays = [14.615, 6.475, 3.864, 2.697]
    grid = make_grid(VP, 4, sigmas=ays)
    np.testing.assert_allclose(np.divide(grid.sigmas[:4], grid.alphas[:4]), ays, rtol=1e-14)
    assert VP.sigma(grid.timesteps[1]) / VP.alpha(grid.timesteps[1]) == pytest.approx(6.475, rel=1e-9)
    assert make_grid(VP, 1, sigmas=[1e4]).timesteps == (999.0,)
    assert make_grid(EDM, 2, sigmas=np.array([10.0, 1.0])).timesteps == (10.0, 1.0)
    assert make_grid(FLOW, 2, sigmas=[1.0, 0.5]).timesteps == (1000.0, 500.0)
    assert make_grid(FLOW, 2, timesteps=[800.0, 500.0]).sigmas == (0.8, 0.5, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 1001}, "1000 training timesteps"),
        ({"grid": "karas"}, "unknown 'karas'; known: uniform, linspace.*did you mean 'karras'"),
        ({"final": "sigma"}, "final: unknown"),
        ({"grid": "karras", "sigmas": [3, 2, 1]}, "only one of"),
        ({"sigmas": [3, 2]}, "2 given for steps=3"),
        ({"sigmas": [3, math.nan, 1]}, r"sigmas\[1\]"),
        ({"sigmas": [3, 2, 2]}, "noise must fall"),
        ({"sigmas": [3, 2, 0]}, r"sigmas\[2\] = 0"),
        ({"sigmas": [3, 2, 1e-9], "final": "sigma_min"}, "the final level"),
        ({"sigmas": "321"}, "list of numbers"),
        ({"sigmas": [[3, 2, 1]]}, "shape"),
        ({"timesteps": [1, 2, 3]}, "noise must fall"),
        ({"timesteps": [1000, 2, 1]}, "outside"),
        ({"timesteps": ["a", 2, 1]}, "list of numbers"),
        ({"timesteps": 7}, "list of numbers"),
        ({"timesteps": []}, "at least one"),
        ({"steps": 1000, "grid": "linspace"}, "fewer steps"),
    ],
)
def test_what_no_grid_can_be_is_one_clear_line(arguments, message):
    with pytest.raises(ArgumentError, match=message) as error:
        make_grid(VP, **{"steps": 3, **arguments})
    assert "\n" not in str(error.value)


def test_edm_has_no_training_timesteps():
    with pytest.raises(ArgumentError, match="edm has none"):
        make_grid(EDM, 3, grid="leading")
