"""Packs for TensorRT: what is checked and written without it, what TensorRT-RTX makes of it, how engines are run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from tests.export.quantized import static_weights
from tests.export.rtx import rtx_python
from tests.export.ruled import ACCEPTED, BROKEN, SOUND, model_of
from tests.runtime.tiny_pipe import plan_of, tiny_pipe
from vivace import passes
from vivace.cli import run
from vivace.errors import ArgumentError, BackendError, OutputError, PackError, ShapeError
from vivace.export import export_onnx, tensorrt_build
from vivace.export.profiles import profiles_of
from vivace.export.qdq import ZERO
from vivace.export.tensorrt import export_tensorrt
from vivace.export.tensorrt_form import tensorrt_form
from vivace.export.tensorrt_rules import check_graph
from vivace.models.pipe import Pipe
from vivace.runtime.manifest import Graph, Port
from vivace.runtime.tensorrt import TensorRt, engines_of

TARGET = "SM89"


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """INT8, caches, tokens and guidance that skips a branch, all at once."""
    folder = tmp_path_factory.mktemp("tensorrt")
    pipe = tiny_pipe(folder / "model")
    pipe = Pipe(pipe.model, static_weights(pipe))
    plan = passes.apply_guidance(plan_of(pipe, guidance=None), 2.0, interval=(0.0, 0.75))
    plan = passes.apply_precision(plan, "int8", first=1, last=1)
    plan = passes.apply_block_cache(plan, "fora", interval=2)
    plan = passes.apply_tokens(plan, 0.5, first=3, last=1)
    return export_onnx(pipe, plan, folder / "pack")


@pytest.fixture(scope="module")
def written(pack, tmp_path_factory):
    return export_tensorrt(pack, tmp_path_factory.mktemp("out") / "engines", target=TARGET, build=False)


@pytest.fixture(scope="module")
def rtx():
    python, reason = rtx_python()
    if not python:
        pytest.skip(reason)
    return python


def test_graphs_of_a_pack_break_no_rule_and_what_is_left_is_said(pack, written):
    assert written.failed == ()
    assert {finding.rule for finding in written.findings} <= {"float64"}  # sines of positions
    assert any("tensorrt_build.py" in line for line in written.left)
    assert any(f"vivace verify {pack.path}" in line for line in written.left)
    json.dumps(written.to_dict())


def test_the_folder_has_signed_activations_and_the_weights_of_the_pack_once(pack, written):
    zeros = {}
    for graph in pack.manifest.graphs:
        for tensor in onnx.load(written.folder / graph.file, load_external_data=False).graph.initializer:
            if tensor.name == ZERO:
                zeros[graph.name] = tensor.data_type
    assert len(zeros) >= 2
    assert set(zeros.values()) == {onnx.TensorProto.INT8}
    assert os.path.samefile(written.folder / "weights.bin", pack.path / "weights.bin")
    job = json.loads((written.folder / "build.json").read_text())
    assert job["pack"] == pack.digest
    assert set(job["graphs"]) == {graph.name for graph in pack.manifest.graphs}


def test_graphs_that_break_a_rule_are_left_out(pack, tmp_path, monkeypatch):
    graph = next(graph for graph in pack.manifest.graphs if graph.role == "row")
    monkeypatch.setattr("vivace.export.tensorrt.tensorrt_form", lambda model: model)  # activations stay bytes
    found = export_tensorrt(pack, tmp_path / "out", build=False)
    assert "zero_point" in {finding.rule for finding in found.findings}
    assert graph.name not in found.failed
    assert any("breaks a rule" in line for line in found.left)
    assert not set(found.failed) & set(json.loads((tmp_path / "out" / "build.json").read_text())["graphs"])


def test_folders_are_replaced_only_where_this_wrote_them(pack, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="holds no engines of a pack"):
        export_tensorrt(pack, tmp_path / "mine", build=False)
    export_tensorrt(pack, tmp_path / "out", build=False)
    with pytest.raises(ArgumentError, match="say overwrite"):
        export_tensorrt(pack, tmp_path / "out", build=False)
    export_tensorrt(pack, tmp_path / "out", build=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_engines_lie_beside_a_pack_however_it_is_named(pack, monkeypatch):
    monkeypatch.chdir(pack.path)
    assert export_tensorrt(".", build=False).folder == engines_of(pack) == pack.path.with_name("pack.engines")


def test_an_interpreter_without_tensorrt_says_so(pack, tmp_path):
    with pytest.raises(BackendError, match=r"could not build: .*no TensorRT here"):
        export_tensorrt(pack, tmp_path / "out", python=sys.executable)


def test_the_command_line_says_what_was_checked_and_what_is_left(pack, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert run(["export", "tensorrt", str(pack.path), "--out", out, "--size", "8x8", "--no-build", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == []
    assert len(told["checked"]) == 5
    assert told["report"] is None
    assert run(["export", "tensorrt", str(pack.path), "--out", out, "--rows", "1:2", "--overwrite"]) == 2
    assert "--rows '1:2': write a:b:c" in capsys.readouterr().err


@pytest.mark.parametrize("layout", [("Transpose", {"perm": [1, 0]}), ("Unsqueeze", {})])
def test_bytes_are_made_last_and_are_the_same(layout):
    kind, attributes = layout
    nodes = [
        ("Cast", ["x"], ["bytes"], {"to": onnx.TensorProto.UINT8}),
        (kind, ["bytes", "axes"] if kind == "Unsqueeze" else ["bytes"], ["y"], attributes),
    ]
    shape = [4, 2] if kind == "Transpose" else [1, 2, 4]
    ends = {"x": (onnx.TensorProto.FLOAT, [2, 4])}, {"y": (onnx.TensorProto.UINT8, shape)}
    model = model_of(nodes, *ends, {"axes": np.int64([0])} if kind == "Unsqueeze" else {})
    assert [finding.rule for finding in check_graph("decode", model)] == ["uint8", "uint8"]
    made = tensorrt_form(model)
    assert check_graph("decode", made) == []
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(*(ReferenceEvaluator(each).run(None, {"x": x})[0] for each in (model, made)))


def test_float8_is_kept_by_quantization_with_scale_1():
    float8 = onnx.TensorProto.FLOAT8E4M3FN
    nodes = [
        ("Cast", ["x"], ["kept"], {"to": float8}),
        ("Cast", ["was"], ["wide"], {"to": onnx.TensorProto.FLOAT16}),
    ]
    ends = [{"x": onnx.TensorProto.FLOAT, "was": float8}, {"kept": float8, "wide": onnx.TensorProto.FLOAT16}]
    model = model_of(nodes, *({name: (kind, [4]) for name, kind in end.items()} for end in ends))
    made = tensorrt_form(model)
    onnx.checker.check_model(made, full_check=True)
    assert check_graph("row0", made) == []
    x = np.float32([0.3, -7, 448, 1e-3])
    feeds = {"x": x, "was": x.astype(ml_dtypes.float8_e4m3fn)}
    one, other = (ReferenceEvaluator(each).run(None, feeds) for each in (model, made))
    assert [value.tobytes() for value in one] == [value.tobytes() for value in other]


# --- profiles ---------------------------------------------------------------------------------------------------------
MODEL = {"latent_shape": [4, 8, 16], "patch": [2, 2]}


def test_a_profile_a_size_with_tokens_to_match():
    own, wide = profiles_of(MODEL, [8, 16], sizes=[(8, 16), (16, 16)], rows=(1, 4, 6))
    assert (own.dims["tokens"], wide.dims["tokens"]) == ((32,) * 3, (64,) * 3)
    assert (own.dims["active"], wide.dims["active"]) == ((8, 16, 16), (16, 32, 32))
    port = Port("x", "float32", ("rows", 4, "height", "width"), "latent")
    assert wide.shapes(port) == ((1, 4, 16, 16), (4, 4, 16, 16), (6, 4, 16, 16))
    told = wide.to_dict([port, Port("size", "int64", (2,), "size")])["inputs"]
    assert told["size"] == {"values": [[16, 16]] * 3}
    assert told["x"]["shapes"][2] == [6, 4, 16, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": (2, 1, 4)}, r"rows \(2, 1, 4\)"),
        ({"ranges": {"frames": (0, 1, 2)}}, r"frames \(0, 1, 2\)"),
        ({"sizes": [(9, 16)]}, "9x16; the patch is 2x2"),
    ],
)
def test_ranges_that_are_none_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        profiles_of(MODEL, [], **options)


# --- TensorRT-RTX -----------------------------------------------------------------------------------------------------
def test_rtx_parses_and_builds_every_graph_strongly_typed(pack, rtx, tmp_path):
    found = export_tensorrt(pack, tmp_path / "out", target=TARGET, python=rtx)
    assert found.failed == ()
    assert found.report["strongly_typed"]
    graphs = found.report["graphs"]
    assert len(graphs) == len(pack.manifest.graphs) >= 8
    for graph in pack.manifest.graphs:
        eight = graph.structure is not None and graph.structure.precisions and "reuse" not in graph.name
        assert bool(graphs[graph.name]["types"].get("INT8")) == bool(eight), graph.name
        assert (tmp_path / "out" / f"{graph.name}.engine").stat().st_size == graphs[graph.name]["bytes"]


def test_rtx_and_the_rules_agree_on_what_is_sound(rtx, tmp_path):
    models = {f"good-{name}": model for name, model in SOUND.items()}
    models |= {f"bad-{name}": model for graphs in BROKEN.values() for name, model in graphs.items()}
    job = {"pack": "", "target": TARGET, "strip": False, "timing_cache": False, "graphs": {}}
    for name, model in models.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
        shapes = {
            value.name: {
                "shapes": [
                    [rows, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])] for rows in (1, 2, 4)
                ]
            }
            for value in model.graph.input
            if value.type.tensor_type.shape.dim
        }
        job["graphs"][name] = {"file": f"{name}.onnx", "profiles": [{"name": "only", "inputs": shapes}]}
    (tmp_path / "build.json").write_text(json.dumps(job))
    done = subprocess.run([rtx, tensorrt_build.__file__, str(tmp_path)], capture_output=True, text=True, check=False)
    graphs = json.loads(done.stdout.rpartition("\n")[2] or done.stdout)["graphs"]
    built = {name for name, told in graphs.items() if told["built"]}
    assert {name for name in models if name.startswith("good-")} <= built
    assert {name.removeprefix("bad-") for name in built if name.startswith("bad-")} <= ACCEPTED
    assert done.returncode == 1


# --- running engines, against stand-ins of TensorRT and of the CUDA runtime -------------------------------------------
WIDTH = 30


class Device:
    """Memory of a device that is this machine's, and a record of what was asked for."""

    def __init__(self):
        self.memory, self.calls, self.capturing, self.graphs = {}, [], None, []

    def stream(self):
        return 7

    def allocate(self, size):
        array = np.zeros(size, np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address):
        del self.memory[address]

    def copy(self, address, array, way, stream):
        there, here = self.memory[address][: array.nbytes], array.reshape(-1).view(np.uint8)
        if way == 1:
            there[:] = here
        else:
            here[:] = there

    def wait(self, stream):
        self.calls.append("wait")

    def begin(self, stream):
        self.capturing = []

    def end(self, stream):
        self.graphs.append(self.capturing)
        self.capturing = None
        return len(self.graphs) - 1

    def launch(self, graph, stream):
        self.calls.append("launch")
        for work in self.graphs[graph]:
            work()


