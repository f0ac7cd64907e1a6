"""Writing packs: weights once, the same bytes each time, all of it or nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.runtime.tiny_pack import parts, tiny_plan, tiny_weight, write_tiny
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.planning import make_plan
from vivace.errors import OutputError, PackError
from vivace.export.pack import check_out, write_graphs, write_pack
from vivace.export.weights import WeightStore
from vivace.runtime.manifest_io import decode
from vivace.runtime.pack import open_pack


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_graphs_of_a_pack_run_and_pass_the_checker(tmp_path):
    write_tiny(tmp_path / "pack")
    pack = open_pack(tmp_path / "pack")
    for graph in pack.manifest.graphs:
        onnx.checker.check_model(str(pack.file(graph)), full_check=True)
    x = np.random.default_rng(1).standard_normal((3, 4, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(pack.file(pack.row(pack.graphs("row")[0].structure))))
    found = session.run(None, {"x": x, "timestep": np.ones(3, np.float32)})
    np.testing.assert_allclose(found[0], x @ tiny_weight() @ tiny_weight().T, rtol=1e-4, atol=1e-4)


def test_weights_lie_in_one_file_each_once_and_without_what_no_graph_reads(tmp_path):
    with WeightStore() as store:
        store.tensor("unused", np.zeros(5000, np.float32))
        write_pack(tmp_path / "pack", **parts(store))
    assert (tmp_path / "pack/weights.bin").stat().st_size == 2 * tiny_weight().nbytes
    assert tiny_weight().tobytes() in (tmp_path / "pack/weights.bin").read_bytes()


def test_the_same_parts_give_the_same_bytes_in_whatever_order_weights_came(tmp_path):
    write_tiny(tmp_path / "one")
    with WeightStore() as store:
        store.tensor("before", np.ascontiguousarray(tiny_weight().T))
        write_pack(tmp_path / "two", **parts(store))
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_packs_of_one_plan_and_other_files_are_told_apart(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_tiny(tmp_path / name, extra={"seed": bytes([seed])})
    one, same, other = (open_pack(tmp_path / name) for name in ("one", "same", "other"))
    assert one.digest == same.digest != other.digest and one.plan == other.plan


def test_graphs_in_memory_stay_as_they_are(tmp_path):
    with WeightStore() as store:
        store.tensor("before", np.zeros(999))
        made = parts(store)["graphs"]
        before = [graph.model.SerializeToString() for graph in made]
        write_graphs(tmp_path, made, store)
        assert [graph.model.SerializeToString() for graph in made] == before


def test_what_is_written_is_what_is_read(tmp_path):
    made = write_tiny(tmp_path / "pack", extra={"tokenizer.json": b"{}"})
    pack = open_pack(tmp_path / "pack")
    assert pack.manifest == made and pack.plan == tiny_plan() and made.plan == pack.plan.hash
    assert {info.name for info in made.files} == {path.name for path in pack.path.iterdir()} - {"manifest.json"}
    assert (pack.path / "tokenizer.json").read_bytes() == b"{}"
    assert oct((pack.path / "manifest.json").stat().st_mode)[-3:] == "644"


def test_an_existing_folder_is_left_alone(tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists already.*name another folder"):
            write_tiny(out, overwrite=overwrite)
    write_tiny(tmp_path / "pack")
    before = files(tmp_path / "pack")
    with pytest.raises(OutputError, match="overwrite=True"):
        write_tiny(tmp_path / "pack")
    assert files(tmp_path / "pack") == before and (out / "letter.txt").read_text() == "dear"


def test_a_pack_is_replaced_when_asked(tmp_path):
    write_tiny(tmp_path / "pack", extra={"old.txt": b"old"})
    write_tiny(tmp_path / "pack", plan=tiny_plan(6), overwrite=True)
    assert open_pack(tmp_path / "pack").plan == tiny_plan(6)
    assert not (tmp_path / "pack/old.txt").exists() and list(tmp_path.iterdir()) == [tmp_path / "pack"]


def test_behind_a_link_the_pack_that_it_points_to_is_replaced(tmp_path):
    write_tiny(tmp_path / "pack")
    (tmp_path / "link").symlink_to(tmp_path / "pack")
    write_tiny(tmp_path / "link", plan=tiny_plan(6), overwrite=True)
    assert open_pack(tmp_path / "pack").plan == tiny_plan(6) and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"pack", "link"}


def test_a_missing_parent_is_refused_before_any_work(tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        check_out(tmp_path / "none" / "pack", False)
    check_out(tmp_path / "pack", False)


def other_ports(made):
    graph = made["graphs"][0]
    return {"graphs": [replace(graph, inputs=graph.inputs[:1]), *made["graphs"][1:]]}


def other_shape(made):
    graph = made["graphs"][0]
    inputs = (replace(graph.inputs[0], shape=("rows", 3, 8, 8)), *graph.inputs[1:])
    return {"graphs": [replace(graph, inputs=inputs), *made["graphs"][1:]]}


WRONG = {
    "a graph is lacking": (lambda made: {"graphs": made["graphs"][1:]}, "0 graphs compute Structure"),
    "a graph stands twice": (lambda made: {"graphs": made["graphs"][:1] * 2 + made["graphs"][1:]}, "stands twice"),
    "ports are lacking": (other_ports, "2 inputs, the manifest says 1"),
    "a shape differs": (other_shape, r"input \('x'.* is in the manifest"),
    "another opset": (lambda made: {"opset": 23}, "opset 21, the manifest says 23"),
    "a name with folders": (lambda made: {"extra": {"../x": b""}}, "without folders"),
    "a name that is taken": (lambda made: {"extra": {"plan.json": b""}}, "name of its own"),
    "an unknown model": (lambda made: {"model": {**made["model"], "fingerprint": "e" * 64}}, "not bound"),
    "a graph's name with folders": (
        lambda made: {"graphs": [replace(made["graphs"][0], name="a/b"), *made["graphs"][1:]]},
        "use letters",
    ),
    "an unbound plan": (
        lambda made: {"plan": make_plan(NoiseSchedule.flow(), steps=2, prediction="flow")},
        "not bound",
    ),
    "an infinite tolerance": (lambda made: {"tolerance": float("nan")}, "without NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_together_leave_nothing_behind(tmp_path, name):
    change, message = WRONG[name]
    with WeightStore() as store:
        made = parts(store)
        with pytest.raises(PackError, match=message):
            write_pack(tmp_path / "pack", **{**made, **change(made)})
    assert not list(tmp_path.iterdir())


def test_a_rename_that_fails_leaves_the_older_pack(tmp_path, monkeypatch):
    write_tiny(tmp_path / "pack")
    before, rename = files(tmp_path / "pack"), Path.rename

    def failing(path, target):
        if target == tmp_path / "pack" and not path.name.endswith(".older"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written.*Input/output error"):
        write_tiny(tmp_path / "pack", plan=tiny_plan(6), overwrite=True)
    assert files(tmp_path / "pack") == before and list(tmp_path.iterdir()) == [tmp_path / "pack"]


def test_a_manifest_is_one_line_a_graph_and_reads_as_json(tmp_path):
    made = write_tiny(tmp_path / "pack")
    raw = (tmp_path / "pack/manifest.json").read_bytes()
    assert decode(raw) == made and json.loads(raw)["format"] == "vivace-pack"
    assert sum(b'"role"' in line for line in raw.splitlines()) == len(made.graphs)
