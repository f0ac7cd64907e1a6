"""The description of static 8-bit weights, and graphs rewritten to explicit QuantizeLinear / DequantizeLinear form."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.models.quantized.made import layer as random_layer
from vivace.errors import ModelError, UnsupportedError
from vivace.export.description import Description, description_of, layers_of
from vivace.export.pack import MadeGraph, write_graphs
from vivace.export.qdq import ZERO, emitted_for, quantized_graph, quantized_graphs
from vivace.export.tensorrt_rules import check_graph
from vivace.export.weights import WeightStore
from vivace.models.quantized.weights import QuantizedWeights
from vivace.runtime.calls import Structure
from vivace.runtime.manifest import Port

K, N, ROWS, TOKENS = 48, 32, 2, 3
NAMES = ("blocks.0.attn.a", "blocks.0.attn.b", "blocks.1.mlp.c")
INT8 = Structure(precisions=((0, 2, "block", "int8"),))


def weights_of(*, smooth=False, groups=1, format="int8"):
    layers = {
        name: random_layer(N, K, format=format, smooth=smooth, groups=groups, seed=i) for i, name in enumerate(NAMES)
    }
    return QuantizedWeights(format, "a" * 64, layers, edges=tuple(range(1, groups)))


def bias_of(name):
    return np.random.default_rng(len(name)).standard_normal(N).astype(np.float32)


def graph_of(store, dtype="float32", structure=INT8, names=NAMES):
    """Three linears, the first two of which read the same input; the graph has their sum."""
    made, tensors, nodes = {"float32": np.float32, "float16": np.float16}[dtype], [], []
    for name in names:
        tensors.append(store.tensor(f"{name}.weight", np.zeros((K, N), made)))
        tensors.append(store.tensor(f"{name}.bias", bias_of(name).astype(made)))
        source = "x" if ".attn." in name else "x_late"
        nodes.append(helper.make_node("MatMul", [source, f"{name}.weight"], [f"{name}.product"], f"{name}.product"))
        nodes.append(helper.make_node("Add", [f"{name}.product", f"{name}.bias"], [name], name))
    nodes.insert(0, helper.make_node("Neg", ["x"], ["x_late"], "x_late"))
    nodes.append(helper.make_node("Sum", list(names), ["prediction"], "prediction"))
    number = helper.np_dtype_to_tensor_dtype(np.dtype(made))
    ends = [
        helper.make_tensor_value_info(*end)
        for end in (("x", number, ["rows", "tokens", K]), ("prediction", number, ["rows", "tokens", N]))
    ]
    graph = helper.make_graph(nodes, "row", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="vivace")
    ports = (
        Port("x", dtype, ("rows", "tokens", K), "latent"),
        Port("prediction", dtype, ("rows", "tokens", N), "prediction"),
    )
    return MadeGraph("row0", "row", model, ports[:1], ports[1:], structure)


def by_definition(description, x):
    """The sum of DQ(Q(x smooth)) DQ(W) + bias, float64."""
    total = np.zeros((*x.shape[:-1], N))
    for name in NAMES:
        codes = description.layers[name]
        read = (x if ".attn." in name else -x) * (1 if codes.smooth is None else codes.smooth)
        q = np.clip(np.rint(read.astype(np.float32) / np.float32(codes.x_scale)), -128, 127).astype(np.float64)
        total += q * np.float32(codes.x_scale) @ (codes.weight.astype(np.float64) * codes.weight_scale) + bias_of(name)
    return total


def written(folder, graph, store):
    write_graphs(folder, [graph], store)
    onnx.checker.check_model(str(folder / "row0.onnx"), full_check=True)
    return folder / "row0.onnx"


def run(path, x, optimized=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def data():
    x = np.random.default_rng(0).standard_normal((ROWS, TOKENS, K)).astype(np.float32)
    x[0, 0, :2] = 1e4, -1e4  # beyond the codes on either side
    return x


@pytest.mark.parametrize("smooth", [False, True])
def test_graphs_of_either_emitter_compute_the_definition_and_the_same_bits(tmp_path, smooth):
    description, found = description_of(weights_of(smooth=smooth)), {}
    for emitter in ("cpu", "tensorrt"):
        (tmp_path / emitter).mkdir()
        with WeightStore() as store:
            made = quantized_graph(graph_of(store), description, NAMES, emitter=emitter, store=store)
            found[emitter] = run(written(tmp_path / emitter, made, store), data())
    exact = by_definition(description, data())
    assert np.abs(found["cpu"] - exact).max() <= 1e-6 * np.abs(exact).max()
    assert found["cpu"].tobytes() == found["tensorrt"].tobytes()


def test_the_runtime_multiplies_integers_and_nothing_else(tmp_path):
    with WeightStore() as store:
        made = quantized_graph(graph_of(store), description_of(weights_of()), NAMES, emitter="cpu", store=store)
        run(written(tmp_path, made, store), data(), tmp_path / "optimized.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == len(NAMES)
    assert "MatMul" not in kinds


def test_layers_that_read_alike_share_one_quantized_activation():
    weights = weights_of()
    first = weights.layers[NAMES[0]]
    shared = replace(weights.layers[NAMES[1]], x_scale=first.x_scale)
    weights = replace(weights, layers={**weights.layers, NAMES[1]: shared})
    with WeightStore() as store:
        made = quantized_graph(graph_of(store), description_of(weights), NAMES, emitter="cpu", store=store)
    assert [node.name for node in made.model.graph.node if node.op_type == "QuantizeLinear"] == [
        "blocks.0.attn.a.input.quantize",
        "blocks.1.mlp.c.input.quantize",
    ]


def test_float_weights_that_nothing_reads_any_more_are_not_stored(tmp_path):
    with WeightStore() as store:
        made = quantized_graph(graph_of(store), description_of(weights_of()), NAMES, emitter="cpu", store=store)
        written(tmp_path, made, store)
    assert (tmp_path / "weights.bin").stat().st_size < 1.1 * len(NAMES) * K * N


def test_the_same_description_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with WeightStore() as store:
            made = quantized_graph(graph_of(store), description_of(weights_of()), NAMES, emitter="cpu", store=store)
            written(tmp_path / name, made, store)
    for file in ("row0.onnx", "weights.bin"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_layers_of_a_narrower_network_compute_in_float32(tmp_path):
    description = description_of(weights_of())
    with WeightStore() as store:
        made = quantized_graph(graph_of(store, "float16"), description, NAMES, emitter="cpu", store=store)
        x = data()[1:].astype(np.float16)
        found = run(written(tmp_path, made, store), x)
    biases = {tensor.name: tensor.data_type for tensor in made.model.graph.initializer if "bias" in tensor.name}
    assert set(biases.values()) == {TensorProto.FLOAT}
    assert found.dtype == np.float16
    exact = by_definition(description, x.astype(np.float32))
    assert (
        np.abs(found - exact).max() <= 4 * 2.0**-11 * np.abs(exact).max()
    )  # three sums rounded to float16, and theirs


def test_a_graph_is_written_anew_for_another_runtime():
    with WeightStore() as store:
        own = quantized_graph(graph_of(store), description_of(weights_of()), NAMES, emitter="cpu", store=store).model
        other = quantized_graph(
            graph_of(store), description_of(weights_of()), NAMES, emitter="tensorrt", store=store
        ).model
    made = emitted_for(own, "tensorrt")
    assert made == other
    assert emitted_for(made, "cpu") == own
    zero = next(tensor for tensor in made.graph.initializer if tensor.name == ZERO)
    assert numpy_helper.to_array(zero).dtype == np.int8
    assert not check_graph("row0", made)


def test_only_rows_that_name_the_format_are_rewritten_and_only_their_layers():
    mlp = Structure(precisions=((0, 2, "mlp", "int8"),))
    with WeightStore() as store:
        graphs = [graph_of(store, structure=each) for each in (Structure(), mlp, INT8)]
        graphs.append(replace(graphs[0], name="prepare", role="prepare", structure=None))
        made = quantized_graphs(
            graphs, description_of(weights_of()), ("blocks.0", "blocks.1"), emitter="cpu", store=store
        )
    assert made[0] is graphs[0]
    assert made[3] is graphs[3]
    counts = [[node.op_type for node in graph.model.graph.node].count("QuantizeLinear") for graph in made]
    assert counts == [0, 1, 3, 0]


@pytest.mark.parametrize(
    ("precisions", "dtype", "wanted"),
    [
        ((), "float32", ()),
        (((0, 2, "block", "int8"),), "float32", NAMES),
        (((0, 2, "block", "int8"), (0, 1, "attn", "bf16")), "float32", NAMES[2:]),
        (((1, 2, "block", "int8"), (0, 1, "block", "fp32")), "float32", NAMES[2:]),
        (((0, 1, "attn", "int8"),), "bfloat16", NAMES[:2]),
    ],
)
def test_rules_say_which_layers_run_in_8_bits(precisions, dtype, wanted):
    found = layers_of(precisions, NAMES, ("blocks.0", "blocks.1"), format="int8", dtype=dtype)
    assert found == wanted


def test_scales_of_several_timestep_groups_become_the_largest():
    weights = weights_of(groups=3)
    description = description_of(weights)
    assert description.layers[NAMES[0]].x_scale == float(weights.layers[NAMES[0]].x_scale.max())
    assert description.scheme["activations"]["of"] == "largest of groups"
    assert description.layers[NAMES[0]].weight.shape == (K, N)
    assert torch.equal(torch.from_numpy(description.layers[NAMES[0]].weight).t(), weights.layers[NAMES[0]].weight)


def test_scales_by_token_are_refused_with_what_to_do():
    with pytest.raises(UnsupportedError, match=r"blocks.0.attn.a.*--recipe ptq4dm"):
        description_of(weights_of(groups=0))


@pytest.mark.parametrize(
    ("precision", "dtype", "message"),
    [("fp8", "float32", "weights are int8; quantize to fp8"), ("fp32", "float16", "leave `high` out")],
)
def test_precisions_that_a_pack_has_not_are_refused(precision, dtype, message):
    with pytest.raises(UnsupportedError, match=message):
        layers_of(((0, 1, "block", precision),), NAMES, ("blocks.0",), format="int8", dtype=dtype)


def test_layers_that_no_graph_has_or_of_another_shape_are_refused():
    description = description_of(weights_of())
    blocks = ("blocks.0", "blocks.1")
    with WeightStore() as store:
        with pytest.raises(ModelError, match=r"no graph multiplies by blocks.1.mlp.c.weight"):
            quantized_graphs([graph_of(store, names=NAMES[:2])], description, blocks, emitter="cpu", store=store)
        small = replace(description.layers[NAMES[0]], weight=np.zeros((N, K), np.int8))
        odd = Description("int8", {**description.layers, NAMES[0]: small})
        with pytest.raises(ModelError, match=r"blocks.0.attn.a is \[48, 32\] in the graph"):
            quantized_graph(graph_of(store), odd, NAMES, emitter="cpu", store=store)
        with pytest.raises(UnsupportedError, match="no graphs are written for 'gpu'"):
            quantized_graph(graph_of(store), description, NAMES, emitter="gpu", store=store)
