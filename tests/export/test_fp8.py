"""float8 graphs: the same form with float8 codes."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from tests.export.quantized import static_weights
from tests.export.test_qdq import INT8, NAMES, data, graph_of, weights_of, written
from tests.runtime.tiny_pipe import plan_of, tiny_pipe
from vivace import passes
from vivace.errors import UnsupportedError
from vivace.export import export_onnx
from vivace.export.description import description_of
from vivace.export.fake_quant import fake_linear
from vivace.export.qdq import quantized_graph, quantized_graphs
from vivace.export.tensorrt_rules import check_graph
from vivace.export.weights import WeightStore
from vivace.models.pipe import Pipe
from vivace.runtime import ort, verify_pack


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with WeightStore() as store:
        graph = quantized_graph(graph_of(store), description(), NAMES, emitter="cpu", store=store)
        return written(tmp_path_factory.mktemp("fp8"), graph, store)


def description():
    return description_of(weights_of(format="fp8", smooth=True))


def test_a_float8_graph_computes_the_reference(made):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # it knows no product of float8 codes
    session = onnxruntime.InferenceSession(str(made), options, providers=["CPUExecutionProvider"])
    found, x = session.run(None, {"x": data()})[0], torch.from_numpy(data())
    exact = torch.zeros(found.shape)
    for name in NAMES:
        bias = next(t for t in onnx.load(made).graph.initializer if t.name == f"{name}.bias")
        layer = fake_linear(description().layers[name], torch.from_numpy(onnx.numpy_helper.to_array(bias).copy()))
        exact += layer(x if ".attn." in name else -x)
    assert np.abs(found - exact.numpy()).max() <= 1e-6 * float(exact.abs().max())


def test_activations_and_weights_are_float8_and_sums_float32(made):
    model = onnx.load(made)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {types[f"{name}.weight"] for name in NAMES} == {TensorProto.FLOAT8E4M3FN}
    assert {types[f"{name}.{part}"] for name in NAMES for part in ("weight_scale", "bias")} == {TensorProto.FLOAT}
    assert types["activation.zero_point"] == TensorProto.FLOAT8E4M3FN


def test_float8_is_the_same_for_every_runtime_and_keeps_its_rules(made):
    with WeightStore() as store:
        graphs = [
            quantized_graph(graph_of(store), description(), NAMES, emitter=emitter, store=store).model
            for emitter in ("cpu", "tensorrt")
        ]
    assert graphs[0] == graphs[1]
    assert not check_graph("row0", onnx.load(made))


def test_rows_in_int8_find_no_weights_in_float8():
    with WeightStore() as store:
        graph = graph_of(store, structure=INT8)
        with pytest.raises(UnsupportedError, match="weights are fp8; quantize to int8"):
            quantized_graphs([graph], description(), ("blocks.0", "blocks.1"), emitter="cpu", store=store)


def test_a_float8_pack_runs_in_onnx_runtime_and_holds(tmp_path):
    pipe = tiny_pipe(tmp_path / "model")
    quantized = Pipe(pipe.model, static_weights(pipe, "fp8"))
    pack = export_onnx(quantized, passes.apply_precision(plan_of(pipe, steps=3), "fp8"), tmp_path / "pack")
    assert pack.manifest.precision["scheme"]["format"] == "fp8"
    assert verify_pack(pack).holds


@pytest.mark.parametrize(("scheme", "exact"), [({}, False), ({"format": "int8"}, True)])
def test_int8_sums_do_not_overflow_where_the_processor_has_no_dot_products(monkeypatch, scheme, exact):
    monkeypatch.setattr(ort, "_has_dot_products", lambda: False)
    pack = SimpleNamespace(manifest=SimpleNamespace(precision={"network": "float32", "scheme": scheme}))
    assert ort._of_8_bits(pack) == ({"session.x64quantprecision": "1"} if exact else {})
