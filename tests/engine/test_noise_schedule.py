import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Args
from vivace.errors import ArgumentError, UnsupportedError

BETAS = np.linspace(1e-4, 0.02, 1000)
VP = NoiseSchedule.vp(BETAS)
ZERO = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})
EDM = NoiseSchedule.edm()
FLOW = NoiseSchedule.flow(shift=3.0, timestep_scale=1000.0)


def test_vp_is_the_product_of_the_betas():
    t = np.arange(1000.0)
    product = np.cumprod(1.0 - BETAS)
    np.testing.assert_allclose(VP.alpha(t) ** 2, product, rtol=1e-13)
    np.testing.assert_allclose(VP.sigma(t) ** 2, 1.0 - product, rtol=1e-11)
    assert isinstance(VP.alpha(3.0), float) and isinstance(VP.lam(t), np.ndarray)
    assert (VP.noise_end, VP.data_end, VP.finite_end, VP.train_steps) == (999.0, 0.0, 999.0, 1000)


def test_vp_between_timesteps_log_alpha_is_linear():
    for t, w in ((10, 0.25), (700, 0.5), (998, 0.9)):
        want = (1 - w) * math.log(VP.alpha(float(t))) + w * math.log(VP.alpha(t + 1.0))
        assert math.log(VP.alpha(t + w)) == pytest.approx(want, rel=1e-13)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.0, 999.0))
def test_levels_have_unit_norm_and_lam_inverts(t):
    for schedule in (VP, ZERO):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-14)
        if alpha > 0.0:
            assert schedule.t_of_lam(schedule.lam(t)) == pytest.approx(t, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 0.999))
def test_flow_and_edm_invert(t):
    assert FLOW.alpha(t) == 1.0 - t and FLOW.sigma(t) == t
    assert FLOW.t_of_lam(FLOW.lam(t)) == pytest.approx(t, rel=1e-12)
    assert EDM.alpha(t) == 1.0 and EDM.sigma(t) == t
    assert EDM.t_of_lam(EDM.lam(t)) == pytest.approx(t, rel=1e-12)
    assert FLOW.timestep(t) == 1000.0 * t and EDM.timestep(t) == t
    assert FLOW.shifted(t) == pytest.approx(3 * t / (1 + 2 * t))


def test_infinite_ends():
    assert ZERO.alpha(999.0) == 0.0 and ZERO.sigma(999.0) == 1.0 and ZERO.lam(999.0) == -math.inf
    assert ZERO.finite_end == 998.0 and 0.0 < ZERO.alpha(998.4) < ZERO.alpha(998.0)
    assert FLOW.lam(1.0) == -math.inf and FLOW.lam(0.0) == math.inf and EDM.lam(0.0) == math.inf
    assert ZERO.t_of_lam(-math.inf) == 999.0 and FLOW.t_of_lam(-math.inf) == 1.0
    assert FLOW.lam(FLOW.finite_end) > -math.inf
    one = NoiseSchedule.vp([0.1, 0.5, 1.0])
    assert one.alpha(2.0) == 0.0 and one.alpha(1.0) > 0.0


def test_sigmas_are_read_in_the_convention_of_each_kind():
    assert VP.t_of_sigma(VP.sigma(321.0) / VP.alpha(321.0)) == pytest.approx(321.0, abs=1e-8)
    assert EDM.t_of_sigma(5.0) == 5.0 and FLOW.t_of_sigma(0.3) == 0.3
    assert VP.t_of_sigma(1e9) == 999.0 and VP.t_of_sigma(1e-9) == 0.0


@pytest.mark.parametrize("schedule", [VP, ZERO, EDM, FLOW, NoiseSchedule.edm(0.01, 10.0, 5.0)])
def test_a_description_makes_the_same_schedule(schedule):
    again = NoiseSchedule.restore(Args.of(schedule.describe().to_dict()))
    assert again == schedule
    t = np.linspace(0.0, schedule.noise_end, 57)
    np.testing.assert_array_equal(again.alpha(t), schedule.alpha(t))


def test_beta_schedules_of_configs():
    scaled = NoiseSchedule.from_diffusers({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    want = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    np.testing.assert_allclose(scaled.alpha(np.arange(1000.0)) ** 2, want, rtol=1e-12)
    cosine = NoiseSchedule.from_diffusers({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100})
    level = math.cos((50 / 100 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert cosine.alpha(49.0) == pytest.approx(level, rel=1e-12)
    assert NoiseSchedule.from_diffusers({"beta_schedule": "linear", "trained_betas": [0.1, 0.2]}).train_steps == 2
    assert NoiseSchedule.from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}).shift == 2.0
    assert (
        NoiseSchedule.from_diffusers({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}).kind == "flow"
    )


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "at least one"),
        ([0.1], "two training timesteps"),
        ([0.1, math.nan], r"betas\[1\]"),
        ([0.1, math.inf], r"betas\[1\]"),
        ([0.1, -0.1], r"betas\[1\]"),
        ([0.1, 1.5], r"betas\[1\]"),
        ([0.0, 0.1], "first"),
        ([0.1, 1.0, 0.1], "only the last"),
        ([[0.1, 0.2]], "shape"),
        ("abc", "numbers"),
        (3, "list of numbers"),
        (None, "list of numbers"),
    ],
)
def test_wrong_betas_are_one_clear_line(betas, message):
    with pytest.raises(ArgumentError, match=message) as error:
        NoiseSchedule.vp(betas)
    assert "\n" not in str(error.value)


def test_wrong_arguments():
    for arguments in ((0.0, 80.0), (5.0, 1.0), (0.002, math.nan), (0.002, 80.0, 0.0), (0.002, 80.0, True)):
        with pytest.raises(ArgumentError):
            NoiseSchedule.edm(*arguments)
    for shift in (0.0, -1.0, math.nan, "3"):
        with pytest.raises(ArgumentError, match="shift"):
            NoiseSchedule.flow(shift)
    for schedule, t in ((VP, 999.5), (VP, -1.0), (FLOW, 1.01), (EDM, -0.1), (EDM, math.nan)):
        with pytest.raises(ArgumentError, match="outside"):
            schedule.alpha(t)
    with pytest.raises(ArgumentError, match="NaN"):
        VP.t_of_lam(math.nan)
    with pytest.raises(ArgumentError, match="unknown kind"):
        NoiseSchedule.restore(Args.of({"kind": "other"}))
    with pytest.raises(UnsupportedError, match="beta_schedule='sigmoid'"):
        NoiseSchedule.from_diffusers({"beta_schedule": "sigmoid"})
    with pytest.raises(UnsupportedError, match="EDMEulerScheduler"):
        NoiseSchedule.from_diffusers({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002})
    with pytest.raises(ArgumentError, match="scheduler config"):
        NoiseSchedule.from_diffusers(3)
