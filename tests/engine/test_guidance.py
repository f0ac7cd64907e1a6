import pytest
import torch

import vivace
from tests.engine.plans import edit, euler
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import InputRef, Transform
from vivace.errors import ArgumentError, PlanError


def toy(x, t, branch="cond"):
    return x * (0.5 if branch == "cond" else 0.3) + t.view(-1, 1)


def test_guided_rows_evaluate_two_branches_and_read_the_combination():
    plan = apply_guidance(euler(4), 3.0)
    assert plan.branch_evals == 8 and plan.nfe == 4
    assert plan.inputs == (InputRef("guidance_scale", 3.0),)
    assert plan.steps[0].ops[-1].terms == (("x", 1.0), ("g", -0.25))


def test_interval_counts_rows_from_the_noise_end():
    plan = apply_guidance(euler(10), 3.0, interval=(0.25, 0.75))
    guided = [i for i, step in enumerate(plan.steps) if "uncond" in step.branches]
    assert guided == [2, 3, 4, 5, 6]
    assert plan.steps[0] == euler(10).steps[0]


def test_scale_one_equals_the_plain_plan_bit_for_bit():
    noise = torch.randn(4, 5, dtype=torch.float64)
    plain = vivace.sample(toy, euler(6), noise)
    assert torch.equal(vivace.sample(toy, apply_guidance(euler(6), 1.0), noise), plain)


def test_guided_result_is_the_formula():
    noise = torch.randn(4, 5, dtype=torch.float64)
    x = noise.clone()
    for step in euler(6).steps:
        t = torch.full((4,), step.timestep, dtype=torch.float64)
        cond, uncond = toy(x, t), toy(x, t, "uncond")
        x = x - (uncond + 2.5 * (cond - uncond)) / 6
    got = vivace.sample(toy, apply_guidance(euler(6), 4.0), noise, inputs={"guidance_scale": 2.5})
    assert torch.allclose(got, x, rtol=1e-14, atol=1e-14)


def test_rescale_is_one_transform_after_the_combination():
    plan = apply_guidance(euler(2), 4.0, rescale=0.7)
    assert plan.steps[0].ops[2] == Transform("cfg_rescale", "g", ("cond",), (("phi", 0.7),))


def test_a_bound_plan_can_be_guided_and_its_recipe_remembers():
    plan = apply_guidance(edit(euler(), 0), 2.0)
    assert plan.recipe is None


@pytest.mark.parametrize(
    "bad",
    [{"kind": "pag"}, {"interval": (0.5, 0.5)}, {"interval": (-0.1, 1.0)}, {"scale": float("nan")}, {"rescale": 1.5}],
)
def test_bad_arguments_are_named(bad):
    with pytest.raises(ArgumentError, match="apply_guidance"):
        apply_guidance(euler(), **bad)


def test_guiding_twice_is_refused():
    with pytest.raises(PlanError, match="already"):
        apply_guidance(apply_guidance(euler(), 2.0), 2.0)
