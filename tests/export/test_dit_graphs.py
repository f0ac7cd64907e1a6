"""Graphs of the native DiT in ONNX Runtime against the eager network: sizes, batches, pictures, names, dtypes."""

import copy

import numpy as np
import pytest
import torch

from tests.export.dit_runs import Graphs, denoiser_of, tiny_model
from vivace.errors import UnsupportedError
from vivace.export.dit import dit_graphs
from vivace.export.weights import WeightStore
from vivace.kernels.spec import within_tolerance
from vivace.models import pictures
from vivace.models.load import load
from vivace.runtime.calls import Kept, Structure

CACHED = Structure(kept=(Kept("attn", 1, 2, False, 1), Kept("block", 0, 3, False), Kept("mlp", 5, 6, True, 0, 2)))
TOKENS = Structure(kept=tuple(Kept("kv", i, i + 1, True, 0, 1) for i in range(6)), tokens=True)


@pytest.fixture(scope="module")
def emoji():
    return load("emoji").module


@pytest.fixture(scope="module")
def wide():
    return load("emoji", dtype=torch.float64).module


@pytest.fixture(scope="module")
def graphs(emoji, tmp_path_factory):
    return Graphs(tmp_path_factory.mktemp("emoji"), emoji, [Structure(), CACHED, TOKENS], pixels=True)


def holds(found, eager, exact):
    good, error, bound = within_tolerance(torch.as_tensor(found), torch.as_tensor(eager), torch.as_tensor(exact))
    assert good, f"error {error:.3g} exceeds {bound:.3g}"


def prepared(graphs, times, labels, height, width):
    return graphs.prepared(times, labels, (height, width), 4)


@pytest.mark.parametrize(("rows", "height", "width"), [(1, 32, 32), (3, 32, 32), (2, 24, 40)])
def test_a_plain_row_errs_no_more_than_twice_the_eager_network(graphs, emoji, wide, rows, height, width):
    x = torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(0))
    times, labels = np.linspace(999, 1, rows), np.arange(rows) * 90
    feeds = prepared(graphs, times, labels, height, width)
    found = graphs.of("row0-full", feeds | {"x": x.numpy()})["prediction"]
    given = torch.from_numpy(times), torch.from_numpy(labels)[None]
    with torch.no_grad():
        holds(found, emoji(x, *given)[0], wide(x.double(), *given)[0])


@pytest.mark.parametrize(
    "fields",
    [{"attention_bias": False, "activation_fn": "gelu"}, {"patch_size": 1, "sample_size": 4, "num_layers": 1}],
    ids=str,
)
def test_other_architectures_err_no_more_than_twice_the_eager_network(tmp_path, fields):
    model = tiny_model(**fields)
    graphs, wide = Graphs(tmp_path, model, [Structure()]), copy.deepcopy(model).double()
    x = torch.randn(11, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    t, labels = torch.linspace(0, 999, 11), torch.arange(11)[None]
    found = graphs.prepared(t.numpy(), labels[0].numpy(), (6, 8), model.config.patch)
    found = graphs.of("row0-full", found | {"x": x.numpy()})["prediction"]
    holds(found, model(x, t, labels)[0], wide(x.double(), t, labels)[0])


def test_what_does_not_depend_on_x_errs_no_more_than_twice_the_eager_network(graphs, emoji, wide):
    times, labels = torch.linspace(0, 999, 7, dtype=torch.float64), torch.arange(994, 1001)[None]
    found = prepared(graphs, times.numpy(), labels[0].numpy(), 24, 40)
    with torch.no_grad():
        eager, exact = emoji.condition(times, labels), wide.condition(times, labels)
    holds(found["modulation"], eager.blocks[:, 0].transpose(0, 1), exact.blocks[:, 0].transpose(0, 1))
    holds(found["final"], eager.final[0], exact.final[0])
    assert np.abs(found["positions"] - emoji.position_table((6, 10)).numpy()).max() <= 2**-24


@pytest.mark.filterwarnings("ignore:overflow")
def test_pictures_are_those_of_the_package_byte_for_byte(graphs):
    """Ties, what lies beyond the range, infinities and what is no number included."""
    x = 1.2 * torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(3))
    ties = (torch.arange(256) + 0.5) / 127.5 - 1
    x[0, 0].view(-1)[: len(ties)] = ties
    x[0, 1, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    found = graphs.of("decode", {"latent": x.numpy()})["picture"]
    for picture, wanted in zip(found, pictures.to_images(x), strict=True):
        assert np.array_equal(picture, np.asarray(wanted))


@pytest.mark.parametrize(("x", "said"), [((1, 3, 30, 32), "stem.cells"), ((1, 4, 32, 32), "x")])
def test_sizes_that_the_network_cannot_take_are_refused(graphs, x, said):
    session = graphs.session(graphs.named["row0-full"])
    feeds = prepared(graphs, [1.0], [0], 32, 32) | {"x": np.zeros(x, np.float32)}
    with pytest.raises(Exception, match=said):
        session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})


