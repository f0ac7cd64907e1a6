"""The command line as a caller sees it: stdout, stderr, exit codes and files."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from tests.models.pipelines import tiny

from vivace.cli import run


def call(capsys, *args):
    code = run([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys, *args):
    code, out, err = call(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def test_generate_writes_one_picture_without_border_and_prints_a_receipt(capsys, tmp_path):
    out = tmp_path / "heart.png"
    code, text, _ = call(capsys, "generate", "red heart", "--steps", 4, "--out", out, "--seed", 3)
    assert code == 0
    assert "solver_step" in text and "4/4 evaluations" in text
    with Image.open(out) as picture:
        assert picture.size == (32, 32)
        assert picture.text["vivace:seed"] == "3" and picture.text["vivace:prompt"] == "red heart"
        assert len(picture.text["vivace:plan"]) == 64


def test_generate_makes_a_grid_and_one_json_object(capsys, tmp_path):
    out = tmp_path / "grid.png"
    data = json_of(capsys, "generate", "cat face", "pizza", "--n", 2, "--steps", 3, "--out", out)
    assert [p["prompt"] for p in data["prompts"]] == ["cat face", "pizza"]
    assert all(p["name"] and p["receipt"]["nfe"] == 3 for p in data["prompts"])
    with Image.open(out) as picture:
        assert picture.width > 64 and picture.height > 64


def test_generate_draws_with_a_folder_of_diffusers(capsys, tmp_path):
    tiny.make("dit").save_pretrained(tmp_path / "model")
    out = tmp_path / "three.png"
    options = ["--model", tmp_path / "model", "--steps", 2, "--out", out]
    data = json_of(capsys, "generate", 3, *options)
    assert data["prompts"][0]["receipt"]["branch_evals"] == 4  # its call's guidance by default
    plain = json_of(capsys, "generate", 3, *options, "--solver", "unipc", "--guidance", 1)
    assert plain["prompts"][0]["receipt"]["branch_evals"] == 2
    with Image.open(out) as picture:
        assert picture.width == picture.height
    code, _, err = call(capsys, "generate", "a word", *options)
    assert code == 2 and "need a class from 0 to 999" in err


def test_same_seed_same_bytes_whatever_the_company(capsys, tmp_path):
    for name, prompts in (("a", ["pizza"]), ("b", ["pizza"])):
        call(capsys, "generate", *prompts, "--steps", 3, "--out", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_plan_new_show_diff_validate(capsys, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert call(capsys, "plan", "new", "--steps", 5, "--out", a)[0] == 0
    assert call(capsys, "plan", "new", "--steps", 5, "--option", "order=3", "--interval", "0:0.6", "--out", b)[0] == 0
    assert "unipc" in call(capsys, "plan", "show", a)[1]
    shown = json_of(capsys, "plan", "show", a)["plan"]
    assert shown["nfe"] == 5 and shown["branch_evals"] == 10
    assert not json_of(capsys, "plan", "diff", a, b)["equal"]
    assert "equal" in call(capsys, "plan", "diff", a, a)[1]
    assert json_of(capsys, "plan", "validate", a, "--model", "emoji")["valid"]
    made = tmp_path / "x.png"
    assert call(capsys, "generate", "pizza", "--plan", b, "--out", made)[0] == 0 and made.exists()


def test_plan_new_from_a_scheduler_file(capsys, tmp_path):
    config = tmp_path / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    data = json_of(capsys, "plan", "new", "--scheduler", config, "--steps", 6)
    assert data["plan"]["nfe"] == 6 and data["plan"]["prediction"] == "flow"


def test_profile_prints_rows_and_kernels_and_writes_a_trace(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    data = json_of(capsys, "profile", "pizza", "--steps", 3, "--trace", trace)
    assert len(data["receipt"]["rows"]) == 3
    assert data["kernels"] and all(k["ms"] > 0 for k in data["kernels"])
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"row 0 network", "row 2 solver_step"} <= names
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")


def test_doctor_lists_packages_and_kernels(capsys):
    data = json_of(capsys, "doctor")
    assert data["machine"]["torch"] and data["machine"]["gpu"]
    assert {"solver_step"} <= {row["op"] for row in data["kernels"]}
    assert all(row["reason"] for row in data["kernels"])


MISTAKES = {
    "unknown solver": ["generate", "pizza", "--solver", "unipcc"],
    "zero steps": ["generate", "pizza", "--steps", "0"],
    "too many steps": ["generate", "pizza", "--steps", "1001"],
    "unknown prompt": ["generate", "qwxzvkj"],
    "unknown model": ["generate", "pizza", "--model", "nowhere"],
    "missing plan": ["generate", "pizza", "--plan", "none.json"],
    "unwritable output": ["generate", "pizza", "--out", "no/such/folder/x.png"],
    "output is a folder": ["generate", "pizza", "--out", "."],
    "unknown backend": ["generate", "pizza", "--backend", "gpu9"],
    "absent backend": ["generate", "pizza", "--backend", "tensorrt"],
    "bad guidance": ["generate", "pizza", "--guidance", "nan"],
    "bad option": ["plan", "new", "--option", "order"],
    "unknown option": ["plan", "new", "--option", "colour=3"],
    "NaN sigma": ["plan", "new", "--sigmas", "10,nan,0.1"],
    "rising sigmas": ["plan", "new", "--sigmas", "1,2,3"],
    "sigmas against steps": ["plan", "new", "--sigmas", "3,2,1", "--steps", "5"],
    "sigmas that are no numbers": ["plan", "new", "--sigmas", "a,b"],
    "bad interval": ["plan", "new", "--interval", "0.5"],
    "missing scheduler": ["plan", "new", "--scheduler", "none.json"],
    "missing plan to show": ["plan", "show", "none.json"],
    "unknown command": ["paint"],
    "unknown flag": ["generate", "pizza", "--colour", "red"],
    "no prompt": ["generate"],
    "unknown suite": ["bench", "everything"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_no_file(mistake, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *MISTAKES[mistake])
    assert code == 2, (out, err)
    assert out == "" and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_damaged_plans_and_checkpoints_are_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text('{"format": "vivace-plan", "version": 1, "steps": [{"timestep": NaN}]}')
    code, _, err = call(capsys, "generate", "pizza", "--plan", "plan.json")
    assert code == 2 and "NaN" in err and len(err.strip().splitlines()) == 1
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\x00\x00")
    code, _, err = call(capsys, "generate", "pizza", "--model", "model")
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert sorted(os.listdir(tmp_path)) == ["model", "plan.json"]


def test_a_failure_is_exit_code_1_and_one_line(capsys, monkeypatch):
    monkeypatch.setattr("vivace.profile.doctor.examine", lambda: 1 / 0)
    code, out, err = call(capsys, "doctor")
    assert code == 1 and out == "" and err.startswith("vivace: ZeroDivisionError")


def test_json_keeps_stdout_to_one_object_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "vivace", "generate", "pizza", "--steps", "2", "--json", "--out", "x.png"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["out"].endswith("x.png")
