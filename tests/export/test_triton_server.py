"""Model repositories: configurations that fit their graphs, weights once, and a loop that a client can follow."""

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.export.flat_runs import Reader, cached_pack, session_of
from vivace.errors import ArgumentError, OutputError, UnsupportedError
from vivace.export import export_triton_server, triton_server
from vivace.export.triton_config import Served, config_of
from vivace.runtime.manifest import Port

ORT_TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)", "TYPE_UINT8": "tensor(uint8)"}


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return cached_pack(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def repository(pack, tmp_path_factory):
    out = tmp_path_factory.mktemp("server") / "models"
    return out, export_triton_server(pack, out, name="emoji", max_batch_size=8)


def config(out, name):
    return (out / name / "config.pbtxt").read_text()


def ports(text, side):
    """{name: (type, dims, reshaped)} of a side of a configuration."""
    block = re.search(rf"^{side} \[\n(.*?)\n\]", text, re.S | re.M)[1]
    found = re.findall(r'name: "(.*?)" data_type: (\w+) dims: \[ (.*?) \](.*?) \}', block)
    return {name: (kind, list(map(int, dims.split(", "))), bool(more)) for name, kind, dims, more in found}


def batch(text):
    return int(re.search(r"^max_batch_size: (\d+)$", text, re.M)[1])


def graph_file(out, name):
    return next((out / name / "1").glob("*.onnx"))


def graphs_of(repository):
    out, names = repository
    return [(name, config(out, name)) for name in names if "ensemble" not in config(out, name)]


def test_every_model_has_a_folder_of_its_name_with_what_its_configuration_names(repository):
    out, names = repository
    assert {path.name for path in out.iterdir()} == {*names, "README.md", "program.txt"}
    for name, text in graphs_of(repository):
        assert f'name: "{name}"' in text and text.count("{") == text.count("}") and text.count("[") == text.count("]")
        assert f'default_model_filename: "{graph_file(out, name).name}"' in text and 'backend: "onnxruntime"' in text
        assert ("dynamic_batching { }" in text) == (batch(text) > 0)


def test_configurations_fit_the_graphs(repository):
    out, _ = repository
    for name, text in graphs_of(repository):
        session = session_of(graph_file(out, name))
        for side, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
            said = ports(text, side)
            assert list(said) == [value.name for value in values]
            for value in values:
                kind, dims, reshaped = said[value.name]
                full = [-1] * (batch(text) > 0) + ([] if reshaped else dims)
                assert ORT_TYPES[kind] == value.type and len(full) == len(value.shape)
                pairs = zip(full, value.shape, strict=True)
                assert all(isinstance(own, str) or size == own for size, own in pairs)


def test_rows_are_batched_wherever_all_their_tensors_have_rows(repository):
    sizes = {name: batch(text) for name, text in graphs_of(repository)}
    plain = [name for name in sizes if name.endswith(("-full", "-keep", "prepare", "decode"))]
    assert plain and all(sizes[name] == 8 for name in plain)
    forecasts = [name for name, text in graphs_of(repository) if ".weights" in text]
    assert forecasts and all(sizes[name] == 0 for name in [*forecasts, "emoji-step"])


def test_a_client_that_follows_the_program_gets_the_pictures_of_the_runtime(repository, pack):
    out, _ = repository
    wanted = pack.session(threads=1)(7, n=2, seed=11).latents
    text = (out / "program.txt").read_text()
    found = Reader(lambda name: graph_file(out, name), 2, 7, 11).run(text)
    assert np.abs(found - wanted).max() <= pack.manifest.tolerance * np.abs(wanted).max()
    assert "positions" not in text


def test_weights_lie_on_the_disk_once(repository, pack):
    out, _ = repository
    places = list(out.glob("*/1/weights.bin"))
    assert len(places) > 2 and len({place.stat().st_ino for place in places}) == 1
    assert places[0].read_bytes() == (pack.path / "weights.bin").read_bytes()
    assert places[0].stat().st_ino != (pack.path / "weights.bin").stat().st_ino


def test_ensembles_hand_on_what_their_models_give(repository):
    out, names = repository
    whole = [name for name in names if "-whole-" in name]
    assert whole
    for name in whole:
        text = config(out, name)
        known = {port: dims for port, (_, dims, _) in ports(text, "input").items()}
        for step in text.split("model_name: ")[1:]:
            model = config(out, step.split('"')[1])
            for side, table in (("input", known), ("output", {})):
                maps = dict(re.findall(rf'{side}_map {{ key: "(.*?)" value: "(.*?)" }}', step))
                assert set(maps) == set(ports(model, side))
                assert side == "output" or set(maps.values()) <= set(table)
            for port, (_, dims, _) in ports(model, "output").items():
                known[port] = ([-1] if batch(model) and not batch(text) else []) + dims
        for port, (_, dims, _) in ports(text, "output").items():
            assert known[port] == dims
        assert (out / name / "1").is_dir() and not list((out / name / "1").iterdir())


def test_the_folder_says_what_a_client_does(repository):
    out, names = repository
    text = (out / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in names) and "program.txt" in text and "Licence" in text


def test_a_plan_that_decides_while_it_runs_has_no_program(pack, tmp_path, monkeypatch):
    def refuse(*_):
        raise UnsupportedError("guards")

    monkeypatch.setattr(triton_server, "flat_program", refuse)
    names = export_triton_server(pack, tmp_path / "models", ensembles=False)
    assert not (tmp_path / "models/program.txt").exists() and not any("-whole-" in name for name in names)
    assert "decides while it runs" in (tmp_path / "models/README.md").read_text()


def test_dtypes_that_the_server_cannot_pass_on_are_named(pack):
    graph = pack.graphs("decode")[0]
    wide = replace(graph, inputs=(Port("latent", "bfloat16", ("rows", 4), "latent"),))
    with pytest.raises(UnsupportedError, match="'latent' in bfloat16.*export the pack with dtype float32"):
        config_of(Served("decode", wide, 8))


def test_an_existing_folder_and_odd_names_are_refused(pack, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="name a new folder"):
        export_triton_server(pack, tmp_path / "mine")
    with pytest.raises(ArgumentError, match="short name"):
        export_triton_server(pack, tmp_path / "models", name="a/b")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
