"""Writes tests/engine/corpus: python -m tests.engine.hostile. Each file breaks one promise of the plan format.

A name says what is wrong. `name.json` is the plan, `name.safetensors` its side-car. What git cannot hold (links, pipes,
directories, megabytes) is made by the test itself.
"""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np

from tests.engine.plans import edit, euler, guided_row, plan_of
from vivace.engine.bind import ModelSpec
from vivace.engine.plan import Affine, Step, TensorRef
from vivace.engine.plan_io import canonical, tensor_infos

CORPUS = Path(__file__).with_name("corpus")
SPEC = ModelSpec("toy", "0" * 64, "flow", (3, 8, 8), 4, (4, 4), token_group=2)
ROW = '"alpha": 0.5'


def text(**changes):
    """One legal guided row as JSON text, with fields of the plan replaced."""
    data = json.loads(canonical(plan_of(guided_row(), prediction="eps")))
    return json.dumps({**data, **changes})


def row(**changes):
    """The same with fields of its row replaced."""
    data = json.loads(text())
    data["steps"][0].update(changes)
    return json.dumps(data)


def ops(*made):
    return row(ops=list(made))


def terms(*made, dst="x"):
    return ops({"op": "affine", "dst": dst, "terms": list(made)})


def ruled(**rule):
    return row(variant={"branches": ["cond", "uncond"], "rules": [{"blocks": [0, 2], **rule}]})


def bound(**changes):
    data = json.loads(canonical(euler().bind(SPEC)))
    data["binding"].update(changes)
    return json.dumps(data)


def swapped(old, new):
    found = text().replace(old, new, 1)
    assert found != text()
    return found


