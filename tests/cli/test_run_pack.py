"""`vivace run` and `vivace verify` as a caller sees them, where torch is not installed too."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tests.runtime.signed import sign
from tests.runtime.tiny_pipe import plan_of, tiny_pipe

import vivace
from vivace.cli import run
from vivace.export import export_onnx

# A machine with the hard dependencies and ONNX Runtime alone.
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "diffusers", "transformers", "ml_dtypes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import vivace
from vivace.cli import run

code = run(sys.argv[1:])
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    pipe = tiny_pipe(folder / "tiny")
    plan = plan_of(pipe, steps=5)
    plan = vivace.passes.apply_guards(plan, "first_block_cache", threshold=0.9)
    export_onnx(pipe, plan, folder / "pack")
    return folder / "pack"


def call(capsys, *args):
    code = run([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_run_writes_pictures_and_one_json_object(capsys, made, tmp_path):
    out = tmp_path / "grid.png"
    code, text, err = call(capsys, "run", made, "3", "4", "--n", 2, "--seed", 5, "--out", out, "--threads", 1, "--json")
    data = json.loads(text)
    assert code == 0 and err == "" and data["out"] == str(out)
    assert [entry["prompt"] for entry in data["prompts"]] == ["3", "4"]
    receipt = data["prompts"][0]["receipt"]
    assert receipt["seed"] == 5 and receipt["n"] == 2 and len(receipt["rows"]) == 5 and receipt["decisions"]
    with Image.open(out) as picture:
        assert picture.size == (24, 24) and picture.text["vivace:plan"] == receipt["plan_hash"]


def test_run_says_what_it_drew(capsys, made, tmp_path):
    out = tmp_path / "one.png"
    code, text, _ = call(capsys, "run", made, "3", "--out", out, "--threads", 1, "--scale", 2, "--guidance", 1.5)
    assert code == 0 and "5 evaluations" in text and "guards fired in" in text and f"wrote {out}" in text
    with Image.open(out) as picture:
        assert picture.size == (16, 16)


@pytest.mark.parametrize("name", ["x.npy", "X.NPY"])
def test_run_writes_latents_where_asked(capsys, made, tmp_path, name):
    code, _, _ = call(capsys, "run", made, "3", "--n", 2, "--out", tmp_path / name, "--threads", 1)
    assert code == 0 and np.load(tmp_path / name).shape == (2, 3, 8, 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_verify_says_row_by_row_that_a_pack_holds(capsys, made):
    code, text, _ = call(capsys, "verify", made, "--threads", 1)
    assert code == 0 and "all as the manifest says" in text and text.splitlines()[-1].startswith("holds")
    code, text, err = call(capsys, "verify", made, "--threads", 1, "--json")
    data = json.loads(text)
    assert code == 0 and err == "" and data["holds"] and len(data["rows"]) == 5 and data["max_error"] <= 1e-4


def test_a_pack_that_deviates_is_exit_code_1(capsys, made, tmp_path):
    pack = shutil.copytree(made, tmp_path / "pack")
    goldens = load_file(pack / "goldens.safetensors")
    goldens["row.2"] = goldens["row.2"] + np.float32(0.1)
    save_file(goldens, pack / "goldens.safetensors", {"request": '{"n": 2, "prompt": 0, "seed": 7}'})
    sign(pack)
    code, text, _ = call(capsys, "verify", pack, "--threads", 1, "--json")
    data = json.loads(text)
    assert code == 1 and not data["holds"] and data["first_deviating_row"] is not None


@pytest.mark.parametrize("name", ["weights.bin", "manifest.json", "plan.json", "step.onnx", "goldens.safetensors"])
def test_a_pack_that_was_changed_is_one_line_and_exit_code_2(capsys, made, tmp_path, name):
    pack = shutil.copytree(made, tmp_path / "pack")
    raw = bytearray((pack / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (pack / name).write_bytes(raw)
    for command in (("verify", pack), ("run", pack, "3", "--out", tmp_path / "x.png")):
        code, out, err = call(capsys, *command)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and name in err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("11",), "class id 11"),
        (("3", "--backend", "cuda"), "backend 'cuda' is not here"),
        (("3", "--guidance", "nan"), "guidance nan; a finite number"),
        (("3", "--image", "x.png"), "the plan reads no input 'start'"),
        (("3", "--n", "0"), "--n"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, made, tmp_path, args, message):
    code, out, err = call(capsys, "run", made, *args, "--out", tmp_path / "x.png")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path):
    code, _, err = call(capsys, "run", tmp_path / "none", "3", "--out", tmp_path / "x.jpg")
    assert code == 2 and "pictures are written as PNG" in err


def test_both_commands_run_without_torch_and_onnx(made, tmp_path):
    out = tmp_path / "x.png"
    for args in (
        ("run", made, "3", "--out", out, "--threads", 1, "--json"),
        ("verify", made, "--threads", 1, "--json"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, *map(str, args)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
    assert out.exists()


def test_no_module_of_the_package_hides_its_entry_points():
    from importlib import import_module
    from pathlib import Path

    import vivace.cli as package

    modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    assert not modules & {"run", "main", "app"}
    import_module("vivace.cli.run_pack")
    assert callable(package.run) and callable(package.main)
