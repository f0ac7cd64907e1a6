"""`diffusion_step_policy`: a checkpoint's first and last steps in 16 bit, into a plan's precisions and back."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.plans import edit, euler
from vivace.engine.bind import ModelSpec
from vivace.engine.interchange import apply_smoothcache, apply_step_mask, apply_step_policy, to_step_policy
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Guard, Rule, Variant
from vivace.engine.planning import make_plan, replan
from vivace.errors import ArgumentError, PlanError, UnsupportedError

SPEC = ModelSpec("toy", "f" * 64, "flow", (3, 32, 32), 6, (4, 4))


def policy(first=3, last=3, **changes):
    """What the published FP8 checkpoints carry."""
    return {
        "schema_version": 1,
        "type": "first_last_n",
        "index_space": "denoising_loop_iteration",
        "scope": ["transformer"],
        "default_mode": "native",
        "first_steps": {"count": first, "mode": "a16"},
        "last_steps": {"count": last, "mode": "a16"},
        "overlap": "a16",
        "reasoner": "a16",
    } | changes


def config(**runtime):
    """The part of a transformer/config.json that holds a policy."""
    return {
        "_class_name": "Transformer",
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "runtime": runtime},
    }


def precisions(plan):
    """One letter a row: b bf16, f fp8, i int8, - unsaid."""
    rows = [{rule.precision for rule in step.variant.rules} for step in plan.steps]
    return "".join((row.pop() or "-")[0] if row else "-" for row in rows)


@pytest.fixture(scope="module")
def plan():
    return make_plan(NoiseSchedule.flow(), "flow_euler", 10, prediction="flow")


def test_the_first_and_last_rows_are_in_16_bit_and_nothing_else_changes(plan):
    made = apply_step_policy(plan, policy())
    assert precisions(made) == "bbbffffbbb"
    assert [replace(step, variant=Variant()) for step in made.steps] == list(plan.steps)
    assert (made.init, made.prediction) == (plan.init, plan.prediction)
    bound = made.bind(SPEC)
    assert bound.steps[3].variant.rules == (Rule((0, 6), precision="fp8"),)
    assert bound.steps == apply_step_policy(plan.bind(SPEC), policy()).steps


@pytest.mark.parametrize("changes", [{}, {"reasoner": "native"}, {"scope": ["transformer", "vae"]}])
def test_a_policy_comes_back_as_it_went_in(plan, changes):
    made = apply_step_policy(plan, policy(2, 0, **changes))
    assert to_step_policy(made) == to_step_policy(made.bind(SPEC)) == policy(2, 0, **changes)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(2, 12), st.sampled_from(["fp8", "int8", None]))
def test_rows_come_back_bit_exact_without_the_recipe(first, last, steps, native):
    bare = euler(steps)
    made = apply_step_policy(bare, policy(first, last), native=native)
    assert apply_step_policy(bare, to_step_policy(made), native=native) == made


def test_a_run_of_one_step_is_native_whatever_the_counts(plan):
    one = replan(apply_step_policy(plan, policy()).recipe, steps=1)
    assert precisions(one) == "f" and to_step_policy(one) == policy()
    with pytest.raises(UnsupportedError, match="row 0 .* runs of one step are always native"):
        to_step_policy(edit(euler(1), 0, variant=Variant(rules=(Rule((0, 0), precision="bf16"),))))


def test_planning_anew_and_image_to_image_count_their_own_rows(plan):
    made = apply_guidance(apply_step_policy(plan, policy(2, 1)), 3.0)
    assert precisions(replan(made.recipe, steps=5)) == "bbffb"
    assert precisions(made.tail(0.4)) == "bbfb"
    assert [name for name, _ in made.tail(0.4).recipe.passes] == ["apply_step_policy", "apply_guidance"]


def test_rows_count_evaluations_so_heun_has_two_a_step():
    plan = make_plan(NoiseSchedule.flow(), "flow_heun", 3, prediction="flow")
    assert plan.nfe == 5 and precisions(apply_step_policy(plan, policy(2, 1))) == "bbffb"


def test_a_config_its_file_and_the_policy_alone_mean_the_same(plan, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(diffusion_step_policy=policy())))
    whole = config(diffusion_step_policy=policy())
    for source in (whole, whole["quantization_config"], path, str(path)):
        assert apply_step_policy(plan, source) == apply_step_policy(plan, policy())


@pytest.mark.parametrize(("algorithm", "letter"), [("FP8", "f"), ("W8A8", "i"), ("NVFP4", "-")])
def test_native_is_what_the_checkpoint_is_quantized_to(plan, algorithm, letter):
    whole = config(diffusion_step_policy=policy(1, 0))
    whole["quantization_config"]["quant_algo"] = algorithm
    made = apply_step_policy(plan, whole)
    assert precisions(made) == "b" + letter * 9 and to_step_policy(made) == policy(1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version: got 2; 1 is needed"),
        ({"schema_version": True}, "schema_version: got True"),
        ({"type": "every_n"}, "type: got 'every_n'; 'first_last_n' is needed"),
        ({"index_space": "timestep"}, "index_space: got 'timestep'"),
        ({"default_mode": "a16"}, "default_mode: got 'a16'; 'native' is needed"),
        ({"overlap": "native"}, "overlap: got 'native'; 'a16' is needed"),
        ({"scope": ["vae"]}, "scope: got .'vae'.; a list of names with 'transformer'"),
        ({"reasoner": "fp8"}, "reasoner: got 'fp8'"),
        ({"first_steps": 3}, "first_steps: got 3; {'count'"),
        ({"first_steps": {"count": 3, "mode": "fp8"}}, "first_steps: got .*'fp8'"),
        ({"last_steps": {"count": -1, "mode": "a16"}}, "last_steps.count: got -1; an integer >= 0"),
        ({"last_steps": {"count": 1.0, "mode": "a16"}}, "last_steps.count: got 1.0"),
        ({"middle_steps": {}}, "field 'middle_steps' is unknown"),
    ],
)
def test_a_wrong_field_is_named(plan, change, message):
    with pytest.raises(ArgumentError, match=f"quantization_config: runtime: diffusion_step_policy: {message}"):
        apply_step_policy(plan, config(diffusion_step_policy=policy(**change)))


def test_a_missing_field_and_a_missing_policy_are_named(plan, tmp_path):
    for field in policy():
        partial = policy()
        del partial[field]
        with pytest.raises(ArgumentError, match=f"policy: field '{field}' is missing"):
            apply_step_policy(plan, partial)
    with pytest.raises(ArgumentError, match="holds no runtime.diffusion_step_policy"):
        apply_step_policy(plan, {"_class_name": "Transformer"})
    nothing = copy.deepcopy(config())
    nothing["quantization_config"]["runtime"] = None
    with pytest.raises(ArgumentError, match="quantization_config: runtime: got None"):
        apply_step_policy(plan, nothing)
    with pytest.raises(ArgumentError, match=r"absent.json: cannot be read"):
        apply_step_policy(plan, tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"broken.json: not JSON"):
        apply_step_policy(plan, tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ArgumentError, match=r"list.json: the file holds a list"):
        apply_step_policy(plan, tmp_path / "list.json")
    with pytest.raises(ArgumentError, match="policy: got int"):
        apply_step_policy(plan, 3)
    with pytest.raises(ArgumentError, match="native 'fp4'"):
        apply_step_policy(plan, policy(), native="fp4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100 + "]" * 100, "nested deeper than 32 levels"),
        ('{"type": "a", "type": "b"}', "key 'type' stands twice"),
        ('{"count": NaN}', "NaN is not a number"),
        ('{"count": 1e999}', "beyond float64"),
        ("\udcff", "not UTF-8 at byte 0"),
    ],
)
def test_a_hostile_file_is_one_clear_error(plan, text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for read in (apply_step_policy, apply_smoothcache, apply_step_mask):
        with pytest.raises(ArgumentError, match=f"config.json: .*{message}"):
            read(plan, path)


def test_a_plan_with_precisions_or_other_models_is_refused(plan):
    with pytest.raises(PlanError, match="row 0 states a precision already"):
        apply_step_policy(apply_step_policy(plan, policy()), policy())
    with pytest.raises(UnsupportedError, match="row 4 evaluates model 'low'"):
        apply_step_policy(edit(plan, 4, variant=Variant(model="low")), policy())
    guard = Guard("change", "below", 0.1, Variant())
    with pytest.raises(UnsupportedError, match="row 2 has a guard"):
        to_step_policy(edit(plan, 2, guard=guard))


def variant(*rules):
    return Variant(rules=tuple(Rule(blocks, site, precision=precision) for blocks, site, precision in rules))


@pytest.mark.parametrize(
    ("row", "rules", "message"),
    [
        (5, [((0, 0), "block", "bf16")], "row 5 is in bf16 between rows that are not"),
        (5, [((0, 0), "block", "int8")], "row 5 is in int8; a policy tells bf16 .*native, here fp8"),
        (9, [((0, 0), "block", "fp32")], "row 9 is in fp32"),
        (4, [((0, 3), "block", "fp8")], "row 4 states precisions by block"),
        (4, [((0, 0), "attn", "fp8")], "row 4 states precisions by block, site or branch"),
        (6, [], "row 6 is in no stated precision"),
    ],
)
def test_what_a_policy_cannot_say_names_the_first_row(plan, row, rules, message):
    with pytest.raises(UnsupportedError, match=message):
        to_step_policy(edit(apply_step_policy(plan, policy()), row, variant=variant(*rules)))
