"""SmoothCache schedules: layers that run and layers that repeat, into REUSE and COMPUTE rules and back."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.plans import edit, euler
from vivace.engine.bind import ModelSpec
from vivace.engine.interchange import apply_smoothcache, apply_step_policy, to_smoothcache, to_step_policy
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Action, Plan, Rule, Variant
from vivace.engine.planning import make_plan, replan
from vivace.errors import ArgumentError, PlanError, UnsupportedError

SPEC = ModelSpec("toy", "f" * 64, "flow", (3, 32, 32), 6, (4, 4))
C, R = Action.COMPUTE, Action.REUSE
ATTN, MLP = [1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 0, 1]
BY_BLOCK = {"attn": ATTN, "attn-2": [1, 0, 1, 0, 1, 1], "attn-0": [1] * 6, "ff-1": MLP}


@pytest.fixture(scope="module")
def plan():
    return make_plan(NoiseSchedule.flow(), "flow_euler", 6, prediction="flow")


def rules(plan, row):
    return [(rule.blocks, rule.site, rule.action) for rule in plan.steps[row].variant.rules]


def test_one_list_a_component_speaks_of_every_block(plan):
    made = apply_smoothcache(plan, {"attn1": ATTN, "attn2": ATTN, "ff": MLP})
    assert rules(made, 0) == [((0, 0), "attn", C), ((0, 0), "cross_attn", C), ((0, 0), "mlp", C)]
    assert rules(made, 1) == [((0, 0), "attn", R), ((0, 0), "cross_attn", R), ((0, 0), "mlp", C)]
    assert [replace(step, variant=Variant()) for step in made.steps] == list(plan.steps)
    assert len(made.variants) == 3  # what is compiled: CC, RC, RR
    assert made.bind(SPEC).steps == apply_smoothcache(plan.bind(SPEC), {"attn1": ATTN, "attn2": ATTN, "ff": MLP}).steps


def test_a_list_of_one_block_goes_before_the_general_one(plan):
    made = apply_smoothcache(plan, BY_BLOCK)
    assert rules(made, 1) == [
        ((0, 1), "attn", C),
        ((1, 3), "attn", R),
        ((3, 0), "attn", R),
        ((1, 2), "mlp", C),
    ]
    bound = made.bind(SPEC)
    assert ((1, 6), "attn", R) in rules(bound, 1) and ((2, 3), "attn", C) in rules(bound, 2)


@pytest.mark.parametrize("schedule", [{"attn": ATTN, "mlp": MLP}, {"attn1": ATTN}, BY_BLOCK, {"mlp-5": MLP}])
def test_a_schedule_comes_back_as_it_went_in(plan, schedule, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(schedule))
    made = apply_smoothcache(plan, path)
    assert to_smoothcache(made) == to_smoothcache(made.bind(SPEC)) == schedule
    made.save(tmp_path / "plan.json")
    assert to_smoothcache(Plan.load(tmp_path / "plan.json")) == schedule


lists = st.lists(st.integers(0, 1), min_size=5, max_size=5).map(lambda tail: [1, *tail])
keys = st.sampled_from(["attn", "mlp", "cross_attn", "attn-0", "attn-3", "mlp-1", "cross_attn-4"])


@given(st.dictionaries(keys, lists, min_size=1), st.booleans())
def test_rows_come_back_bit_exact_without_the_recipe(schedule, bound):
    bare = euler(6).bind(SPEC) if bound else euler(6)
    made = apply_smoothcache(bare, schedule)
    again = apply_smoothcache(bare, to_smoothcache(made))
    assert again.bind(SPEC).steps == made.bind(SPEC).steps


def test_names_of_the_target_model_can_be_chosen(plan):
    made = apply_smoothcache(plan, {"attn": ATTN, "mlp": MLP})
    assert to_smoothcache(made, names={"attn": "attn1", "mlp": "ff"}) == {"attn1": ATTN, "ff": MLP}
    other = apply_smoothcache(plan, {"self_attention": ATTN}, components={"self_attention": "attn"})
    assert rules(other, 1) == [((0, 0), "attn", R)] and to_smoothcache(other) == {"self_attention": ATTN}


def test_planning_anew_replays_the_pass_and_refuses_another_length(plan):
    made = apply_smoothcache(plan, {"attn": ATTN})
    assert replan(made.recipe) == made
    with pytest.raises(ArgumentError, match="attn: 6 entries, but the plan evaluates the network 5 times"):
        replan(made.recipe, steps=5)


def test_guidance_before_or_after_caches_every_branch(plan):
    after = apply_guidance(apply_smoothcache(plan, {"attn": ATTN}), 3.0)
    before = apply_smoothcache(apply_guidance(plan, 3.0), {"attn": ATTN})
    assert after.steps == before.steps and to_smoothcache(after) == {"attn": ATTN}
    with pytest.raises(PlanError, match="branch 'uncond' needs 1 kept"):  # its first row would have nothing to reuse
        apply_smoothcache(apply_guidance(plan, 3.0, interval=(0.2, 1.0)), {"attn": ATTN})


def test_precision_and_caching_are_columns_of_their_own(plan):
    policy = to_step_policy(apply_step_policy(plan, POLICY))
    both = apply_step_policy(apply_smoothcache(plan, BY_BLOCK), policy)
    for made in (both, both.bind(SPEC)):
        assert to_smoothcache(made) == BY_BLOCK and to_step_policy(made) == policy


POLICY = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 1, "mode": "a16"},
    "last_steps": {"count": 2, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "native",
}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({}, "no component in it"),
        ({"norm": ATTN}, "component 'norm' is unknown; known: attn"),
        ({"attn": "101010"}, "attn: got '101010'; a list of 0 and 1"),
        ({"attn": [1, 0, 2, 1, 1, 1]}, r"attn\[2\]: got 2; 0 \(reuse\) or 1"),
        ({"attn": [1, 0, True, 1, 1, 1]}, r"attn\[2\]: got True"),
        ({"attn": [1, 0]}, "attn: 2 entries, but the plan evaluates the network 6 times"),
        ({"attn": [0, 1, 1, 1, 1, 1]}, r"attn\[0\]: got 0; the first evaluation has nothing to reuse"),
        ({"attn-x": ATTN}, "key 'attn-x'; a component, or component-block"),
        ({"attn": ATTN, "attn1": MLP}, "key 'attn1' speaks of the same layers"),
        ({"attn-9": ATTN}, "block 9 of site 'attn'; the model has 6 blocks"),
        ([1, 0], "schedule: got list; a mapping, or the path"),
    ],
)
def test_a_bad_schedule_is_one_clear_error(plan, schedule, message):
    with pytest.raises(ArgumentError, match=message):
        apply_smoothcache(plan.bind(SPEC), schedule)


def variant(*said, branches=("cond",)):
    return Variant(branches=branches, rules=tuple(Rule(blocks, site, action=action) for blocks, site, action in said))


def test_what_a_schedule_cannot_say_names_the_first_row(plan):
    made = apply_smoothcache(plan, {"attn": ATTN})
    kept = Rule((0, 0), "block", action=C), Rule((0, 0), "attn", action=C)
    first = edit(made, 0, variant=Variant(rules=kept))
    with pytest.raises(UnsupportedError, match="row 1 says REUSE of site 'block', block 0, branch 'cond'"):
        to_smoothcache(edit(first, 1, variant=variant(((0, 0), "block", R))))
    perturbed = variant(((0, 0), "attn", Action.IDENTITY))
    with pytest.raises(UnsupportedError, match="row 2 says IDENTITY of site 'attn'"):
        to_smoothcache(edit(made, 2, variant=perturbed))
    with pytest.raises(
        UnsupportedError, match="row 4 reuses attn of block 0 from before the last row that computed it"
    ):
        to_smoothcache(edit(made, 3, variant=Variant()))
    guided = apply_guidance(made, 3.0)
    one = Variant(branches=("cond", "uncond"), rules=(Rule((0, 0), "attn", ("cond",), action=R),))
    with pytest.raises(UnsupportedError, match="row 2 treats attn differently by branch"):
        to_smoothcache(edit(guided, 2, variant=one))
    last = [(1, variant(((-1, 0), "attn", R))), (0, variant(((-1, 0), "attn", C)))]
    from_the_end = edit(edit(plan, *[last[0][0]], variant=last[0][1]), last[1][0], variant=last[1][1])
    with pytest.raises(UnsupportedError, match="block -1 from the end has a list of its own; .* bind the plan"):
        to_smoothcache(from_the_end)
    assert to_smoothcache(from_the_end.bind(SPEC)) == {"attn-5": [1, 0, 1, 1, 1, 1]}


def test_a_plan_without_caching_is_an_empty_schedule(plan):
    assert to_smoothcache(plan) == {}
