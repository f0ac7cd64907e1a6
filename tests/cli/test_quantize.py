"""`vivace quantize`, and rows that run on its files."""

import json

import pytest
from tests.models.pipelines import tiny

from vivace.cli import run
from vivace.cli.quantize import kind_of


def call(capsys, *args):
    code = run([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys, *args):
    code, out, err = call(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "model"
    tiny.make("dit").save_pretrained(folder)
    return folder


def test_plain_rounding_and_rows_on_it(capsys, tmp_path, folder):
    out = tmp_path / "w"
    data = json_of(capsys, "quantize", folder, "--out", out, "--high", "transformer_blocks.0.ff*")
    assert data["out"] == [f"{out}.safetensors", f"{out}.json"] and "without a calibration" in data["note"]
    assert data["kept"]["transformer_blocks.0.ff.net.2"] == "kept high as asked" and data["layers"] == 16
    kinds = data["bytes"]["kinds"]
    assert kinds["attn1.to_q"]["layers"] == 3 and kinds["ff.net.2"]["layers"] == 2
    assert sum(kind["after"] for kind in kinds.values()) == data["bytes"]["after"] < data["bytes"]["before"] / 2
    code, text, _ = call(capsys, "quantize", folder, "--out", out)
    assert code == 0 and "18 layers in int8" in text and "whole network" in text and "note: without" in text
    options = ["--model", folder, "--steps", 2, "--backend", "eager"]
    drawn = json_of(capsys, "generate", 3, *options, "--quantized", out, "--out", tmp_path / "x.png")
    assert drawn["prompts"][0]["receipt"]["precisions"] == {"int8": 2}
    seen = json_of(capsys, "profile", 3, *options, "--quantized", out)
    assert seen


def test_mistakes_are_one_line(capsys, tmp_path, folder):
    out = tmp_path / "w"
    for options, message in (
        (["--activations", "static"], "--activations static needs --calibration"),
        (["--rounding", "gptq"], "--rounding gptq needs --calibration"),
        (["--format", "int4"], "format 'int4' is unknown"),
        (["--high", "nothing*"], "names no layer"),
        (["--calibration", tmp_path / "none.safetensors"], "none.safetensors"),
    ):
        code, _, err = call(capsys, "quantize", folder, "--out", out, *options)
        assert code == 2 and message in err.splitlines()[-1], err
    code, _, err = call(capsys, "quantize", folder, "--out", tmp_path / "no" / "w")
    assert code == 2 and "cannot be written" in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = call(capsys, "generate", 3, "--model", folder, "--quantized", out, "--out", tmp_path / "x.png")
    assert code == 2 and "no quantized weights there" in err
    assert run(["quantize", "emoji", "--out", str(out)]) == 0
    code, _, err = call(capsys, "generate", 3, "--model", folder, "--quantized", out, "--out", tmp_path / "x.png")
    assert code == 2 and "made for model" in err


def test_kinds_of_layers():
    assert kind_of("blocks.3.qkv") == "qkv" and kind_of("transformer_blocks.11.attn1.to_q") == "attn1.to_q"
    assert kind_of("mid_block.attentions.0.proj_in") == "attentions.0.proj_in"


def test_a_calibration_decides_what_the_options_leave_open(capsys, tmp_path, folder):
    table, out, prompts = tmp_path / "t.safetensors", tmp_path / "w", tmp_path / "prompts.txt"
    prompts.write_text("3\n7\n")
    sizes = ["--steps", 2, "--samples", 2, "--groups", 2, "--prompts", prompts]
    json_of(capsys, "calibrate", folder, "--quantization", "--out", table, "--recipe", "static", *sizes)
    data = json_of(capsys, "quantize", folder, "--calibration", table, "--out", out)
    assert data["static"] and data["groups"] == 2 and data["note"] is None and data["error"]["measured"] > 0
    drawn = json_of(
        capsys, "generate", 3, "--model", folder, "--steps", 2, "--quantized", out, "--out", tmp_path / "x.png"
    )
    assert drawn["prompts"][0]["receipt"]["precisions"].get("int8")