class Engine:
    """y = 2 x for rows in one of two ranges."""

    num_optimization_profiles = 2
    ranges = ((1, 2), (3, 8))

    def __init__(self, device):
        self.device = device

    def is_shape_inference_io(self, name):
        return False

    def get_tensor_profile_shape(self, name, profile):
        low, high = self.ranges[profile]
        return (low, WIDTH), (low, WIDTH), (high, WIDTH)

    def create_execution_context(self):
        return Context(self.device)


class Context:
    def __init__(self, device):
        self.device, self.shape, self.places = device, None, {}

    def set_optimization_profile_async(self, index, stream):
        self.device.calls.append(f"profile {index}")

    def set_input_shape(self, name, shape):
        self.shape = shape

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.places[name] = address

    def execute_async_v3(self, stream):
        shape, places = self.shape, dict(self.places)

        def work():
            x, y = (self.device.memory[places[name]][: 4 * int(np.prod(shape))].view(np.float32) for name in ("x", "y"))
            y[:] = 2 * x

        if self.device.capturing is None:
            self.device.calls.append("run")
            work()
        else:
            self.device.capturing.append(work)
        return True


def library(device, data=b"engine"):
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda given: Engine(device) if given == data else None)
    logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    return SimpleNamespace(__version__="11.4", Runtime=lambda logger: runtime, Logger=logger)