def texts():
    """name -> bytes of plan files without side-car."""
    deep, good = "[" * 40 + "]" * 40, text()
    return {
        "empty": "",
        "blank": " \n\t ",
        "null": "null",
        "list": "[]",
        "number": "1.0",
        "string": '"plan"',
        "nul": "\0" * 8,
        "no_format": text(format=None),
        "wrong_version": text(version=99),
        "version_true": text(version=True),
        "version_float": text(version=1.0),
        "version_huge": text(version=10**400),
        "version_deep": text(version=[[[1]]]),
        "truncated": good[: len(good) // 2],
        "trailing": good + "{}",
        "comment": good.replace("{", "{/* hi */", 1),
        "single_quotes": good.replace('"', "'"),
        "trailing_comma": good.replace("}", ",}", 1),
        "bom": b"\xef\xbb\xbf" + good.encode(),
        "utf16": good.encode("utf-16"),
        "utf16_bare": good.encode("utf-16-le"),
        "utf32": good.encode("utf-32"),
        "latin1": text(prediction="e").encode().replace(b'"e"', b'"\xe9"'),
        "overlong_utf8": good.encode().replace(b"eps", b"ep\xc1\xb3"),
        "bad_utf8_key": good.encode().replace(b"init", b"\xff"),
        "nul_in_string": swapped('"eps"', '"e\0s"'),
        "newline_in_string": swapped('"eps"', '"e\ns"'),
        "nul_escape": swapped('"eps"', '"eps\\u0000"'),
        "lone_surrogate": row(variant={"model": "\ud800"}),
        "lone_surrogate_recipe": text(recipe={"maker": "make_plan", "arguments": {"\udfff": 1}}),
        "bidi_model": row(variant={"model": "main\u202e"}),
        "line_separator": row(x="x\u2028y"),
        "deep_list": swapped(ROW, f'"alpha": {deep}'),
        "deep_open": "[" * 20_000,
        "deep_object": '{"a":' * 8_000,
        "deep_close": "]" * 1000 + "[" * 20_000,
        "deep_recipe": text(recipe={"maker": "m", "arguments": {"a": json.loads(deep)}}),
        "deep_mixed": '{"a":[' * 3_000 + "]}" * 3_000,
        "deep_after_string": '["\\"]]]]", ' + "[" * 20_000,
        "overflow": swapped(ROW, '"alpha": 1e400'),
        "overflow_minus": swapped(ROW, '"alpha": -1e999'),
        "nan": swapped(ROW, '"alpha": NaN'),
        "infinity": swapped(ROW, '"alpha": Infinity'),
        "nan_in_recipe": text(recipe={"maker": "m", "arguments": {"a": float("nan")}}),
        "nan_string": row(alpha="nan"),
        "integer_for_float": row(alpha=1),
        "float_for_integer": ruled(action="COMPUTE", order=1.0),
        "hex": swapped(ROW, '"alpha": 0x1p-1'),
        "long_integer": swapped(ROW, '"alpha": ' + "9" * 5000),
        "huge_integer": ruled(action="COMPUTE", order=10**4000),
        "leading_zero": swapped(ROW, '"alpha": 00.5'),
        "plus": swapped(ROW, '"alpha": +0.5'),
        "bare_dot": swapped(ROW, '"alpha": .5'),
        "denormal_level": row(alpha=5e-324, sigma=1e10),
        "both_zero": row(alpha=-0.0, sigma=0.0),
        "huge_level": row(sigma=1.7e308),
        "negative_sigma": row(sigma=-1e-300),
        "boolean_for_float": row(x_scale=True),
        "null_for_float": row(timestep=None),
        "duplicate_key": swapped(ROW, f"{ROW}, {ROW}"),
        "duplicate_escaped": swapped(ROW, f'{ROW}, "\\u0061lpha": 0.25'),
        "duplicate_long_key": '{"%s": 1, "%s": 2}' % (("k" * 2_000,) * 2),
        "unknown_field": row(beta=0.5),
        "dunder_field": row(__class__="x"),
        "arrays_field": text(arrays={}),
        "empty_key": row(**{"": 1}),
        "missing_field": swapped(ROW + ",", ""),
        "steps_object": text(steps={"0": {}}),
        "steps_null": text(steps=None),
        "steps_empty": text(steps=[]),
        "step_list": text(steps=[[]]),
        "init_transform": text(init=[{"op": "transform"}]),
        "init_null": text(init=None),
        "prediction_list": text(prediction=["eps"]),
        "prediction_long": text(prediction="e" * 10_000),
        "action_list": ruled(action=["COMPUTE"]),
        "action_object": ruled(action={}),
        "action_number": ruled(action=0),
        "op_list": ops({"op": []}),
        "op_python": ops({"op": "python"}),
        "op_number": ops(1),
        "op_twice": ops([[]]),
        "coef_list": terms(["x", [1.0]]),
        "coef_two_kinds": terms(["x", {"tensor": "m", "input": "m"}]),
        "coef_integer": terms(["x", 1]),
        "coef_null": terms(["x", None]),
        "coef_empty": terms(["x", {}]),
        "coef_ages_none": terms(["x", {"age": []}]),
        "pair_of_three": terms(["x", 1.0, 1.0]),
        "pair_string": terms("x1"),
        "term_number": terms([1, 1.0]),
        "slot_unicode": terms(["x", 1.0], dst="x\u0301"),
        "slot_cyrillic": terms(["x", 1.0], dst="\u0445"),
        "slot_path": terms(["x", 1.0], dst="../x"),
        "slot_empty": terms(["x", 1.0], dst=""),
        "slot_newline": terms(["x", 1.0], dst="x\n"),
        "slot_reserved": terms(["x", 1.0], dst="noise:0"),
        "slot_upper": terms(["x", 1.0], dst="X"),
        "input_path": terms(["input:../../etc/passwd", 1.0]),
        "input_upper": terms(["x", {"input": "W"}]),
        "noise_negative": terms(["noise:-1", 1.0]),
        "noise_zeros": terms(["noise:00", 1.0]),
        "noise_huge": terms(["noise:" + "9" * 240, 1.0]),
        "noise_int32": terms(["noise:2147483648", 1.0]),
        "noise_arabic": terms(["noise:\u0663", 1.0]),
        "empty_slot": terms(["nothing", 1.0]),
        "no_terms": terms(),
        "terms_many": terms(*[["x", 1.0]] * 300),
        "ops_many": ops(*[{"op": "affine", "dst": "x", "terms": [["x", 1.0]]}] * 80),
        "at_future": ops({"op": "affine", "dst": "x", "terms": [["x", 1.0]], "at": 10**9}),
        "at_negative": ops({"op": "affine", "dst": "x", "terms": [["x", 1.0]], "at": -1}),
        "clamp_crossed": ops(
            {"op": "transform", "kind": "clamp", "slot": "x", "params": [["low", 1.0], ["high", -1.0]]}
        ),
        "clamp_twice_low": ops(
            {"op": "transform", "kind": "clamp", "slot": "x", "params": [["low", 1.0], ["low", 1.0]]}
        ),
        "transform_unknown": ops({"op": "transform", "kind": "__import__", "slot": "x"}),
        "slots_many": ops(
            *[
                {"op": "affine", "dst": f"s{i}", "terms": [[f"input:t{i * 8 + j}", 1.0] for j in range(8)]}
                for i in range(60)
            ]
        ),
        "blocks_billion": ruled(blocks=[0, 10**9], action="COMPUTE"),
        "blocks_negative": ruled(blocks=[-(10**9), 0], action="COMPUTE"),
        "blocks_huge": ruled(blocks=[0, 10**4000]),
        "blocks_float": ruled(blocks=[0.0, 1.0]),
        "blocks_three": ruled(blocks=[0, 1, 2]),
        "blocks_empty": ruled(blocks=[3, 3]),
        "order_huge": ruled(action="COMPUTE", order=2**60),
        "rules_many": row(variant={"branches": ["cond", "uncond"], "rules": [{"blocks": [0, 1]}] * 1100}),
        "share_zero": ruled(site="merge", share=0.0),
        "precision_path": ruled(precision="../int8"),
        "site_newline": ruled(site="attn\n"),
        "branches_many": row(variant={"branches": ["cond"] * 1000}),
        "branches_string": row(variant={"branches": "cond"}),
        "outs_same": row(outs=["cond", "cond"]),
        "outs_long": row(outs=["o"] * 1000),
        "keep_above_one": row(variant={"branches": ["cond", "uncond"], "keep": 1e300}),
        "model_empty": row(variant={"branches": ["cond", "uncond"], "model": ""}),
        "net_input_newline": row(net_inputs=[["a\nb", 1.0]]),
        "guard_nothing": row(guard={"metric": "m", "rule": "near", "threshold": 0.5, "otherwise": {}}),
        "restart_number": row(restart=1),
        "recipe_number": text(recipe=1),
        "recipe_integer": text(recipe={"maker": "m", "arguments": {"a": 2**64}}),
        "recipe_text": text(recipe={"maker": "m", "arguments": {"a": "x\ny"}}),
        "binding_group_zero": bound(token_group=0),
        "binding_tokens_zero": bound(tokens=0),
        "binding_tokens_huge": bound(tokens=10**400),
        "binding_blocks_minus": bound(blocks=-1),
        "binding_blocks_many": bound(blocks=10**9),
        "binding_shape_empty": bound(latent_shape=[]),
        "binding_shape_zero": bound(latent_shape=[3, 0, 8]),
        "binding_keep": bound(token_group=3, tokens=5),
        "binding_shape_long": bound(latent_shape=[1] * 100),
        "binding_fingerprint": bound(fingerprint="\u202e"),
    }


def tensor_plan(**info):
    """A legal plan with one side-car tensor and its side-car; fields of its description replaced."""
    arrays = {"mean": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 2, 2)}
    plan = plan_of(Step(1.0, 0.5, 0.5, (Affine("x", (("x", TensorRef("mean")),)),)), tensors=tensor_infos(arrays))
    data = json.loads(canonical(plan))
    data["tensors"][0].update(info)
    return json.dumps(data)


