"""Parity with the real schedulers of `diffusers`, and refusals by the name of the field."""

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import schedulers

from tests.engine.interpreter import Gaussian, run_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan
from vivace.engine.planning import replan
from vivace.errors import ArgumentError, PlanError

SHAPE = (2, 3, 2, 2)
DATA = Gaussian(np.float64(0.4), np.float64(0.6))
KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_schedule": "linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True}


class Double:
    """`torch` with float32 replaced, so that a scheduler's casts keep float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def make(name, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(schedulers, name)(**config)


def as_dict(scheduler):
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def level(scheduler, t):
    """(alpha, sigma) that the network belongs to at timestep t: any fixed function of t serves parity."""
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        return 1.0 - min(float(t) / 1000, 0.9999), float(t) / 1000
    square = float(scheduler.alphas_cumprod[min(int(t), 999)])
    return square**0.5, (1.0 - square) ** 0.5


def on_levels(scheduler, kind, states=None):
    """The denoiser that both sides run; `states` collects what it is given."""

    def denoiser(x, t, row):
        if states is not None:
            states.append(x)
        return DATA.predict(kind, x, *level(scheduler, t))

    return denoiser


def run_diffusers(scheduler, noise, dtype, monkeypatch, first=0, states=None, **request):
    """The scheduler's own loop in `dtype`; for float64 its tables and casts are float64."""
    scheduler.set_timesteps(**request)
    denoiser = on_levels(scheduler, KINDS[scheduler.config.get("prediction_type", "flow_prediction")], states)
    with monkeypatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(f"{type(scheduler).__module__}.torch", Double())
            for table in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
                if hasattr(scheduler, table):
                    patch.setattr(scheduler, table, getattr(scheduler, table).double())
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = torch.as_tensor(noise, dtype=dtype)
        for t in scheduler.timesteps[first:]:
            out = denoiser(x.double().numpy(), t, None)
            x = scheduler.step(torch.as_tensor(out, dtype=dtype), t, x, return_dict=False)[0]
    return x.double().numpy()