@pytest.fixture
def opened(tmp_path):
    """A runner of an engine beside a pack, and its device."""
    ports = [Port(name, "float32", ("rows", WIDTH), source) for name, source in (("x", "latent"), ("y", "prediction"))]
    graph = Graph("row0", "row0.onnx", "row", (ports[0],), (ports[1],))
    pack = SimpleNamespace(path=tmp_path / "pack", digest="p" * 64)
    folder = tmp_path / "pack.engines"
    folder.mkdir()
    (folder / "build.json").write_text(json.dumps({"pack": "p" * 64, "strip": False}))
    (folder / "row0.engine").write_bytes(b"engine")
    device = Device()
    return SimpleNamespace(pack=pack, graph=graph, device=device, backend=TensorRt(trt=library(device), cuda=device))


def double(runner, rows, out=None):
    x = np.arange(WIDTH * rows, dtype=np.float32).reshape(rows, WIDTH)
    made = runner.run({"x": x}, {"y": out})["y"]
    np.testing.assert_array_equal(made, 2 * x)
    return made


def test_an_engine_is_run_then_captured_then_replayed_by_shapes(opened):
    runner, calls = opened.backend.open(opened.pack, opened.graph), opened.device.calls
    for _ in range(3):
        double(runner, 2)
    assert calls == ["profile 0", "run", "wait", "launch", "wait", "launch", "wait"]
    double(runner, 1)
    assert calls[-2:] == ["run", "wait"]
    calls.clear()
    double(runner, 8)  # more than there is room for: what was captured would write where nothing is any more
    double(runner, 2)
    assert calls == ["profile 1", "run", "wait", "run", "wait"]
    out = np.empty((2, WIDTH), np.float32)
    assert double(runner, 2, out) is out


