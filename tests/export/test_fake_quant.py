"""The fake-quantized reference, and quantized graphs of a whole network against it."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from tests.export.quantized import static_weights
from tests.runtime.tiny_pipe import tiny_pipe
from vivace.engine.plan import Rule, Variant
from vivace.export.description import Description, description_of
from vivace.export.dit import dit_graphs
from vivace.export.fake_quant import fake_linear, fake_quantized
from vivace.export.pack import write_graphs
from vivace.export.qdq import quantized_graphs
from vivace.export.same_codes import compared, graph_codes
from vivace.export.weights import WeightStore
from vivace.models.quantized.formats import fake
from vivace.models.quantized.reach import denoiser_of, network_of, with_linears
from vivace.models.quantized.stand_in import block_names
from vivace.runtime.calls import Structure

BRANCHES = ("cond", "uncond")
RULES = {
    "all": (Rule((0, 3), precision="int8"),),
    "halves": (Rule((0, 2), "mlp", precision="int8"), Rule((2, 3), "attn", precision="int8")),
}
TIMES = (700.0, 90.0)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def weights(pipe):
    return static_weights(pipe, smooth=True)


@pytest.fixture(scope="module")
def folder(pipe, weights, tmp_path_factory):
    """Graphs "row0-…" and "row1-…" of the rules above, with those that prepare their inputs."""
    place, denoiser = tmp_path_factory.mktemp("graphs"), denoiser_of(pipe)
    rules = [tuple((*rule.blocks, rule.site, rule.precision) for rule in each) for each in RULES.values()]
    with WeightStore() as store:
        made = dit_graphs(denoiser, [Structure(precisions=each) for each in rules], store=store)
        names = block_names(network_of(denoiser))
        write_graphs(place, quantized_graphs(made, description_of(weights), names, emitter="cpu", store=store), store)
    return place


def latents(pipe):
    return torch.randn(len(TIMES), *pipe.spec.latent_shape, generator=torch.Generator().manual_seed(1))


def run(path, feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip((out.name for out in session.get_outputs()), session.run(None, feeds), strict=True))


def feeds_of(pipe, folder, labels):
    """Inputs of a row of both branches, branch by branch."""
    times = np.float32(TIMES * len(BRANCHES))
    feeds = run(folder / "prepare.onnx", {"timestep": times, "label": np.int64(labels)})
    size = np.int64(pipe.spec.latent_shape[1:])
    feeds |= run(folder / "positions.onnx", {"size": size})
    return feeds | {"x": latents(pipe).repeat(2, 1, 1, 1).numpy()}


def graph_at(folder, rules):
    return next(folder.glob(f"row{list(RULES).index(rules)}-*.onnx"))


def evaluated(denoiser, pipe, rules):
    """Predictions of both branches in the order of a batch."""
    conditions = [denoiser.encode(1), denoiser.encode(2)]
    with torch.no_grad():
        return torch.cat(denoiser.evaluate(latents(pipe), TIMES, conditions, Variant(branches=BRANCHES, rules=rules)))


def compare(pipe, folder, weights, rules, description=None):
    denoiser = denoiser_of(pipe)
    network = network_of(denoiser)
    return compared(
        graph_at(folder, rules),
        feeds_of(pipe, folder, [1, 2, 10, 10]),
        description or description_of(weights),
        {name: network.get_submodule(name) for name in weights.layers},
        lambda functions: evaluated(with_linears(denoiser, functions), pipe, ()),
    )


@pytest.mark.parametrize("rules", RULES)
def test_a_graph_holds_to_the_reference_of_the_same_description(pipe, folder, weights, rules):
    found = compare(pipe, folder, weights, rules)
    assert found.codes > 0
    assert found.error <= 1e-3
    assert found.ties <= found.codes / 1000


@pytest.mark.parametrize("part", ["weight", "weight_scale", "x_scale", "smooth"])
def test_a_reference_of_another_description_is_told_apart(pipe, folder, weights, part):
    name = "blocks.1.up"
    own = description_of(weights)
    layer = own.layers[name]
    value = getattr(layer, part)
    other = np.flip(value, 0).copy() if part == "weight" else value * np.float32(1.5)
    changed = replace(layer, **{part: float(other) if part == "x_scale" else other})
    description = Description("int8", {**own.layers, name: changed})
    assert compare(pipe, folder, weights, "all", description).error > 1e-3


def test_looking_at_codes_changes_no_bit_of_the_result(pipe, folder):
    feeds = feeds_of(pipe, folder, [1, 2, 10, 10])
    path = graph_at(folder, "all")
    value, codes = graph_codes(path, feeds, "prediction")
    assert value.tobytes() == run(path, feeds)["prediction"].tobytes()
    assert all(-128 <= each.min() <= each.max() <= 127 for each in codes.values())
    assert len(codes) == 12


@pytest.mark.parametrize("rules", RULES)
def test_rows_of_the_reference_are_its_layers_within_the_network(pipe, weights, rules):
    description, denoiser = description_of(weights), denoiser_of(pipe)
    network = network_of(denoiser)
    made = fake_quantized(denoiser, weights, description)
    wanted = {
        name: fake_linear(description.layers[name], network.get_submodule(name).bias)
        for name in weights.layers
        if rules == "all" or (("blocks.2" in name) == name.endswith(("qkv", "out")))
    }
    assert torch.equal(evaluated(made, pipe, RULES[rules]), evaluated(with_linears(denoiser, wanted), pipe, ()))
    assert torch.equal(evaluated(made, pipe, ()), evaluated(denoiser, pipe, ()))


def test_a_layer_of_the_reference_is_the_formula(pipe, weights):
    name = "blocks.0.down"
    codes, linear = description_of(weights).layers[name], network_of(denoiser_of(pipe)).get_submodule(name)
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(3))
    read = fake(x * torch.from_numpy(codes.smooth), torch.tensor(codes.x_scale), "int8").double()
    exact = read @ torch.from_numpy(codes.weight * codes.weight_scale).double() + linear.bias.double()
    assert torch.allclose(
        fake_linear(codes, linear.bias)(x).double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max())
    )
