from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.plans import edit, euler, plan_of
from vivace.engine.bind import ModelSpec, normal_form
from vivace.engine.plan import Action, Rule, Variant
from vivace.engine.plan_io import tensor_infos
from vivace.errors import PlanError, ShapeError

SPEC = ModelSpec("toy", "f" * 64, "flow", (3, 32, 32), 6, (4, 4), token_group=8)


def test_ranges_from_the_end_and_shares_become_absolute():
    keys, reads = (Rule((0, 0), "kv", action=action) for action in (Action.COMPUTE, Action.REUSE))
    rules = (Rule((-2, 0), action=Action.COMPUTE), Rule((0, -2), precision="bf16"), keys)
    some = Variant(rules=(reads,), keep=0.3, selector="norm")
    bound = edit(edit(euler(), 0, variant=Variant(rules=rules)), 1, variant=some).bind(SPEC)
    spread = Rule((0, 6), "kv", action=Action.COMPUTE)
    assert bound.steps[0].variant.rules == (Rule((0, 4), precision="bf16"), spread, Rule((4, 6), action=Action.COMPUTE))
    assert bound.steps[0].variant.keep == 64.0
    assert bound.steps[1].variant.keep == 16.0  # 0.3 * 64 = 19.2, to the token group of 8
    assert bound.binding.tokens == 64 and bound.binding.blocks == 6


def test_binding_twice_is_the_same_plan_and_to_another_shape_an_error():
    bound = euler().bind(SPEC)
    assert bound.bind(SPEC) is bound
    with pytest.raises(PlanError, match="is bound to"):
        bound.bind(SPEC, (3, 16, 16))


def test_wrong_prediction_shape_branches_and_ranges_are_refused():
    with pytest.raises(PlanError, match="predicts 'eps'"):
        euler().bind(replace(SPEC, prediction="eps"))
    with pytest.raises(ShapeError, match="multiple of the patch"):
        euler().bind(SPEC, (3, 30, 32))
    with pytest.raises(ShapeError, match="need one like"):
        euler().bind(SPEC, (4, 32, 32))
    with pytest.raises(PlanError, match="outside a model of 6 blocks"):
        edit(euler(), 0, variant=Variant(rules=(Rule((5, 9), precision="bf16"),))).bind(SPEC)
    with pytest.raises(PlanError, match="not offered"):
        plan = edit(euler(), 0, variant=Variant(branches=("cond", "uncond")), outs=("a", "out"))
        plan.bind(replace(SPEC, branches=("cond",)))


def test_conflicts_that_only_the_model_size_shows_are_found():
    rules = (Rule((0, 5), precision="bf16"), Rule((-2, 0), precision="int8"))
    plan = edit(euler(), 0, variant=Variant(rules=rules))
    plan.bind(replace(SPEC, blocks=7))
    with pytest.raises(PlanError, match="two values"):
        plan.bind(SPEC)


def test_side_car_shape_must_be_the_latent():
    arrays = {"mean": np.zeros((3, 8, 8), np.float32)}
    plan = replace(plan_of(*euler().steps), tensors=tensor_infos(arrays), arrays=arrays)
    with pytest.raises(PlanError, match="side-car tensor 'mean'"):
        plan.bind(SPEC)


rules = st.lists(
    st.builds(
        lambda a, n, site, branches: Rule((a, a + n), site, branches, action=Action.COMPUTE, order=1),
        st.integers(0, 5),
        st.integers(1, 6),
        st.sampled_from(["block", "attn", "mlp"]),
        st.sampled_from([None, ("cond",), ("uncond",)]),
    ),
    max_size=5,
)


@given(rules, st.randoms())
def test_normal_form_is_unique_and_idempotent(some, random):
    branches = ("cond", "uncond")
    form = normal_form(tuple(some), branches)
    assert normal_form(form, branches) == form
    split = [
        replace(r, blocks=(b, b + 1), branches=(c,))
        for r in some
        for b in range(*r.blocks)
        for c in r.branches or branches
    ]
    random.shuffle(split)
    assert normal_form(tuple(split), branches) == form
