import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.plans import GUIDED, edit, euler, guided_row, plan_of
from vivace.engine.plan import (
    Action,
    Affine,
    AgeRef,
    Args,
    Binding,
    Guard,
    InputRef,
    Plan,
    Recipe,
    Rule,
    Step,
    TensorRef,
    Transform,
    Variant,
)
from vivace.engine.plan_codec import decode, encode_fields
from vivace.engine.plan_io import canonical, tensor_infos
from vivace.errors import OutputError, PlanError, PlanFileError


def everything():
    """A legal plan that uses every type and every field of the schema."""
    arrays = {"mean": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 2, 2)}
    kept, read = (Rule((0, 0), "kv", None, action) for action in (Action.COMPUTE, Action.REUSE))
    both = ("cond", "uncond")
    compute = Variant("main", both, (Rule((0, 2), "attn", ("cond",), Action.COMPUTE, 1, "bf16", "int8"), kept))
    rules = (Rule((0, 2), "attn", ("cond",), Action.FORECAST, 1), Rule((2, 4), "mlp", share=0.5))
    cached, some = Variant("main", both, rules), Variant("main", both, (read,), 0.5, "norm", (("starvation", 0.25),))
    ops = (
        Affine("y", (("x", TensorRef("mean")), ("one", AgeRef((1.0, 0.5, 0.0))), ("noise:3", InputRef("w", -0.0))), 1),
        Transform("cfg_rescale", "y", ("x",), (("phi", 0.7),)),
        Affine("x", (("x", 0.5), ("y", 1e-300), ("input:mask", 0.1))),
    )
    guard = Guard("cosine", "above", 0.99, Variant(), (1.0, 2.0), True)
    last = Step(0.1, 0.99, 0.1, ops, cached, "x", 0.3, ("a", "b"), (("scale", 2.5),), (2.0, -1.0), guard, True)
    first = [*(guided_row(variant=compute) for _ in range(2)), guided_row(variant=some)]
    recipe = Recipe("make_plan", Args.of({"steps": 3, "options": {"order": 2, "table": [1.5, None, True, "a"]}}), 0.5,
                    (("apply_guidance", Args.of({"scale": 4.0})),))  # fmt: skip
    plan = plan_of(*first, last, prediction="eps", recipe=recipe, tensors=tensor_infos(arrays), arrays=arrays)
    return plan


def test_round_trip_is_exact(tmp_path):
    plan = everything()
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan and back.hash == plan.hash and canonical(back) == canonical(plan)
    assert np.array_equal(back.arrays["mean"], plan.arrays["mean"])
    assert str(back.steps[3].ops[0].terms[2][1].default) == "-0.0"


def test_bound_plan_round_trips(tmp_path):
    binding = Binding("abc", 4, 64, 1, (3, 8, 8))
    kept, read = (Rule((0, 4), "kv", action=action) for action in (Action.COMPUTE, Action.REUSE))
    plan = replace(edit(euler(), 1, variant=Variant(keep=64.0)), binding=binding)
    some = Variant(rules=(read,), keep=16.0, selector="random", selector_params=(("drop_high", 0.5),))
    plan = edit(edit(plan, 0, variant=Variant(rules=(kept,), keep=64.0)), 2, variant=some)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_every_float64_survives_the_file_form(values):
    a, b, c = values
    plan = plan_of(Step(a, 1.0, 0.0, (Affine("x", (("x", b), ("out", InputRef("w", c)))),)))
    back = decode(json.loads(canonical(plan)))
    assert canonical(back) == canonical(plan) and repr(back) == repr(replace(plan, arrays={}))


def test_hash_sees_every_number_and_tensor_byte():
    plan = everything()
    arrays = {"mean": np.nextafter(plan.arrays["mean"], 2, dtype=np.float32)}
    others = [
        edit(plan, 0, timestep=np.nextafter(500.0, 501.0)),
        edit(plan, 2, x_scale=0.25),
        replace(plan, tensors=tensor_infos(arrays), arrays=arrays),
        edit(plan, 0, variant=GUIDED),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 5


def damaged(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert "plan.json" in message or isinstance(caught.value, PlanError)
    assert len(message.splitlines()) == 1, message
    return message


def text_of(plan):
    return canonical(plan).decode()


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda s: s.replace('"alpha":0.5', '"alpha":NaN', 1), "NaN"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":-Infinity', 1), "Infinity"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":1e400', 1), "beyond float64"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":1', 1), "not a float"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":true', 1), "not a float"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":"0.5"', 1), "not a float"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":' + "9" * 5000, 1), "too long"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":0.5,"alpha":0.5', 1), "twice"),
        (lambda s: s.replace('"alpha":0.5', '"alpha":0.5,"beta":0.5', 1), "unknown"),
        (lambda s: s.replace('"alpha":0.5,', "", 1), "missing"),
        (lambda s: s.replace('"version":1', '"version":2'), "version"),
        (lambda s: s.replace('"version":1', '"version":true'), "version"),
        (lambda s: s.replace("vivace-plan", "other"), "not a plan"),
        (lambda s: s[: len(s) // 2], "not JSON"),
        (lambda s: "", "not JSON"),
        (lambda s: "[" * 100_000, "deeper"),
        (lambda s: b"\xff\xfe", "UTF-8"),
        (lambda s: "[]", "not an object"),
        (lambda s: s.replace('"affine"', '"python"', 1), "affine or transform"),
    ],
)
def test_damaged_files_get_one_clear_error(change, fragment, tmp_path):
    text = text_of(plan_of(guided_row(), prediction="eps"))
    changed = change(text)
    assert changed != text
    assert fragment in damaged(changed, tmp_path)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    text, rng = text_of(everything()), random.Random(0)
    everything().save(tmp_path / "plan.json")
    for _ in range(1500):
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 30)]
                case 2:
                    data[at:at] = rng.choice([b"{", b"]", b"-", b"1e999", b'"', b"null", b"\x00"])
        (tmp_path / "plan.json").write_bytes(bytes(data))
        try:
            Plan.load(tmp_path / "plan.json")
        except PlanError:
            pass


def test_lying_side_cars_are_refused(tmp_path):
    plan = everything()
    plan.save(tmp_path / "plan.json")
    side = tmp_path / "plan.safetensors"
    good = side.read_bytes()
    side.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(PlanFileError, match="mean"):
        Plan.load(tmp_path / "plan.json")
    side.write_bytes(good[:20])
    with pytest.raises(PlanFileError, match="damaged"):
        Plan.load(tmp_path / "plan.json")
    side.unlink()
    with pytest.raises(PlanFileError, match="cannot be read"):
        Plan.load(tmp_path / "plan.json")


def test_missing_file_and_unwritable_place_are_one_line(tmp_path):
    with pytest.raises(PlanFileError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(OutputError, match="cannot be written"):
        euler().save(tmp_path / "no" / "plan.json")
    assert os.listdir(tmp_path) == []


def test_an_illegal_plan_is_never_written(tmp_path):
    with pytest.raises(PlanError):
        edit(euler(), 1, alpha=float("nan")).save(tmp_path / "plan.json")
    assert os.listdir(tmp_path) == []


def test_defaults_are_left_out_of_the_file():
    assert encode_fields(Variant()) == {}
    assert encode_fields(Step(1.0, 1.0, 0.0, ())) == {"timestep": 1.0, "alpha": 1.0, "sigma": 0.0, "ops": []}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_side_car_holds_finite_numbers(value):
    with pytest.raises(PlanError, match="'gain' holds NaN or infinity"):
        tensor_infos({"gain": np.array([1.0, value])})
