"""Precisions in plans: the pass, what rules say block by block, and who refuses them."""

import pytest

from vivace.engine.bind import ModelSpec
from vivace.engine.interchange import to_step_policy
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance, apply_precision
from vivace.engine.plan import Plan, Rule, Variant
from vivace.engine.planning import make_plan
from vivace.engine.precision import precisions_of, spelled, states_precision
from vivace.errors import ArgumentError, PlanError, UnsupportedError

SPEC = ModelSpec("toy", "0" * 64, "flow", (2, 4, 4), 4, (1, 1))


def euler(steps):
    return make_plan(NoiseSchedule.flow(), "flow_euler", steps, prediction="flow")


def said(plan):
    return [None if not step.variant.rules else spelled(step.variant) for step in plan.steps]


def test_first_and_last_evaluations_run_high():
    plan = apply_precision(euler(6), "int8", first=1, last=2, high="bf16")
    assert said(plan) == ["bf16", "int8", "int8", "int8", "bf16", "bf16"]
    assert states_precision(plan) and not states_precision(euler(6))


def test_high_rows_say_nothing_by_default():
    assert said(apply_precision(euler(4), first=1)) == [None, "int8", "int8", "int8"]


def test_more_high_rows_than_rows_leave_none_for_the_precision():
    assert said(apply_precision(euler(3), "int8", first=2, last=5, high="fp32")) == ["fp32"] * 3


@pytest.mark.parametrize("bound", [False, True])
def test_bound_and_unbound_plans_say_the_same(bound):
    plan = euler(3).bind(SPEC) if bound else euler(3)
    plan = apply_precision(plan, "int8", blocks=(1, -1))
    plan = apply_precision(plan, "bf16", blocks=(0, 1))
    plan = plan if bound else plan.bind(SPEC)
    found = precisions_of(plan.steps[0].variant, SPEC.blocks)
    assert found == (("bf16", "bf16"), *[("int8", "int8")] * (SPEC.blocks - 2), (None, None))


def test_a_site_counts_over_its_block():
    plan = apply_precision(apply_precision(euler(2), "int8"), "bf16", site="mlp", blocks=(0, 1)).bind(SPEC)
    found = precisions_of(plan.steps[0].variant, SPEC.blocks)
    assert found[0] == ("int8", "bf16") and found[1] == ("int8", "int8")


@pytest.mark.parametrize("bound", [False, True])
def test_two_precisions_of_one_block_are_an_error(bound):
    plan = apply_precision(euler(2).bind(SPEC) if bound else euler(2), "int8")
    with pytest.raises(PlanError, match="step 0.*two values, 'int8' and 'bf16'"):
        apply_precision(plan, "bf16")


def test_the_recipe_names_the_pass_and_repeats_it():
    plan = apply_precision(apply_guidance(euler(6), 3.0), "int8", first=1, high="bf16", blocks=(0, 3), site="mlp")
    assert plan.recipe.passes[-1][0] == "apply_precision"
    tail = plan.tail(0.5)
    assert said(tail) == ["bf16", "int8", "int8"] and tail.steps[1].variant.rules[0].site == "mlp"


def test_it_is_printed_and_survives_a_file(tmp_path):
    plan = apply_precision(euler(3), "int8", last=1, high="bf16")
    assert [line.split()[3] for line in str(plan).splitlines()[3:]] == ["int8", "int8", "bf16"]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").hash == plan.hash


def test_it_exports_as_a_step_policy():
    policy = to_step_policy(apply_precision(euler(6), "int8", first=2, last=1, high="bf16"))
    assert policy["first_steps"]["count"] == 2 and policy["last_steps"]["count"] == 1


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"precision": "int4"}, "precision 'int4'"),
        ({"high": "int3"}, "high 'int3'"),
        ({"site": "kv"}, "site 'kv'"),
        ({"first": -1}, "first=-1"),
        ({"last": 1.0}, r"last=1\.0"),
        ({"blocks": (1,)}, "blocks"),
    ],
)
def test_bad_arguments_name_themselves(arguments, fragment):
    with pytest.raises(ArgumentError, match=fragment):
        apply_precision(euler(3), **arguments)


def test_blocks_of_a_bound_plan_must_exist():
    with pytest.raises(ArgumentError, match="none of the model's"):
        apply_precision(euler(3).bind(SPEC), blocks=(0, 99))


@pytest.mark.parametrize(
    ("rule", "fragment"),
    [
        (Rule((0, 0), "kv", precision="int8"), "site 'kv'"),
        (Rule((0, 0), branches=("uncond",), precision="int8"), "branch 'uncond' alone"),
    ],
)
def test_what_nobody_runs_is_refused(rule, fragment):
    with pytest.raises(UnsupportedError, match=fragment):
        precisions_of(Variant(branches=("cond", "uncond"), rules=(rule,)), 4)