def test_ports_of_the_manifest_are_those_of_the_graphs(graphs):
    for graph in graphs.made:
        for ports, infos in ((graph.inputs, graph.model.graph.input), (graph.outputs, graph.model.graph.output)):
            assert [port.name for port in ports] == [info.name for info in infos]
            for port, info in zip(ports, infos, strict=True):
                shape = [each.dim_param or each.dim_value for each in info.type.tensor_type.shape.dim]
                assert tuple(shape) == port.shape
    names = {name for graph in graphs.made for port in graph.inputs for name in port.shape if isinstance(name, str)}
    assert names == {"rows", "height", "width", "tokens", "active"}


def test_nodes_and_weights_are_named_after_the_network(graphs):
    nodes = {node.name for node in graphs.named["row0-full"].model.graph.node}
    assert {"stem.patches", "blocks.3.attn.qkv", "blocks.3.attn.softmax", "blocks.5.mlp.gelu", "head.pixels"} <= nodes
    weights = {tensor.name for tensor in graphs.named["row0-full"].model.graph.initializer}
    assert {"blocks.3.qkv.weight", "blocks.3.qkv.bias", "patches.weight", "final.weight"} <= weights


def test_a_linear_layer_is_a_product_with_its_weight_and_a_sum_with_its_bias(graphs, emoji):
    """What quantization rewrites: MatMul(x, W[K, N]), then Add(bias)."""
    graph = graphs.named["row0-full"].model.graph
    products = {node.input[1]: node for node in graph.node if node.op_type == "MatMul" and ".weight" in node.input[1]}
    assert len(products) == 4 * len(emoji.blocks) + 2
    sums = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "Add"}
    for weight, node in products.items():
        assert sums[node.output[0]] == weight.replace(".weight", ".bias")
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert sizes["blocks.0.up.weight"] == [192, 768]


def test_norms_have_constant_factors_that_every_runtime_takes(graphs):
    """OpenVINO refuses factors that differ by row, though the standard has them."""
    norms = [node for node in graphs.named["row0-full"].model.graph.node if node.op_type == "LayerNormalization"]
    assert {tuple(node.input[1:]) for node in norms} == {("ones",)}


def test_every_weight_is_stored_once_for_all_graphs(emoji, graphs):
    own = sum(parameter.numel() * 4 for parameter in emoji.parameters())
    size = (graphs.folder / "weights.bin").stat().st_size
    assert own * 0.99 < size < own * 1.01


def test_a_graph_is_the_same_every_time_and_says_nothing_about_when_it_was_made(emoji):
    def made():
        with WeightStore() as store:
            graphs = dit_graphs(denoiser_of(emoji, True), [Structure(), CACHED, TOKENS], store=store)
        assert all(graph.model.producer_name == "vivace" and not graph.model.metadata_props for graph in graphs)
        return [graph.model.SerializeToString(deterministic=True) for graph in graphs]

    assert made() == made()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_graphs_take_and_give_float32_latents_and_hold_narrow_weights(emoji, tmp_path, dtype):
    graphs = Graphs(tmp_path, emoji, [Structure(), CACHED, TOKENS], dtype)
    for graph in graphs.made:
        ports = {port.name: port.dtype for port in (*graph.inputs, *graph.outputs)}
        assert {ports.get(name, "float32") for name in ("x", "prediction", "attn.1.plane0", "mlp.5.weights")} == {
            "float32"
        }
        assert {ports.get(name, dtype) for name in ("modulation", "final", "positions", "kv.2.plane0")} == {dtype}
    own = sum(parameter.numel() * 2 for parameter in emoji.parameters())
    assert (tmp_path / "weights.bin").stat().st_size < own * 1.01


def test_what_is_not_asked_for_is_not_in_the_graph():
    """A row that reads what leaves its first blocks computes neither stem nor these blocks."""
    made = made_of([Structure(kept=(Kept("block", 0, 5, True, 0, 1),))])
    (graph,) = (each for each in made if each.role == "row")
    names = {tensor.name.split(".")[1] for tensor in graph.model.graph.initializer if tensor.name.startswith("blocks")}
    assert names == {"5"}
    assert [port.name for port in graph.inputs] == [
        "x",
        "modulation",
        "block..5.weights",
        "block..5.plane0",
        "final",
    ]


PRECISE = Structure(precisions=((0, 6, "block", "fp32"),))


@pytest.mark.parametrize(
    ("structure", "options", "said"),
    [
        (Structure(), {"dtype": "float8"}, "dtype 'float8'"),
        (Structure(), {"opset": 17}, "opset 17"),
        (Structure(model="second"), {}, "model 'second'"),
        (PRECISE, {"dtype": "float16"}, "in fp32, the pack's network in float16"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_one_sentence(structure, options, said):
    with pytest.raises(UnsupportedError, match=said):
        made_of([structure], **options)


def made_of(structures, **options):
    with WeightStore() as store:
        return dit_graphs(denoiser_of(load("emoji").module), structures, store=store, **options)
