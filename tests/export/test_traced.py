"""Graphs of networks of diffusers: what they compute, how they are written, whose names they have; cached rows and rows
of some tokens, of every family. In one file, so that a network is traced once."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.export.families import load, pack_of
from vivace.engine.plan import Variant
from vivace.errors import ArgumentError, UnsupportedError
from vivace.export.traced import traced_graphs
from vivace.export.weights import WeightStore
from vivace.runtime import verify_pack
from vivace.runtime.calls import Kept, Structure, structures_of

FREE = {"pixart": True, "sd3": False, "flux": True, "sd15": True}  # prompts of any length, where rows keep no text


def rows_of(name):
    return [graph for graph in pack_of(name).manifest.graphs if graph.role == "row"]


def plain(name):
    """The graph that computes everything."""
    return next(graph for graph in rows_of(name) if not any(kept.gives for kept in graph.structure.kept))


def model_of(name, graph):
    return onnx.load(str(pack_of(name).path / graph.file))


@pytest.mark.parametrize("name", FREE)
def test_a_graph_is_as_close_to_float64_as_the_eager_network(name):
    eager, wide = (denoiser_of(name, dtype) for dtype in (torch.float32, torch.float64))
    x = torch.randn(2, *eager.spec.latent_shape, generator=torch.Generator().manual_seed(3))
    times, variant = (700.0, 40.0), Variant(branches=("cond",))
    exact, near = (
        each.evaluate(x.to(each.dtype), times, (each.encode(None),) * 2, variant)[0].double().numpy()
        for each in (wide, eager)
    )
    found = run(name, eager, x, times)
    unit = np.finfo(np.float32).eps / 2
    assert error(found, exact) <= 2 * error(near, exact) + unit


@pytest.mark.parametrize("name", FREE)
def test_graphs_are_checked_with_all_their_shapes_and_say_nothing_of_where_they_were_made(name):
    pack = pack_of(name)
    for graph in rows_of(name):
        onnx.checker.check_model(str(pack.path / graph.file), full_check=True)
        model = onnx.load(str(pack.path / graph.file), load_external_data=False)
        assert (model.producer_name, model.doc_string, model.producer_version) == ("vivace", "", "")
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 21)]
        assert not model.metadata_props and not model.graph.value_info and not model.functions
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("name", FREE)
def test_linear_layers_are_products_and_sums_with_the_names_of_the_model(name):
    network = denoiser_of(name, torch.float32).networks["main"]
    model = model_of(name, plain(name))
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    products = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
    layers = {path: part for path, part in network.named_modules() if isinstance(part, torch.nn.Linear)}
    assert layers
    for path, layer in layers.items():
        assert products[path].input[1] == f"{path}.weight"
        assert np.array_equal(held[f"{path}.weight"], layer.weight.detach().numpy().T)
        if layer.bias is not None:
            (total,) = [node for node in model.graph.node if f"{path}.bias" in node.input]
            assert total.op_type == "Add" and path in total.input
    assert not any(node.op_type == "Gemm" for node in model.graph.node)


@pytest.mark.parametrize("name", FREE)
def test_nodes_between_layers_stand_in_the_block_they_belong_to(name):
    names = [node.name for node in model_of(name, plain(name)).graph.node]
    assert len(set(names)) == len(names)
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1" if name == "sd15" else "transformer_blocks.0.attn"
    assert any(each.startswith(block) and each.endswith("Softmax") for each in names)


@pytest.mark.parametrize("name", FREE)
def test_rows_and_lengths_of_prompts_are_free(name):
    ports = {port.source: port for port in plain(name).inputs if port.source in ("latent", "condition")}
    assert ports["latent"].shape[0] == "rows"
    text = next(port for port in plain(name).inputs if port.name == "encoder_hidden_states")
    assert text.shape[:2] == ("rows", "length" if FREE[name] else 6)


@pytest.mark.parametrize("name", ["pixart", "sd15"])
def test_weights_are_stored_once_for_all_graphs(name):
    network, pack = denoiser_of(name, torch.float32).networks["main"], pack_of(name)
    own = sum(tensor.nbytes for tensor in network.state_dict().values())
    assert (pack.path / "weights.bin").stat().st_size <= 1.05 * own + 64 * len(network.state_dict())


def denoiser_of(name, dtype):
    pipe = load(name, dtype)
    return pipe._denoiser(dict(pipe.networks))


def run(name, denoiser, x, times):
    """The prediction of the plain graph."""
    from vivace.export.traced import condition_tensors

    graph, rows = plain(name), len(x)
    tensors = condition_tensors(denoiser, denoiser.encode(None))["cond"]
    feeds = {"x": x.numpy(), "timestep": np.array(times, np.float32)}
    feeds |= {key: np.repeat(value, rows, axis=0) for key, value in tensors.items()}
    names = [port.name for port in graph.inputs]
    session = onnxruntime.InferenceSession(str(pack_of(name).path / graph.file))
    return session.run(["prediction"], {key: feeds[key] for key in names})[0]


def error(found, exact):
    """The error by the rule of tolerances: of the largest number."""
    return np.abs(found - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("name", FREE)
def test_a_plan_runs_in_graphs_as_in_the_eager_executor(name):
    report = verify_pack(pack_of(name))
    assert report.holds
    assert report.error <= 1e-4


@pytest.mark.parametrize("name", FREE)
def test_a_row_has_a_graph_of_what_it_computes(name):
    pack = pack_of(name)
    rows = {graph.structure: graph for graph in pack.manifest.graphs if graph.role == "row"}
    assert set(rows) == set(structures_of(pack.plan))
    for structure, graph in rows.items():
        given = {kept.name for kept in structure.kept if kept.gives}
        assert {port.key for port in graph.inputs if port.source == "kept"} >= given
        made = {kept.name for kept in structure.kept if not kept.gives}
        assert {port.key for port in graph.outputs if port.source == "kept"} >= made
        assert structure.tokens == any(port.source == "tokens" for port in graph.inputs)


def test_blocks_that_are_given_are_not_in_the_graph():
    pack = pack_of("sd15")
    rows = [graph for graph in pack.manifest.graphs if graph.role == "row"]
    (tail,) = [graph for graph in rows if any(kept.gives for kept in graph.structure.kept)]
    (full,) = [graph for graph in rows if not graph.structure.kept]
    assert (pack.path / tail.file).stat().st_size < 0.8 * (pack.path / full.file).stat().st_size


def test_forecasts_read_weights_on_planes():
    rows = [graph for graph in pack_of("flux").manifest.graphs if graph.role == "row"]
    (graph,) = [graph for graph in rows if any(kept.terms == 2 for kept in graph.structure.kept)]
    assert [port.shape for port in graph.inputs if port.source == "weights"] == [(2,)]
    assert sorted({port.plane for port in graph.inputs if port.source == "kept"}) == [0, 1]


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_any_number_of_tokens_can_be_active(name):
    pack = pack_of(name)
    (graph,) = [graph for graph in pack.manifest.graphs if graph.structure and graph.structure.tokens]
    outs = [run_active(pack, graph, active) for active in (2, 5, 16)]
    assert all(np.isfinite(out).all() for out in outs)
    assert {out.shape for out in outs} == {(1, 4, 8, 8)}


def run_active(pack, graph, active):
    """The prediction of one row with that many active tokens."""
    import onnxruntime

    free = {"rows": 1, "active": active, "length": 6}
    feeds = {}
    for port in graph.inputs:
        shape = [free.get(size, size) for size in port.shape]
        ids = port.source == "tokens"
        feeds[port.name] = np.arange(active)[None] if ids else np.ones(shape, np.dtype(port.dtype))
    (out,) = onnxruntime.InferenceSession(str(pack.path / graph.file)).run(["prediction"], feeds)
    return out


def test_what_a_family_cannot_do_is_refused_before_any_graph_is_made():
    pipe = load("sd15")
    denoiser = pipe._denoiser(dict(pipe.networks))
    with WeightStore() as store:
        asked = {"dtype": "float32", "opset": 21, "store": store}
        with pytest.raises(UnsupportedError, match="freeze the plan"):
            traced_graphs(denoiser, [Structure(look="first_block", begin=1)], **asked)
        with pytest.raises(UnsupportedError, match="convolutions"):
            traced_graphs(denoiser, [Structure(tokens=True)], **asked)
        with pytest.raises(UnsupportedError, match="has no site 'mlp'"):
            traced_graphs(denoiser, [Structure(kept=(Kept("mlp", 1, 2, False),))], **asked)
        with pytest.raises(ArgumentError, match="load it in that dtype"):
            traced_graphs(denoiser, [Structure()], **(asked | {"dtype": "float16"}))
        with pytest.raises(ArgumentError, match="opset 20"):
            traced_graphs(denoiser, [Structure()], **(asked | {"opset": 20}))
