"""scheduler_config.json: the `diffusers` scheduler that runs a plan, checked by making the plan of it again."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers import schedulers

from tests.engine.plans import edit, euler
from vivace.engine.bind import ModelSpec
from vivace.engine.diffusers_config import FIELDS
from vivace.engine.interchange import apply_smoothcache, to_scheduler_config
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Args, Plan, Recipe
from vivace.engine.planning import make_plan
from vivace.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP, FLOW = NoiseSchedule.vp(BETAS), NoiseSchedule.flow(timestep_scale=1000)


def again(config, call):
    """The plan that the exported scheduler would run."""
    arguments = dict(call)
    return Plan.from_diffusers(config, arguments.pop("num_inference_steps"), **arguments)


@pytest.mark.parametrize("name", FIELDS)
def test_the_plan_of_a_config_gives_the_config_back(name):
    plan = Plan.from_diffusers({"_class_name": name}, 6)
    config, call = to_scheduler_config(plan)
    assert (config, call) == ({"_class_name": name}, {"num_inference_steps": 6})
    assert again(config, call) == plan


@pytest.mark.parametrize("name", FIELDS)
def test_the_plan_of_a_scheduler_gives_a_config_that_makes_the_scheduler_again(name):
    cls = getattr(schedulers, name)
    plan = Plan.from_diffusers(cls(), 6)
    config, call = to_scheduler_config(plan)
    assert again(cls.from_config(json.loads(json.dumps(config))), call).steps == plan.steps


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({"_class_name": "UniPCMultistepScheduler", **SD, "solver_order": 3}, {"strength": 0.5}),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, {"mu": 1.1}),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, {"sigmas": [1.0, 0.5, 0.2]}),
        ({"_class_name": "DDPMScheduler", "clip_sample": False}, {"timesteps": [900, 400, 10]}),
    ],
)
def test_what_the_call_decides_goes_to_the_call(config, arguments):
    plan = Plan.from_diffusers(config, 8, **arguments)
    given, call = to_scheduler_config(plan)
    steps = len(next((value for value in arguments.values() if isinstance(value, list)), [0] * 8))
    assert given == config and call == {"num_inference_steps": steps, **arguments}
    assert again(given, call) == plan


def test_guidance_caching_and_binding_are_not_its_subject():
    config = {"_class_name": "DPMSolverMultistepScheduler", **SD}
    plan = apply_smoothcache(apply_guidance(Plan.from_diffusers(config, 4), 3.0), {"attn": [1, 0, 1, 1]})
    spec = ModelSpec("toy", "f" * 64, "eps", (3, 32, 32), 6, (4, 4))
    assert to_scheduler_config(plan) == to_scheduler_config(plan.bind(spec)) == (config, {"num_inference_steps": 4})


def test_changed_rows_are_named():
    plan = Plan.from_diffusers({"_class_name": "DDIMScheduler"}, 4)
    with pytest.raises(UnsupportedError, match="row 2: timestep is 251.0 here and 250.0 there: .* by DDIMScheduler"):
        to_scheduler_config(edit(plan, 2, timestep=251.0))
    with pytest.raises(UnsupportedError, match="4 rows of eps, got .*|3 rows of eps, got 4 of eps"):
        to_scheduler_config(replace(plan, steps=plan.steps[:3]))
    with pytest.raises(UnsupportedError, match="row 1 has another form"):
        to_scheduler_config(edit(plan, 1, ops=plan.steps[1].ops[1:]))
    with pytest.raises(UnsupportedError, match="made by hand"):
        to_scheduler_config(euler())
    for maker, lacking in (("from_diffusers", "scheduler"), ("make_plan", "schedule")):
        with pytest.raises(UnsupportedError, match=f"the recipe of the plan lacks '{lacking}'"):
            to_scheduler_config(replace(euler(), recipe=Recipe(maker, Args())))


def test_an_object_that_is_not_what_its_config_says_is_refused():
    scheduler = schedulers.DDIMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.1
    with pytest.raises(UnsupportedError, match="table of noise levels of the DDIMScheduler was not that of its config"):
        to_scheduler_config(Plan.from_diffusers(scheduler, 4))
    flow = schedulers.FlowMatchEulerDiscreteScheduler()
    flow.set_shift(3.0)
    with pytest.raises(UnsupportedError, match=r"set_shift\(3\) was called"):
        to_scheduler_config(Plan.from_diffusers(flow, 4))


# ---------------------------------------------------------------- plans of make_plan
def test_levels_that_float32_holds_are_expressed_bit_for_bit():
    plan = make_plan(FLOW, "flow_euler", 8, prediction="flow")
    config, call = to_scheduler_config(plan)
    assert config == {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert call == {"num_inference_steps": 8, "sigmas": [1.0 - i / 8 for i in range(8)]}
    assert again(config, call).steps == plan.steps
    config, call = to_scheduler_config(apply_guidance(plan.tail(0.5), 2.0))
    assert again(config, call).steps == plan.tail(0.5).steps and call["strength"] == 0.5


MADE = [
    ("ddim", {"grid": "trailing"}, "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    (
        "ddim",
        {"grid": "leading"},
        "DPMSolverMultistepScheduler",
        {"solver_order": 1, "timestep_spacing": "leading"},
    ),
    ("dpmpp_2m", {"grid": "linspace"}, "DPMSolverMultistepScheduler", {}),
    ("dpmpp_2m", {"grid": "linspace", "variant": "heun"}, "DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    (
        "dpmpp_2m",
        {"grid": "linspace", "final": "sigma_min", "prediction": "v"},
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
    ),
    ("dpmpp_2m_sde", {"grid": "linspace"}, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    (
        "dpmpp_3m",
        {"grid": "linspace", "variant": "published"},
        "DPMSolverMultistepScheduler",
        {"solver_order": 3},
    ),
    ("unipc", {"grid": "trailing", "order": 3}, "UniPCMultistepScheduler", {"solver_order": 3}),
    ("unipc", {"grid": "linspace", "variant": "bh1"}, "UniPCMultistepScheduler", {"solver_type": "bh1"}),
    (
        "unipc",
        {"grid": "linspace", "corrector": False},
        "UniPCMultistepScheduler",
        {"disable_corrector": list(range(8))},
    ),
]


@pytest.mark.parametrize(("solver", "options", "name", "fields"), MADE)
def test_a_plan_whose_levels_float32_rounds_needs_a_tolerance(solver, options, name, fields):
    plan = make_plan(VP, solver, 8, **options)
    with pytest.raises(UnsupportedError, match=f"no scheduler runs these rows; nearest: {name}, row .* accepts it"):
        to_scheduler_config(plan)
    config, call = to_scheduler_config(plan, tolerance=1e-5)
    spacing = options["grid"] if options["grid"] != "linspace" else None
    wanted = fields if spacing is None else {**fields, "timestep_spacing": spacing}
    assert config == {"_class_name": name, **SD, **wanted} and call == {"num_inference_steps": 8}
    scheduler = getattr(schedulers, name).from_config(config)
    for row, step in zip(Plan.from_diffusers(scheduler, 8).steps, plan.steps, strict=True):
        assert row.timestep == step.timestep and row.sigma == pytest.approx(step.sigma, rel=1e-5)


def test_explicit_timesteps_and_unnamed_betas_are_said_one_by_one():
    schedule = NoiseSchedule.vp(BETAS * np.linspace(1.0, 1.1, 1000))
    plan = make_plan(schedule, "dpmpp_2m", 3, timesteps=[900, 500, 100])
    config, call = to_scheduler_config(plan, tolerance=1e-5)
    assert call == {"num_inference_steps": 3, "timesteps": [900.0, 500.0, 100.0]}
    assert len(config["trained_betas"]) == 1000 and "beta_schedule" not in config


@pytest.mark.parametrize(
    ("schedule", "solver", "options", "message"),
    [
        (VP, "heun", {}, "no covered class of diffusers runs the rows of solver 'heun' on a 'vp' schedule"),
        (FLOW, "unipc", {"prediction": "flow"}, "solver 'unipc' on a 'flow' schedule"),
        (NoiseSchedule.edm(), "euler", {}, "solver 'euler' on a 'edm' schedule"),
        (VP, "dpmpp_2m", {"grid": "uniform"}, "row 7: timestep is 124.875 here and 124.0 there"),
        (VP, "dpmpp_3m", {"grid": "linspace"}, "DPMSolverMultistepScheduler, row 5: update of 'x'"),
        (VP, "ddim", {"eta": 0.5, "grid": "trailing"}, "row 0 has another form there"),
        (NoiseSchedule.flow(), "flow_euler", {"prediction": "flow"}, "timestep is 1.0 here and 1000.0 there"),
    ],
)
def test_what_no_scheduler_says_is_named(schedule, solver, options, message):
    with pytest.raises(UnsupportedError, match=message):
        to_scheduler_config(make_plan(schedule, solver, 8, **options), tolerance=1e-5)