def test_shapes_without_a_profile_are_refused(opened):
    with pytest.raises(ShapeError, match=r"no profile of row0 takes x \[9, 30\]"):
        double(opened.backend.open(opened.pack, opened.graph), 9)


def test_engines_that_are_missing_of_another_pack_or_machine_are_told(opened):
    folder = opened.pack.path.with_name("pack.engines")
    with pytest.raises(BackendError, match="there is no engine of other"):
        opened.backend.open(opened.pack, replace(opened.graph, name="other"))
    (folder / "row0.engine").write_bytes(b"of another version")
    with pytest.raises(BackendError, match=r"TensorRT 11.4 cannot load row0.engine here"):
        opened.backend.open(opened.pack, opened.graph)
    (folder / "build.json").write_text(json.dumps({"pack": "q" * 64}))
    with pytest.raises(PackError, match="engines are of another pack"):
        opened.backend.open(opened.pack, opened.graph)


@pytest.mark.skipif(tensorrt_build.flavour() is not None, reason="this machine has TensorRT")
def test_a_machine_without_tensorrt_or_gpu_says_so():
    with pytest.raises(BackendError, match=r"tensorrt: .* (not installed|no GPU|not) here"):
        TensorRt()


def test_the_builder_needs_nothing_but_the_standard_library():
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]); print({'torch', 'numpy', 'onnx', 'vivace'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, tensorrt_build.__file__],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path("/"),
    )
    assert done.stdout.strip() == "set()"
