"""`vivace export`: what it writes, what it says, and that it runs where torch is not."""

import json

import pytest

from vivace.cli import run


def call(capsys, *words):
    code = run([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys, *words):
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "pack"
    assert run(["export", "onnx", "emoji", "--steps", "3", "--out", str(out)]) == 0
    return out


def test_a_pack_is_written_run_and_verified(pack, capsys, tmp_path):
    said = json_of(capsys, "verify", pack)
    assert said["holds"] and len(said["rows"]) == 3
    picture = tmp_path / "a.png"
    json_of(capsys, "run", pack, "pizza", "--seed", 3, "--out", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_what_was_written_is_told(capsys, tmp_path):
    said = json_of(capsys, "export", "onnx", "emoji", "--steps", 2, "--guidance", 1, "--out", tmp_path / "pack")
    assert {graph["role"] for graph in said["graphs"]} == {"prepare", "positions", "row", "decode", "step"}
    assert said["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "pack").iterdir() if path.name != "manifest.json"
    )
    assert said["precision"]["network"] == "float32" and said["tolerance"] == 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("onnx", "nothere"), "no such model or folder"),
        (("onnx", "emoji", "--dtype", "float64"), "dtype is 'float64'"),
        (("onnx", "emoji", "--opset", "19"), "opset is 19; use 21 or 23"),
        (("tensorrt", "nothere"), "manifest.json"),
        (("triton-server", "nothere"), "manifest.json"),
    ),
)
def test_mistakes_are_one_line_and_leave_nothing(words, message, capsys, tmp_path):
    code, out, err = call(capsys, "export", *words, "--out", tmp_path / "made")
    assert code == 2 and not out and message in err and len(err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_there_is_refused_before_the_model_is_read(pack, capsys):
    code, _, err = call(capsys, "export", "onnx", "nothere", "--out", pack)
    assert code == 2 and "exists already" in err


def test_a_pack_is_checked_for_tensorrt_without_it(pack, capsys, tmp_path):
    said = json_of(capsys, "export", "tensorrt", pack, "--out", tmp_path / "engines", "--no-build")
    assert said["checked"] and said["left"]
    assert (tmp_path / "engines" / "build.json").exists()


def test_a_model_repository_has_a_model_for_every_graph(pack, capsys, tmp_path):
    said = json_of(capsys, "export", "triton-server", pack, "--out", tmp_path / "repository")
    assert {path.name for path in (tmp_path / "repository").iterdir() if path.is_dir()} == set(said["models"])