def side_car(header=None, data=None, length=None, **entry):
    """A side-car for `tensor_plan`; header, bytes, stated length or fields of the one entry replaced."""
    made = np.linspace(-1, 1, 12, dtype="<f4").tobytes() if data is None else data
    header = (
        {"mean": {"dtype": "F32", "shape": [3, 2, 2], "data_offsets": [0, 48], **entry}} if header is None else header
    )
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + made


def side_cars():
    """name -> (plan text, bytes of the side-car or None)."""
    good, entry = tensor_plan(), {"dtype": "F32", "shape": [3, 2, 2], "data_offsets": [0, 48]}
    lies = {
        "missing": None,
        "empty": b"",
        "short": b"\0\0\0",
        "length_huge": side_car(length=(1 << 64) - 1),
        "length_100mb": side_car(length=100_000_000),
        "length_zero": side_car(length=0),
        "length_one_less": side_car(length=50),
        "truncated": side_car()[:-1],
        "extended": side_car() + b"\0" * 4,
        "header_list": side_car([]),
        "header_null": side_car(None, b"") + b"x",
        "header_number": side_car({"mean": 1}),
        "header_not_json": side_car(b"{{{"),
        "header_utf16": side_car("{}".encode("utf-16")),
        "header_deep": side_car(b'{"mean":' + b"[" * 5000),
        "header_duplicate": side_car(
            b'{"mean":' + json.dumps(entry).encode() + b',"mean":' + json.dumps(entry).encode() + b"}"
        ),
        "header_nan": side_car(b'{"mean":NaN}'),
        "no_tensor": side_car({}),
        "other_key": side_car({"mode": entry}),
        "two_keys": side_car({"mean": entry, "more": {**entry, "data_offsets": [48, 96]}}, bytes(96)),
        "path_key": side_car({"../mean": entry}),
        "shape": side_car(shape=[2, 3, 2]),
        "shape_billion": side_car(shape=[10**9, 2, 2]),
        "shape_overflow": side_car(shape=[1 << 62, 1 << 62, 2]),
        "shape_negative": side_car(shape=[-3, 2, 2]),
        "shape_float": side_car(shape=[3.0, 2, 2]),
        "shape_string": side_car(shape="3"),
        "shape_none": side_car(shape=None),
        "dtype": side_car(dtype="F16"),
        "dtype_unknown": side_car(dtype="Q4"),
        "dtype_object": side_car(dtype={}),
        "dtype_bf16": side_car(dtype="BF16"),
        "offsets_swapped": side_car(data_offsets=[48, 0]),
        "offsets_beyond": side_car(data_offsets=[0, 4800]),
        "offsets_hole": side_car(data_offsets=[4, 52], data=bytes(52)),
        "offsets_overlap": side_car({"mean": entry, "more": {**entry, "data_offsets": [24, 72]}}, bytes(72)),
        "offsets_huge": side_car(data_offsets=[0, (1 << 64) + 48]),
        "offsets_negative": side_car(data_offsets=[-48, 0]),
        "bytes_flipped": side_car(data=b"\1" + side_car()[-47:]),
        "nan": side_car(data=b"\xff" * 48),
        "pickle": b"\x80\x04\x95" + b"c" * 80,
    }
    found = {f"side_{name}": (good, raw) for name, raw in lies.items()}
    for name, info in {
        "shape_billion": {"shape": [10**9, 16, 8, 8]},
        "shape_zero": {"shape": [0]},
        "shape_minus": {"shape": [-1, 2, 2]},
        "shape_long": {"shape": [1] * 64},
        "dtype_int": {"dtype": "int8"},
        "dtype_object": {"dtype": "object"},
        "key_path": {"key": "../../etc/passwd"},
        "key_absolute": {"key": "/etc/passwd"},
        "key_drive": {"key": "C:\\x"},
        "key_dots": {"key": ".."},
        "key_metadata": {"key": "__metadata__"},
        "key_nul": {"key": "a\0b"},
        "key_empty": {"key": ""},
        "key_unicode": {"key": "m\u0435an"},
        "sha_short": {"sha256": "00"},
        "sha_other": {"sha256": "0" * 64},
        "sha_upper": {"sha256": "A" * 64},
        "sha_number": {"sha256": 0},
    }.items():
        found[f"info_{name}"] = (tensor_plan(**info), side_car())
    nan = np.full((3, 2, 2), np.nan, np.float32)
    found["side_nan_hashed"] = (tensor_plan(sha256=sha256(nan.tobytes()).hexdigest()), side_car(data=nan.tobytes()))
    twice = json.loads(good)
    twice["tensors"] *= 2
    found["info_twice"] = (json.dumps(twice), side_car())
    return found


def legal():
    """name -> (plan text, side-car): odd, but nothing is wrong with them; they must load."""
    minus = edit(euler(), 2, ops=(Affine("x", (("x", -0.0), ("out", 5e-324))),))
    return {
        "legal_minus_zero_and_denormal": (canonical(minus).decode(), None),
        "legal_spaces": (json.dumps(json.loads(text()), indent=7), None),
        "legal_escapes": (swapped('"eps"', '"\\u0065ps"'), None),
        "legal_tensor": (tensor_plan(), side_car()),
        "legal_header_metadata": (
            tensor_plan(),
            side_car({"__metadata__": {"by": "x"}, **json.loads(side_car()[8:-48])}),
        ),
        "legal_text_in_recipe": (text(recipe={"maker": "m", "arguments": {"név": "ünï ✓", "n": [1, None, 0.5]}}), None),
    }


def main():
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.iterdir():
        old.unlink()
    everything = {name: (made, None) for name, made in texts().items()} | side_cars() | legal()
    for name, (made, raw) in everything.items():
        (CORPUS / f"{name}.json").write_bytes(
            made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass")
        )
        if raw is not None:
            (CORPUS / f"{name}.safetensors").write_bytes(raw)


if __name__ == "__main__":
    main()
