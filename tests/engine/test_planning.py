import json

import numpy as np
import pytest

from tests.engine.interpreter import Gaussian, run_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan, Recipe
from vivace.engine.planning import make_plan, replan
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm()
FLOW = NoiseSchedule.flow(shift=3.0)


def test_first_state():
    assert make_plan(VP).init[0].terms == (("noise:0", 1.0),)
    assert make_plan(FLOW, prediction="flow").init[0].terms == (("noise:0", 1.0),)
    assert make_plan(EDM).init[0].terms == (("noise:0", 80.0),)
    assert make_plan(EDM, steps=2, sigmas=[10.0, 1.0]).init[0].terms == (("noise:0", 10.0),)


def test_defaults():
    assert make_plan(VP).steps == make_plan(VP, "unipc", 20, grid="uniform", order=2, variant="bh2").steps
    assert make_plan(EDM).steps == make_plan(EDM, grid="karras").steps != make_plan(EDM, grid="uniform").steps
    assert make_plan(VP).nfe == 20 and make_plan(VP).prediction == "eps"


CASES = [
    (VP, "unipc", {"steps": 9, "order": 3, "disable_corrector": (0, 1)}),
    (VP, "ddim", {"steps": 4, "eta": 0.5, "prediction": "v", "grid": "trailing"}),
    (EDM, "dpmpp_2m", {"steps": 7, "variant": "heun", "final": "sigma_min", "prediction": "x0"}),
    (FLOW, "flow_euler", {"steps": 4, "prediction": "flow"}),
    (VP, "dpmpp_2m", {"steps": 3, "sigmas": np.array([9.0, 3.0, 0.5])}),
    (VP, "unipc", {"steps": 3, "timesteps": [999, 500, 20]}),
]


@pytest.mark.parametrize(("schedule", "solver", "arguments"), CASES)
def test_a_recipe_makes_the_plan_again(schedule, solver, arguments):
    plan = make_plan(schedule, solver, **arguments)
    assert replan(plan.recipe) == plan
    json.dumps(plan.recipe.arguments.to_dict(), allow_nan=False)


def test_a_recipe_changed():
    plan = apply_guidance(make_plan(VP, "unipc", 8, order=3), 5.0, interval=(0.0, 0.5))
    assert replan(plan.recipe) == plan
    longer = replan(plan.recipe, steps=12, order=2)
    assert longer == apply_guidance(make_plan(VP, "unipc", 12, order=2), 5.0, interval=(0.0, 0.5))
    assert replan(make_plan(VP, "ddim", 4, eta=0.5).recipe, eta=None) == make_plan(VP, "ddim", 4)
    with pytest.raises(ArgumentError, match="option"):
        replan(plan.recipe, solver="ddim")
    with pytest.raises(PlanError, match="unknown maker"):
        replan(Recipe("other", plan.recipe.arguments))
    with pytest.raises(PlanError, match="unknown pass"):
        replan(Recipe("make_plan", plan.recipe.arguments, passes=(("os", plan.recipe.arguments),)))


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW])
@pytest.mark.parametrize("strength", [0.1, 0.3, 0.55, 0.99])
def test_tail_keeps_the_last_rows_and_starts_afresh(schedule, strength):
    plan = make_plan(schedule, "unipc", 20, prediction="v")
    tail, kept = plan.tail(strength), int(20 * strength)
    assert [step.timestep for step in tail.steps] == [step.timestep for step in plan.steps[-kept:]]
    first = tail.steps[0]
    assert dict(tail.init[0].terms) == {"input:start": first.alpha, "noise:0": first.sigma}
    assert len(first.ops[-1].terms) <= 2  # warm-up again: x and one prediction
    assert tail.recipe.tail == strength and replan(tail.recipe) == tail
    assert replan(plan.recipe, tail=strength) == tail


def test_a_tail_from_the_data_stays_at_the_data():
    point = Gaussian(np.full(4, 0.7), np.zeros(4))
    tail = apply_guidance(make_plan(VP, "dpmpp_2m", 10), 1.0).tail(0.5)
    assert tail.steps[0].branches == ("cond", "uncond")
    tail = make_plan(VP, "dpmpp_2m", 10).tail(0.5)
    noise = np.random.default_rng(0).normal(size=(3, 4))
    got = run_plan(tail, point.denoiser(tail), noise, inputs={"start": np.full((3, 4), 0.7)})
    np.testing.assert_allclose(got, 0.7, atol=1e-12)


def test_rows_named_by_an_option_are_those_of_the_full_plan():
    plan = make_plan(VP, "unipc", 10, disable_corrector=(6,))
    want = make_plan(VP, "unipc", 5, timesteps=[s.timestep for s in plan.steps[5:]], disable_corrector=(1,))
    assert plan.tail(0.5).steps == want.steps


def test_tail_refuses():
    plan = make_plan(VP, steps=10)
    assert plan.tail(1.0).steps == plan.steps
    assert plan.tail(1.0).init[0].terms[0][0] == "input:start"
    for strength in (0.0, -0.5, 1.5, 0.05, float("nan"), "half", True):
        with pytest.raises(ArgumentError, match="strength"):
            plan.tail(strength)
    with pytest.raises(PlanError, match="tail of strength 0.5 already"):
        plan.tail(0.5).tail(0.5)
    with pytest.raises(PlanError, match="no recipe"):
        Plan(plan.steps, plan.prediction, plan.init).tail(0.5)


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="NoiseSchedule"):
        make_plan({"beta_schedule": "linear"})
    with pytest.raises(ArgumentError, match="prediction: unknown 'epsilon'"):
        make_plan(VP, prediction="epsilon")
    with pytest.raises(ArgumentError, match="JSON"):
        make_plan(VP, order=object())
    with pytest.raises(ArgumentError, match="give one per step"):
        make_plan(VP, timesteps=[9, 8])
    for steps in (0, 2.5, None, "20"):
        with pytest.raises(ArgumentError, match="steps"):
            make_plan(VP, steps=steps)


def test_plans_are_written_and_read_unchanged(tmp_path):
    for plan in (make_plan(VP), make_plan(EDM, "ddim", 3, eta=1.0), make_plan(FLOW, prediction="v").tail(0.4)):
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan


def test_a_tail_keeps_each_rows_guidance():
    plan = apply_guidance(make_plan(VP, "dpmpp_2m", 8), 5.0, interval=(0.25, 0.75))
    for strength in (1.0, 0.75, 0.5, 0.25):
        tail = plan.tail(strength)
        assert [step.branches for step in tail.steps] == [step.branches for step in plan.steps[-len(tail.steps) :]]
        assert tail.recipe.passes == plan.recipe.passes
