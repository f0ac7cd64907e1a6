"""Opening a pack: what is in it, what each kind of damage is called, and that nothing but the runtime is needed."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.runtime.signed import manifest_of, sign, write_manifest
from tests.runtime.tiny_pack import tiny_plan, tiny_weight, write_tiny
from vivace.errors import PackError
from vivace.runtime.calls import Structure, structures_of
from vivace.runtime.pack import is_pack, open_pack


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("packs") / "pack"
    write_tiny(out)
    return out


@pytest.fixture
def pack(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pack")


def test_a_pack_knows_its_plan_its_graphs_and_their_weights(made):
    pack = open_pack(made)
    assert pack.plan == tiny_plan() and [graph.name for graph in pack.graphs("decode")] == ["decode"]
    assert [pack.row(each).name for each in structures_of(pack.plan)] == ["row-0", "row-1"]
    first, second = pack.stored["row-0"]
    assert (first.name, first.dtype, first.shape) == ("first.weight", "float32", (8, 64))
    assert (pack.bytes_of(first).view(np.float32).reshape(first.shape) == tiny_weight()).all()
    assert not pack.weights.flags.writeable and pack.stored["row-1"] == ()
    assert pack.stored["decode"][0].offset == first.offset


def test_goldens_are_read_when_asked_for(made):
    request, arrays = open_pack(made).goldens()
    assert request == {"n": 2, "prompt": "one", "seed": 7} and list(arrays) == ["noise"]
    assert arrays["noise"].shape == (2, 4, 8, 8)


def test_a_pack_without_goldens_or_weights_opens(tmp_path):
    write_tiny(tmp_path / "pack", goldens={})
    assert open_pack(tmp_path / "pack").goldens() == ({}, {})


def test_a_structure_that_the_plan_never_asks_for_has_no_graph(made):
    with pytest.raises(PackError, match="no graph computes Structure"):
        open_pack(made).row(Structure(tokens=True))


def test_opening_needs_neither_torch_nor_onnx_nor_onnxruntime(made):
    blocked = "import sys\nfor name in ('torch', 'onnx', 'ml_dtypes', 'onnxruntime'): sys.modules[name] = None\n"
    code = f"{blocked}from vivace.runtime.pack import open_pack\nprint(open_pack({str(made)!r}).plan.hash)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == tiny_plan().hash, done.stderr


def test_hashes_alone_are_left_out_without_check(pack):
    raw = bytearray((pack / "weights.bin").read_bytes())
    raw[7] ^= 1
    (pack / "weights.bin").write_bytes(raw)
    with pytest.raises(PackError, match="weights.bin: its SHA-256 is not the manifest's"):
        open_pack(pack)
    assert open_pack(pack, check=False).plan == tiny_plan()
    (pack / "weights.bin").write_bytes(raw[:-1])
    with pytest.raises(PackError, match="4095 bytes, the manifest says 4096"):
        open_pack(pack, check=False)


def test_what_is_no_pack_is_said(tmp_path, made):
    with pytest.raises(PackError, match="manifest.json: it cannot be read"):
        open_pack(tmp_path)
    with pytest.raises(PackError, match="manifest.json: it cannot be read"):
        open_pack(made / "plan.json")
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(PackError, match="not the manifest of a pack"):
        open_pack(tmp_path)
    assert is_pack(made) and not is_pack(tmp_path) and not is_pack(tmp_path / "none")


@pytest.mark.parametrize("version", [2, 0, "1", None, 1.0])
def test_another_version_is_named(pack, version):
    write_manifest(pack, {**manifest_of(pack), "version": version})
    with pytest.raises(PackError, match=f"format version {version!r}, this release reads 1"):
        open_pack(pack)


def test_a_manifest_edited_by_hand_is_refused(pack):
    raw = (pack / "manifest.json").read_bytes()
    for changed in (raw.replace(b'"licence": "none"', b'"licence": "free"'), raw + b"\n", raw.replace(b": ", b":")):
        (pack / "manifest.json").write_bytes(changed)
        with pytest.raises(PackError, match="changed after it was written"):
            open_pack(pack)


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["plan.json", "weights.bin", "row-1.onnx", "goldens.safetensors"])
def test_each_file_must_be_there_and_be_a_plain_file(pack, tmp_path, name):
    kept = (pack / name).read_bytes()
    (pack / name).unlink()
    with pytest.raises(PackError, match=f"{name}: it cannot be read"):
        open_pack(pack)
    (tmp_path / "elsewhere").write_bytes(kept)
    (pack / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackError, match=f"{name}: it is a symbolic link"):
        open_pack(pack)
    (pack / name).unlink()
    (pack / name).mkdir()
    with pytest.raises(PackError, match=f"{name}: it "):
        open_pack(pack)
    (pack / name).rmdir()
    os.mkfifo(pack / name)
    with pytest.raises(PackError, match=f"{name}: it is not a plain file"):
        open_pack(pack)


def test_a_linked_manifest_is_refused(pack, tmp_path):
    (pack / "manifest.json").rename(tmp_path / "elsewhere.json")
    (pack / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PackError, match="manifest.json: it is a symbolic link"):
        open_pack(pack)


@pytest.mark.parametrize("name", ["other.onnx", "plan.safetensors"])
def test_files_that_a_runtime_would_read_by_name_must_be_in_the_manifest(pack, name):
    (pack / name).write_bytes(b"")
    with pytest.raises(PackError, match=f"'{name}' is not in the manifest"):
        open_pack(pack)


def test_other_files_may_lie_beside(pack):
    (pack / "engine.cache").write_bytes(b"x")
    (pack / "README.md").write_text("mine")
    open_pack(pack)


@pytest.mark.parametrize(
    "name", ["../plan.json", "a/b.onnx", "/etc/passwd", "..", ".", "", ".hidden", "a\\b", "C:x", "a\0b", "x" * 300]
)
def test_names_with_folders_are_refused_before_anything_is_read(pack, name):
    data = manifest_of(pack)
    data["files"].append({"name": name, "bytes": 0, "sha256": "0" * 64})
    write_manifest(pack, data)
    with pytest.raises(PackError, match="not the name of a file in the pack's own folder"):
        open_pack(pack)


def test_names_that_differ_in_case_alone_are_one_file(pack):
    data = manifest_of(pack)
    data["files"].append({**data["files"][0], "name": data["files"][0]["name"].upper()})
    write_manifest(pack, data)
    with pytest.raises(PackError, match="stands twice"):
        open_pack(pack)


# ---------------------------------------------------------------- the plan and its graphs
def test_a_plan_of_another_pack_is_refused(pack, tmp_path):
    tiny_plan(6).save(pack / "plan.json")
    sign(pack)
    with pytest.raises(PackError, match="plan.json: its hash is"):
        open_pack(pack)


def test_a_damaged_plan_is_one_pack_error(pack):
    (pack / "plan.json").write_bytes(b"{")
    sign(pack)
    with pytest.raises(PackError, match="plan.json: not JSON"):
        open_pack(pack)


@pytest.mark.parametrize("role, message", [("row", "0 graphs compute"), ("decode", None)])
def test_a_lacking_graph_is_missed_where_the_plan_needs_it(pack, role, message):
    data = manifest_of(pack)
    gone = next(graph for graph in data["graphs"] if graph["role"] == role)
    (pack / gone["file"]).unlink()
    data["graphs"].remove(gone)
    data["files"] = [info for info in data["files"] if info["name"] != gone["file"]]
    write_manifest(pack, data)
    if message is None:
        assert not open_pack(pack).graphs(role)
    else:
        with pytest.raises(PackError, match=message):
            open_pack(pack)


@pytest.mark.parametrize("change, message", [({}, "2 graphs compute"), ({"tokens": True}, "no row that it computes")])
def test_a_row_graph_too_many_is_refused(pack, change, message):
    data = manifest_of(pack)
    graph, info = data["graphs"][0], next(info for info in data["files"] if info["name"] == "row-0.onnx")
    data["graphs"].append({**graph, "name": "z", "file": "z.onnx", "structure": {**graph["structure"], **change}})
    data["files"].append({**info, "name": "z.onnx"})
    shutil.copy(pack / "row-0.onnx", pack / "z.onnx")
    write_manifest(pack, data)
    with pytest.raises(PackError, match=message):
        open_pack(pack)


def changed_graph(pack, change, name="row-0.onnx"):
    model = onnx.load(pack / name, load_external_data=False)
    change(model)
    (pack / name).write_bytes(model.SerializeToString())
    sign(pack)


def external(**entries):
    def change(model):
        tensor = model.graph.initializer[0]
        old = {entry.key: entry.value for entry in tensor.external_data}
        del tensor.external_data[:]
        for key, value in (old | entries).items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return change


def inner(model):
    """A constant within a branch of a node, in another file."""
    tensor = TensorProto(name="secret", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    body = onnx.helper.make_graph([], "body", [], [], [tensor])
    model.graph.node.append(onnx.helper.make_node("If", [], [], "if", then_branch=body, else_branch=body))


def constant(model):
    tensor = TensorProto(name="secret", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], "c", value=tensor))


def first(field, value):
    return lambda model: setattr(model.graph.initializer[0], field, value)


def doubled(model):
    model.graph.initializer.append(model.graph.initializer[0])


def resized(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3


def renamed(model):
    model.graph.output[0].name = "other"


def retyped(model):
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


GRAPHS = {
    "location above": (external(location="../secret"), "lies in '../secret'"),
    "location absolute": (external(location="/etc/passwd"), "lies in '/etc/passwd'"),
    "location in a folder": (external(location="a/weights.bin"), "lies in 'a/weights.bin'"),
    "location of another file": (external(location="plan.json"), "lies in 'plan.json'"),
    "no location": (external(location=None), "needed are location, offset and length"),
    "no length": (external(length=None), "needed are location, offset and length"),
    "a further entry": (external(checksum="0"), "needed are location, offset and length"),
    "an offset below 0": (external(offset="-64"), "offset '-64'"),
    "an offset that is no number": (external(offset="0x40"), "offset '0x40'"),
    "an offset of many digits": (external(offset="9" * 400), "offset '999"),
    "an offset beyond the file": (external(offset="4032"), "ends at byte 6080 of weights.bin, which has 4096"),
    "a length beyond the shape": (external(length="4096"), "4096 bytes, which do not fit its shape"),
    "a size below 0": (lambda model: model.graph.initializer[0].dims.__setitem__(0, -8), "do not fit its shape"),
    "a size beyond memory": (lambda model: model.graph.initializer[0].dims.append(1 << 62), "do not fit its shape"),
    "a data type that none has": (first("data_type", 99), "has the data type 99"),
    "external without saying so": (first("data_location", TensorProto.DEFAULT), "needed are location"),
    "a name twice": (doubled, "two of its weights have one name"),
    "a constant in a branch": (inner, "only weights of the graph may"),
    "a constant in another file": (constant, "only weights of the graph may"),
    "another shape": (resized, r"input .*'rows', 3, 8, 8.*is in the manifest"),
    "another name": (renamed, "output .*'other'.*is in the manifest"),
    "another dtype": (retyped, "input .*'float16'.*is in the manifest"),
    "another opset": (lambda model: setattr(model.opset_import[0], "version", 22), "opset 22, the manifest says 21"),
    "operators of someone": (lambda model: model.opset_import.add(domain="x.y", version=1), "operator sets"),
    "functions": (lambda model: model.functions.add(name="f"), "field 25 of a model"),
    "training": (lambda model: model.training_info.add(), "field 20 of a model"),
    "sparse weights": (lambda model: model.graph.sparse_initializer.add(), "field 15 of a graph"),
    "a sequence": (lambda model: model.graph.input[0].type.sequence_type.SetInParent(), "field 4 of a type"),
    "no rank": (lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"), "known dtype and rank"),
    "a free size without a name": (
        lambda model: model.graph.input[0].type.tensor_type.shape.dim[1].Clear(),
        "neither a number nor a name",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_not_what_it_should_be_is_refused_however_well_signed(pack, name):
    change, message = GRAPHS[name]
    changed_graph(pack, change)
    with pytest.raises(PackError, match=f"row-0.onnx: .*{message}"):
        open_pack(pack)


def test_graphs_nested_without_end_are_refused(pack):
    def nest(model):
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        for _ in range(20):
            body = onnx.helper.make_graph([node], "g", [], [])
            node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body)
        model.graph.node.append(node)

    changed_graph(pack, nest)
    with pytest.raises(PackError, match="nested too deep"):
        open_pack(pack)


def test_graphs_within_graphs_may_hold_small_constants(pack):
    def add(model):
        value = onnx.numpy_helper.from_array(np.ones(3, np.float32), "ones")
        body = onnx.helper.make_graph([], "body", [], [], [value])
        model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body))

    changed_graph(pack, add)
    open_pack(pack)


# ---------------------------------------------------------------- fields of the manifest
FIELDS = {
    "an unknown field": (lambda data: data.update(speed=9), "field 'speed' is unknown"),
    "a field lacking": (lambda data: data.pop("opset"), "field 'opset' is missing"),
    "a number as text": (lambda data: data.update(opset="21"), "manifest.opset: '21' is not an integer"),
    "a truth value as number": (lambda data: data.update(opset=True), "not an integer"),
    "an integer as float": (lambda data: data.update(tolerance=1), "not a float"),
    "a huge number": (lambda data: data["files"][0].update(bytes=1 << 60), "not an integer of at most 53 bits"),
    "a size below 0": (lambda data: data["files"][0].update(bytes=-1), "-1 bytes"),
    "a hash that is none": (lambda data: data["files"][0].update(sha256="0"), "the hash '0'"),
    "no plan": (lambda data: data["files"].pop(2), "'plan.json' is not in the manifest"),
    "a graph in no file": (lambda data: data["graphs"][0].update(file="x.onnx"), "one of the files"),
    "an unknown role": (lambda data: data["graphs"][0].update(role="rows"), "role 'rows'"),
    "a row without structure": (lambda data: data["graphs"][0].pop("structure"), "have a structure"),
    "a structure of another release": (lambda data: data["graphs"][0]["structure"].update(x=1), "'x' is unknown"),
    "a kept thing of another type": (
        lambda data: data["graphs"][0]["structure"]["kept"][0].update(first="0"),
        r"structure.kept\[0\].first: '0' is not an integer",
    ),
    "an unknown dtype": (lambda data: data["graphs"][0]["inputs"][0].update(dtype="float12"), "dtype 'float12'"),
    "an unknown source": (lambda data: data["graphs"][0]["inputs"][0].update(source="sky"), "source 'sky'"),
    "a source of others": (lambda data: data["graphs"][0]["inputs"][0].update(source="picture"), "source 'picture'"),
    "no prediction": (lambda data: data["graphs"][0]["outputs"][0].update(source="hidden"), "no output 'prediction'"),
    "what nobody keeps": (lambda data: data["graphs"][0]["outputs"][1].update(key="x"), "keeps nothing named 'x'"),
    "what no one prepares": (lambda data: data["graphs"][0]["inputs"][1].update(source="prepared"), "no graph prepare"),
    "a negative size": (lambda data: data["graphs"][0]["inputs"][0].update(shape=[-1]), "below 0"),
    "a size that is a float": (lambda data: data["graphs"][0]["inputs"][0].update(shape=[1.5]), "1.5 is not"),
    "a list that is none": (lambda data: data.update(graphs={}), "{} is not a list"),
    "a model without a name": (lambda data: data["model"].pop("name"), "manifest.model.name: None is not a text"),
    "a latent of texts": (lambda data: data["model"].update(latent_shape=["4"]), "not an integer"),
    "a patch of nothing": (lambda data: data["model"].update(patch=[0, 2]), "each is from 1"),
    "tokens that lie nowhere": (
        lambda data: data["model"].update(layout={"edges": ["a"]}),
        "layout.edges.*not an integer",
    ),
    "prompts of another kind": (lambda data: data["prompts"].update(kind="song"), "knows class, text, tensors"),
    "classes without names": (lambda data: data["prompts"].pop("names"), "manifest.prompts.names: None is not a list"),
    "a tokenizer elsewhere": (
        lambda data: data.update(
            prompts={
                "kind": "text",
                "negative": "",
                "tokenizers": {"a": {"file": "../x.json", "length": 7, "pad_id": 0, "pad_token": ""}},
            }
        ),
        "'a' is in no file of the pack",
    ),
    "another model": (lambda data: data["model"].update(fingerprint="0" * 64), "not bound to the model"),
    "another plan": (lambda data: data.update(plan="0" * 64), "its hash is"),
    "another opset": (lambda data: data.update(opset=17), "opset 21, the manifest says 17"),
    "an input too many": (
        lambda data: data["graphs"][0]["inputs"].append({**data["graphs"][0]["inputs"][0], "name": "x2"}),
        "2 inputs, the manifest says 3",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_manifest_that_says_what_cannot_be_is_refused_however_well_signed(pack, name):
    change, message = FIELDS[name]
    data = manifest_of(pack)
    change(data)
    write_manifest(pack, data)
    with pytest.raises(PackError, match=message):
        open_pack(pack)


def test_a_manifest_nested_without_end_is_refused(pack):
    for deep in ("[" * 100_000, '{"a":' * 100_000, json.dumps({"format": "vivace-pack"})[:-1]):
        (pack / "manifest.json").write_text(deep)
        with pytest.raises(PackError, match="manifest.json: "):
            open_pack(pack)
