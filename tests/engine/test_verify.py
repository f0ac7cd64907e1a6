from dataclasses import replace

import numpy as np
import pytest

from tests.engine.plans import GUIDED, edit, euler, guided_row, plan_of
from vivace.engine.plan import Action, Affine, AgeRef, Guard, InputRef, Rule, TensorRef, Transform, Variant
from vivace.engine.plan_io import tensor_infos
from vivace.engine.verify import verify
from vivace.errors import PlanError


def refused(plan, *fragments):
    with pytest.raises(PlanError) as caught:
        verify(plan)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)


def with_ops(*ops):
    plan = euler()
    return edit(plan, 1, ops=(*ops, *plan.steps[1].ops))


def ruled(*rules_per_row, blocks=None, forecast=(), **variant):
    """Euler rows whose variants carry rules."""
    plan = euler(len(rules_per_row))
    for i, rules in enumerate(rules_per_row):
        plan = edit(plan, i, variant=Variant(rules=tuple(rules), **variant), forecast=forecast)
    return plan


def test_legal_plans_pass_unchanged():
    plan = euler()
    assert verify(plan) is plan
    verify(plan_of(guided_row(), prediction="eps"))


def test_reading_an_empty_slot_names_row_slot_and_live_slots():
    refused(with_ops(Affine("y", (("m1", 1.0),))), "step 1", "'m1'", "live: out, x", "earlier evaluation")


def test_plan_without_rows_is_rejected():
    refused(plan_of(), "no rows")


def test_unknown_prediction_is_rejected():
    refused(replace(euler(), prediction="score"), "'score'", "eps, x0, v, flow")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1, True, np.float32(1.0), "1", None])
@pytest.mark.parametrize("field", ["timestep", "alpha", "sigma", "x_scale"])
def test_numbers_of_a_row_are_finite_floats(field, value):
    refused(edit(euler(), 1, **{field: value}), "step 1", field)


@pytest.mark.parametrize("value", [float("nan"), 1])
def test_coefficients_are_finite_floats(value):
    refused(with_ops(Affine("y", (("x", value),))), "step 1")
    refused(with_ops(Affine("y", (("x", AgeRef((1.0, 0.5, value))),))), "step 1")
    refused(with_ops(Affine("y", (("x", InputRef("w", value)),))), "step 1")


def test_level_needs_a_signal_or_noise():
    refused(edit(euler(), 1, alpha=0.0, sigma=0.0), "step 1", "not both 0")
    refused(edit(euler(), 1, alpha=-0.5), "step 1", ">= 0")


def test_rising_noise_is_rejected_unless_marked_restart():
    plan = edit(euler(), 2, alpha=0.1, sigma=0.9)
    refused(plan, "step 2", "rises", "restart=True")
    verify(edit(plan, 2, restart=True))


def test_reserved_slots_are_read_only():
    for slot in ("noise:0", "one", "input:start"):
        refused(with_ops(Affine(slot, (("x", 1.0),))), "step 1", "reserved")


def test_slot_names_are_plain():
    refused(with_ops(Affine("M 0", (("x", 1.0),))), "step 1", "slot name")


def test_output_stamped_with_the_wrong_time_is_rejected():
    plan = euler()
    late = Affine("m0", (("x", 1.0), ("early", -1.0)))
    first = edit(plan, 0, outs=("early",), ops=(Affine("x", (("early", 1.0),)),))
    refused(edit(first, 1, ops=(late,)), "step 1", "stamped row 1", "output of row 0", "at=0")
    verify(edit(first, 1, ops=(replace(late, at=0),)))
    refused(edit(first, 1, ops=(replace(late, at=2),)), "step 1", "stamped row 2")


def test_outs_match_branches():
    refused(edit(euler(), 1, variant=GUIDED), "step 1", "one slot per branch")
    refused(edit(euler(), 1, variant=Variant(branches=("uncond",))), "step 1", "need 'cond'")


def test_side_car_tensors_must_exist_and_be_unique():
    plan = with_ops(Affine("y", (("x", TensorRef("mean")),)))
    refused(plan, "step 1", "'mean'", "side-car")
    infos = tensor_infos({"mean": np.ones((3, 2, 2), np.float32)})
    verify(replace(plan, tensors=infos))
    refused(replace(plan, tensors=infos * 2), "share a key")