def gap(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


def check_parity(scheduler, monkeypatch, steps=None, **request):
    noise = np.random.default_rng(0).normal(size=SHAPE)
    given = dict(request) if steps is None else {"steps": steps, **request}
    plan = Plan.from_diffusers(scheduler, **given)
    theirs = dict(request) if {"timesteps", "sigmas"} & set(request) else {"num_inference_steps": steps, **request}
    if "sigmas" in theirs:
        theirs["sigmas"] = np.asarray(theirs["sigmas"])
    exact = run_diffusers(scheduler, noise, torch.float64, monkeypatch, **theirs)
    assert [step.timestep for step in plan.steps] == [float(t) for t in scheduler.timesteps]
    kind = plan.prediction
    got = run_plan(plan, on_levels(scheduler, kind), noise)
    assert gap(got, exact) < 1e-9
    single = run_diffusers(scheduler, noise, torch.float32, monkeypatch, **theirs)
    # Its float32 loses digits where a prediction of noise is divided by a small alpha; float64 shows the agreement.
    assert gap(got, single) < (max(1e-5, 1e-6 / plan.steps[0].alpha) if kind == "eps" else 1e-5)
    again = replan(plan.recipe)
    assert again == plan
    json.dumps(plan.recipe.arguments.to_dict(), allow_nan=False)
    return plan


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_ddim_runs_as_in_diffusers(kind, spacing, steps, monkeypatch):
    for betas, clip, one in ((SD, False, False), (LINEAR, True, True)):
        config = {**betas, "prediction_type": kind, "timestep_spacing": spacing, "clip_sample": clip}
        offset = 1 if spacing == "leading" else 0
        scheduler = make("DDIMScheduler", **config, set_alpha_to_one=one, steps_offset=offset, clip_sample_range=0.9)
        check_parity(scheduler, monkeypatch, steps=steps)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_ddim_from_zero_terminal_snr(kind, monkeypatch):
    config = {**ZERO_SNR, "prediction_type": kind, "timestep_spacing": "trailing", "clip_sample": False}
    plan = check_parity(make("DDIMScheduler", **config), monkeypatch, steps=6)
    assert plan.steps[0].alpha == 0.0
    with pytest.raises(PlanError, match="pure noise"):
        Plan.from_diffusers(make("DDIMScheduler", **{**config, "prediction_type": "epsilon"}), 6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_dynamic_threshold_is_a_transform_on_x0(name, monkeypatch):
    plan = check_parity(make(name, thresholding=True, sample_max_value=1.1), monkeypatch, steps=5)
    assert plan.steps[0].ops[1].kind == "dynamic_threshold"


SIGMAS = [{}, {"use_karras_sigmas": True}, {"use_lu_lambdas": True}, {"use_flow_sigmas": True, "flow_shift": 3.0}]


@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpmpp_runs_as_in_diffusers(sigmas, solver_type, final, monkeypatch):
    for steps, order, lower in itertools.product((1, 4, 14, 15, 20), (1, 2), (True, False)):
        if "use_flow_sigmas" in sigmas and final == "sigma_min":
            continue
        karras_end = "use_karras_sigmas" in sigmas or "use_lu_lambdas" in sigmas
        if karras_end and final == "sigma_min" and solver_type == "heun" and order == 2 and not (lower and steps < 15):
            continue  # diffusers returns NaN: its last step has length 0
        kind = "flow_prediction" if "use_flow_sigmas" in sigmas else ("epsilon", "v_prediction", "sample")[steps % 3]
        config = {**SD, **sigmas, "solver_type": solver_type, "final_sigmas_type": final, "solver_order": order}
        scheduler = make("DPMSolverMultistepScheduler", **config, lower_order_final=lower, prediction_type=kind)
        check_parity(scheduler, monkeypatch, steps=steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "config",
    [
        {**SD, "steps_offset": 1},
        {**LINEAR, "euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {**COSINE, "lambda_min_clipped": -5.1},
        {**COSINE, "use_karras_sigmas": True},
        {**ZERO_SNR, "prediction_type": "v_prediction"},
        {"trained_betas": list(np.linspace(1e-4, 0.02, 1000))},
        {"solver_type": "bh1"},
    ],
)
def test_dpmpp_fields(spacing, config, monkeypatch):
    for steps in (5, 17):
        scheduler = make("DPMSolverMultistepScheduler", **config, timestep_spacing=spacing)
        check_parity(scheduler, monkeypatch, steps=steps)


def test_dpmpp_explicit_timesteps_and_mu(monkeypatch):
    check_parity(make("DPMSolverMultistepScheduler", **SD), monkeypatch, timesteps=[999, 600, 333, 20])
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    check_parity(make("DPMSolverMultistepScheduler", **flow), monkeypatch, steps=6, mu=0.8)
    with pytest.raises(ArgumentError, match="use_karras_sigmas"):
        Plan.from_diffusers(make("DPMSolverMultistepScheduler", use_karras_sigmas=True), timesteps=[5, 4])
    with pytest.raises(ArgumentError, match="use_dynamic_shifting"):
        Plan.from_diffusers(make("DPMSolverMultistepScheduler"), 5, mu=1.0)


UNIPC_SIGMAS = [
    {},
    {"use_karras_sigmas": True},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0},
    {"use_flow_sigmas": True, "flow_shift": 3.0},
    {"use_flow_sigmas": True, "shift_terminal": 0.1},
    {"use_flow_sigmas": True, "use_karras_sigmas": True},
]


@pytest.mark.parametrize("sigmas", UNIPC_SIGMAS)
@pytest.mark.parametrize(("solver_type", "final"), [("bh2", "zero"), ("bh2", "sigma_min"), ("bh1", "sigma_min")])
def test_unipc_runs_as_in_diffusers(sigmas, solver_type, final, monkeypatch):
    flow = "use_flow_sigmas" in sigmas
    for steps, order in itertools.product((1, 2, 3, 5, 12, 25), (1, 2, 3)):
        if steps == 1 and "shift_terminal" in sigmas:
            continue
        kind = "flow_prediction" if flow else ("epsilon", "v_prediction", "sample")[steps % 3]
        config = {**SD, **sigmas, "solver_type": solver_type, "final_sigmas_type": final, "solver_order": order}
        scheduler = make("UniPCMultistepScheduler", **config, prediction_type=kind)
        check_parity(scheduler, monkeypatch, steps=steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "config",
    [
        {**SD, "steps_offset": 1, "disable_corrector": [0, 1]},
        {**LINEAR, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {**ZERO_SNR, "prediction_type": "v_prediction"},
        {**SD, "solver_type": "midpoint", "solver_order": 1},
    ],
)
def test_unipc_fields(spacing, config, monkeypatch):
    for steps in (5, 17):
        scheduler = make("UniPCMultistepScheduler", **config, timestep_spacing=spacing)
        check_parity(scheduler, monkeypatch, steps=steps)


def test_unipc_explicit_sigmas_and_mu(monkeypatch):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    check_parity(make("UniPCMultistepScheduler", **flow), monkeypatch, sigmas=[1.0, 0.7, 0.4, 0.1])
    for kind in ("exponential", "linear"):
        dynamic = make("UniPCMultistepScheduler", **flow, use_dynamic_shifting=True, time_shift_type=kind)
        check_parity(dynamic, monkeypatch, steps=6, mu=0.8)
    with pytest.raises(ArgumentError, match="mu"):
        Plan.from_diffusers(dynamic, 6)
    with pytest.raises(ArgumentError, match="use_flow_sigmas"):
        Plan.from_diffusers(make("UniPCMultistepScheduler"), sigmas=[1.0, 0.5])


def test_unipc_bh1_to_zero_agrees_up_to_the_last_row(monkeypatch):
    scheduler = make("UniPCMultistepScheduler", **SD, solver_type="bh1")
    noise = np.random.default_rng(0).normal(size=SHAPE)
    assert np.isnan(run_diffusers(scheduler, noise, torch.float64, monkeypatch, num_inference_steps=6)).all()
    states = []
    plan = Plan.from_diffusers(scheduler, 6)
    assert np.isfinite(run_plan(plan, on_levels(scheduler, "eps", states), noise)).all()
    theirs = []
    run_diffusers(scheduler, noise, torch.float64, monkeypatch, states=theirs, num_inference_steps=6)
    for got, want in zip(states, theirs, strict=True):
        assert gap(got, want) < 1e-9


def test_unipc_row_to_zero_is_first_order_even_without_lower_order_final():
    plan = Plan.from_diffusers(make("UniPCMultistepScheduler", lower_order_final=False), 4)
    assert plan.steps[-1].ops[-1].terms == (("m0", 1.0),)  # where diffusers divides by zero


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"shift": 3.0, "use_karras_sigmas": True},
        {"shift": 2.0, "shift_terminal": 0.1},
        {"shift": 2.0, "num_train_timesteps": 500},
    ],
)
def test_flow_euler_runs_as_in_diffusers(config, monkeypatch):
    for steps in (1, 4, 28):
        if steps > 1 or "shift_terminal" not in config:
            check_parity(make("FlowMatchEulerDiscreteScheduler", **config), monkeypatch, steps=steps)


