"""Step masks of cache-dit: steps whose middle blocks give their last residual again, into rules and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.plans import edit, euler
from vivace.engine.bind import ModelSpec
from vivace.engine.interchange import apply_smoothcache, apply_step_mask, to_step_mask
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Action, Rule, Variant
from vivace.engine.planning import make_plan, replan
from vivace.errors import ArgumentError, UnsupportedError

SPEC = ModelSpec("toy", "f" * 64, "flow", (3, 32, 32), 6, (4, 4))
MASK = [1, 1, 0, 1, 0, 0, 1]
C, R = Action.COMPUTE, Action.REUSE


def config(mask=MASK, first=1, last=2, **changes):
    return {
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": last,
        "steps_computation_mask": mask,
        "num_inference_steps": len(mask),
        "steps_computation_policy": "static",
    } | changes


@pytest.fixture(scope="module")
def plan():
    return make_plan(NoiseSchedule.flow(), "flow_euler", 7, prediction="flow")


def test_zeros_reuse_the_residual_of_all_but_the_first_and_last_blocks(plan):
    made = apply_step_mask(plan, MASK, first=1, last=2)
    said = [step.variant.rules for step in made.steps]
    assert said == [(Rule((1, -2), "residual", action=C if value else R),) for value in MASK]
    assert len(made.variants) == 2
    assert made.bind(SPEC).steps == apply_step_mask(plan.bind(SPEC), MASK, first=1, last=2).steps
    assert made.bind(SPEC).steps[2].variant.rules == (Rule((1, 4), "residual", action=R),)


def test_without_numbers_the_first_eight_blocks_run_as_in_cache_dit(plan):
    assert apply_step_mask(plan, MASK).steps[2].variant.rules == (Rule((8, 0), "residual", action=R),)
    with pytest.raises(ArgumentError, match="first 8 and last 0 leave none of the model's 6"):
        apply_step_mask(plan.bind(SPEC), MASK)


@pytest.mark.parametrize(("first", "last"), [(1, 2), (0, 0), (3, 0), (0, 5)])
def test_a_config_comes_back_as_it_went_in(plan, first, last, tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps({"cache_config": config(first=first, last=last)}))
    for source in (config(first=first, last=last), path):
        made = apply_step_mask(plan, source)
        assert to_step_mask(made) == to_step_mask(made.bind(SPEC)) == config(first=first, last=last)


masks = st.lists(st.integers(0, 1), min_size=1, max_size=8).map(lambda tail: [1, *tail])


@given(masks, st.integers(0, 3), st.integers(0, 2), st.booleans())
def test_rows_come_back_bit_exact_without_the_recipe(mask, first, last, bound):
    bare = euler(len(mask)).bind(SPEC) if bound else euler(len(mask))
    made = apply_step_mask(bare, mask, first=first, last=last)
    out = to_step_mask(made)
    assert out["steps_computation_mask"] == mask
    if 0 in mask:
        assert apply_step_mask(bare, out) == made


def test_the_knobs_that_a_static_mask_ignores_are_accepted(plan):
    ignored = {
        "residual_diff_threshold": 0.08,
        "max_warmup_steps": 8,
        "max_cached_steps": -1,
        "enable_taylorseer": False,
    }
    assert apply_step_mask(plan, config(**ignored)) == apply_step_mask(plan, config())


def test_planning_anew_replays_the_pass_and_refuses_another_length(plan):
    made = apply_step_mask(plan, MASK, first=1)
    assert replan(made.recipe) == made
    with pytest.raises(ArgumentError, match="mask: 7 entries, but the plan evaluates the network 4 times"):
        replan(made.recipe, steps=4)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([0, 1, 1, 1, 1, 1, 1], ArgumentError, r"mask\[0\]: got 0"),
        ([1, 0, 5, 1, 1, 1, 1], ArgumentError, r"mask\[2\]: got 5"),
        ([1, 0], ArgumentError, "mask: 2 entries"),
        (config(steps_computation_policy="dynamic"), UnsupportedError, "steps_computation_policy: got 'dynamic'"),
        ({"steps_computation_mask": MASK}, UnsupportedError, "steps_computation_policy: got 'dynamic'"),
        (config(steps_computation_mask="fast"), ArgumentError, "got the name 'fast'; the list it stands for"),
        (config(steps_computation_mask=None), ArgumentError, "steps_computation_mask: got None; a list"),
        (config(Fn_compute_blocks=-1), ArgumentError, "Fn_compute_blocks: got -1; an integer >= 0"),
        (config(Bn_compute_blocks="2"), ArgumentError, "Bn_compute_blocks: got '2'"),
        (config(cache_type="DBPrune"), UnsupportedError, "cache_type: got 'DBPrune'"),
        (config(enable_taylorseer=True), UnsupportedError, "field 'enable_taylorseer' is not covered"),
        (config(force_refresh_step_hint=3), UnsupportedError, "field 'force_refresh_step_hint' is not covered"),
        ({"cache_config": []}, ArgumentError, "mask: cache_config: got"),
        ("nowhere.json", ArgumentError, "nowhere.json: cannot be read"),
    ],
)
def test_a_bad_mask_is_one_clear_error(plan, source, error, message):
    with pytest.raises(error, match=message):
        apply_step_mask(plan, source)


def variant(*said):
    return Variant(rules=tuple(Rule(blocks, site, action=action) for blocks, site, action in said))


def test_what_a_mask_cannot_say_names_the_row(plan):
    with pytest.raises(UnsupportedError, match="row 1 says REUSE of site 'attn'"):
        to_step_mask(apply_smoothcache(plan, {"attn": [1, 0, 0, 1, 1, 1, 1]}))
    bound = apply_step_mask(plan.bind(SPEC), MASK, first=1, last=2)
    ragged = variant(((1, 3), "residual", R), ((3, 4), "residual", C))
    with pytest.raises(UnsupportedError, match="evaluation 4 treats block 3 unlike block 1"):
        to_step_mask(edit(bound, 4, variant=ragged))
    with pytest.raises(UnsupportedError, match="row 4 reuses residual of block 1 from before"):
        to_step_mask(edit(bound, 3, variant=Variant(keep=64.0)))
    some = edit(edit(plan, 0, variant=variant(((1, 3), "residual", C))), 1, variant=variant(((1, 3), "residual", R)))
    with pytest.raises(UnsupportedError, match="only blocks 1 to 2 reuse; .* bind the plan"):
        to_step_mask(some)
    assert to_step_mask(some.bind(SPEC)) == config([1, 0, 1, 1, 1, 1, 1], 1, 3)


def test_a_plan_without_caching_is_a_mask_of_ones(plan):
    assert to_step_mask(plan) == config([1] * 7, 8, 0)