def test_transforms_are_known_and_complete():
    refused(with_ops(Transform("blur", "x")), "step 1", "'blur'", "clamp")
    refused(with_ops(Transform("clamp", "x", (), (("low", -1.0),))), "step 1", "low", "high")
    verify(with_ops(Transform("clamp", "x", (), (("low", -1.0), ("high", 1.0)))))


def test_row_without_evaluation_may_not_read_an_unwritten_output():
    refused(edit(euler(), 0, variant=None), "step 0", "'out'")


def test_first_evaluated_row_is_full():
    refused(edit(euler(), 0, variant=Variant(keep=0.5)), "step 0", "must be full")
    refused(ruled([Rule((0, 2), action=Action.REUSE)], []), "step 0", "must be full")


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_keep_is_a_share(keep):
    refused(edit(euler(), 1, variant=Variant(keep=keep)), "step 1", "keep")


def test_reuse_before_compute_is_rejected():
    compute, reuse = Rule((0, 2), action=Action.COMPUTE), Rule((0, 2), action=Action.REUSE)
    refused(ruled([], [reuse]), "step 1", "REUSE", "COMPUTE rule")
    verify(ruled([compute], [reuse]))
    refused(ruled([Rule((0, 1), action=Action.COMPUTE)], [reuse]), "block 1")
    refused(ruled([replace(compute, site="attn")], [reuse]), "site 'block'")


def test_caches_never_cross_models():
    plan = ruled([Rule((0, 2), action=Action.COMPUTE)], [Rule((0, 2), action=Action.REUSE)])
    other = replace(plan.steps[1].variant, model="second")
    refused(edit(plan, 1, variant=other), "model 'second'")


def test_forecast_needs_enough_kept_values_and_weights():
    keep = Rule((0, 1), action=Action.COMPUTE, order=1)
    ask = Rule((0, 1), action=Action.FORECAST, order=1)
    refused(ruled([keep], [ask], forecast=(2.0, -1.0)), "step 1", "needs 2 kept")
    verify(ruled([keep], [keep], [ask], forecast=(2.0, -1.0)))
    refused(ruled([keep], [keep], [ask], forecast=(2.0,)), "step 2", "2 weights")


def test_two_rules_on_one_field_conflict():
    one = Rule((0, 4), precision="bf16")
    refused(ruled([one, Rule((2, 6), precision="int8")]), "two values", "precision")
    verify(ruled([one, Rule((2, 6), action=Action.COMPUTE)]))
    verify(ruled([one, Rule((2, 6), site="attn", precision="int8")]))


@pytest.mark.parametrize(
    "rule",
    [
        Rule((2, 2)),
        Rule((-1, -2)),
        Rule((0, 1), site="norm"),
        Rule((0, 1), branches=("uncond",)),
        Rule((0, 1), order=2),
        Rule((0, 1), precision="fp4"),
        Rule((0, 1), store="float"),
        Rule((0, 1), share=0.0),
    ],
)
def test_illegal_rules_are_rejected(rule):
    refused(ruled([rule]), "step 0")


def test_guard_variants_agree_on_slots():
    guard = Guard("cosine", "above", 0.99, Variant())
    row = guided_row(guard=guard)
    verify(plan_of(row, prediction="eps"))
    refused(edit(euler(), 1, guard=replace(guard, otherwise=GUIDED)), "step 1", "agree on slots")
    refused(plan_of(replace(row, guard=replace(guard, rule="near")), prediction="eps"), "'near'")
    refused(edit(euler(), 1, variant=None, ops=(), guard=guard), "step 1", "nothing to choose")


def test_the_result_slot_must_be_written():
    plan = euler()
    steps = tuple(replace(s, x="y", ops=(Affine("y", (("y", 1.0), ("out", -0.1))),)) for s in plan.steps)
    refused(replace(plan, steps=steps, init=(Affine("y", (("noise:0", 1.0),)),)), "slot 'x'")