def test_flow_euler_dynamic_shift_and_explicit_levels(monkeypatch):
    name = "FlowMatchEulerDiscreteScheduler"
    for kind in ("exponential", "linear"):
        dynamic = make(name, use_dynamic_shifting=True, time_shift_type=kind)
        check_parity(dynamic, monkeypatch, steps=5, mu=1.15)
        check_parity(dynamic, monkeypatch, sigmas=list(np.linspace(1.0, 0.2, 5)), mu=0.5)
    shifted = make(name, shift=2.0)
    check_parity(shifted, monkeypatch, timesteps=[900.0, 500.0, 100.0])
    check_parity(shifted, monkeypatch, timesteps=[900.0, 500.0], sigmas=[0.8, 0.3])
    shifted.set_shift(5.0)
    check_parity(shifted, monkeypatch, steps=5)
    with pytest.raises(ArgumentError, match="mu"):
        Plan.from_diffusers(dynamic, 5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("strength", [0.33, 0.75])
def test_image_to_image_starts_in_the_middle(name, strength, monkeypatch):
    extra = {"disable_corrector": [14]} if name.startswith("UniPC") else {}
    scheduler = make(name, **SD, **extra, **({"clip_sample": False} if name == "DDIMScheduler" else {}))
    plan = Plan.from_diffusers(scheduler, 20, strength=strength)
    first = 20 - int(20 * strength)
    assert len(plan.steps) == int(20 * strength)
    rng = np.random.default_rng(1)
    start, noise = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    scheduler.set_timesteps(20)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    times = scheduler.timesteps[first : first + 1]
    x = scheduler.add_noise(torch.as_tensor(start), torch.as_tensor(noise), times).numpy()
    want = run_diffusers(scheduler, x, torch.float64, monkeypatch, first=first, num_inference_steps=20)
    denoiser = on_levels(scheduler, "eps")
    assert gap(run_plan(plan, denoiser, noise, inputs={"start": start}), want) < 1e-6
    assert replan(plan.recipe) == plan and plan.recipe.tail == strength
    assert Plan.from_diffusers(scheduler, 20).tail(strength) == plan


def test_a_config_dict_gives_the_plan_of_the_object_to_float32_rounding():
    for name, config in (
        ("DDIMScheduler", SD),
        ("DPMSolverMultistepScheduler", COSINE),
        ("UniPCMultistepScheduler", SD),
    ):
        scheduler = make(name, **config)
        one, two = Plan.from_diffusers(scheduler, 8), Plan.from_diffusers(as_dict(scheduler), 8)
        assert [step.timestep for step in one.steps] == [step.timestep for step in two.steps]
        for a, b in zip(one.steps, two.steps, strict=True):
            assert a.alpha == pytest.approx(b.alpha, rel=1e-4) and a.sigma == pytest.approx(b.sigma, rel=1e-4)
        saved = json.loads(scheduler.to_json_string().replace("-Infinity", "-1e999"))
        assert Plan.from_diffusers(saved, 8) == two
    flow = make("FlowMatchEulerDiscreteScheduler", shift=3.0)
    assert Plan.from_diffusers(flow, 5).steps == Plan.from_diffusers(as_dict(flow), 5).steps


def test_schedules_of_objects_and_dicts_agree():
    for config in (SD, LINEAR, COSINE, ZERO_SNR, {"trained_betas": [0.1, 0.2, 0.3]}):
        scheduler = make("DDIMScheduler", **config)
        ours, theirs = (NoiseSchedule.from_diffusers(source) for source in (dict(scheduler.config), scheduler))
        t = np.arange(ours.train_steps, dtype=np.float64)
        np.testing.assert_allclose(ours.alpha(t), theirs.alpha(t), rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(theirs.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-13)
    flow = NoiseSchedule.from_diffusers(make("FlowMatchEulerDiscreteScheduler", shift=3.0))
    assert (flow.shift, flow.timestep_scale, flow.train_steps) == (3.0, 1000.0, 1000)


def test_fields_of_other_classes_are_ignored():
    config = {"_class_name": "UniPCMultistepScheduler", "skip_prk_steps": True, "clip_sample": False, **SD}
    assert Plan.from_diffusers(config, 5).steps == Plan.from_diffusers({**config, "skip_prk_steps": 1}, 5).steps


def test_trailing_never_feeds_a_timestep_below_zero():
    scheduler = make("DPMSolverMultistepScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert int(scheduler.timesteps[-1]) == -1  # one row too many, by rounding
    assert [step.timestep for step in Plan.from_diffusers(scheduler, 61).steps] == scheduler.timesteps[:-1].tolist()
