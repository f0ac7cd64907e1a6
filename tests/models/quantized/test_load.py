"""Quantized weights beside a model: loading, refusals, and sessions whose rows run on them."""

from dataclasses import replace

import pytest
import torch
from tests.models.compiled.test_graph_sessions import session
from tests.models.pipelines.test_denoiser import load, plan_of, prompt_of
from tests.models.quantized.made import layer, rounded, same

import vivace
from vivace.engine.passes import apply_precision
from vivace.kernels.spec import error_of
from vivace.models.pipe import default_plan
from vivace.models.quantized.given import advised, network_of
from vivace.models.quantized.native import layer_names
from vivace.models.quantized.stand_in import block_names, place_of
from vivace.models.quantized.weights import QuantizedWeights


@pytest.fixture(scope="module")
def emoji():
    """(weights of the bundled model, its plain pipe)."""
    pipe = vivace.load("emoji")
    module = pipe.model.module
    names = [(name, module.get_submodule(name).weight) for name in layer_names(len(module.blocks))]
    return rounded(names, pipe.spec.fingerprint), pipe


def foreign(name, **options):
    """A tiny pipeline of a family with weights for all linears of its blocks."""
    pipe = load(name)
    network = next(iter(pipe.networks.values()))
    blocks = {path: index for index, path in enumerate(block_names(network))}
    linears = [(path, part.weight) for path, part in network.named_modules() if type(part) is torch.nn.Linear]
    inside = [(path, weight) for path, weight in linears if place_of(path, blocks) and ".norm" not in path]
    pipe.quantized = rounded(inside, pipe.spec.fingerprint, **options)
    return pipe


def test_weights_come_as_a_file_or_an_object(emoji, tmp_path):
    weights, plain = emoji
    weights.save(tmp_path / "w")
    for given in (tmp_path / "w", str(tmp_path / "w.json"), tmp_path / "w.safetensors", weights):
        assert same(vivace.load("emoji", quantized=given).quantized, weights)
    assert plain.quantized is None


def test_int8_rows_stay_close_and_say_so(emoji):
    weights, plain = emoji
    pipe = vivace.load("emoji", quantized=weights)
    plan = default_plan(pipe.model, steps=3)
    high = plain.compile(plan, backend="eager")("pizza", seed=1)
    low = pipe.compile(apply_precision(plan, "int8", first=1, last=1), backend="eager")("pizza", seed=1)
    assert 0 < error_of(low.latents, high.latents) < 0.2
    assert low.receipt.precisions == {"model": 2, "int8": 1}
    assert torch.equal(pipe.compile(plan, backend="eager")("pizza", seed=1).latents, high.latents)
    result = pipe.compile(apply_precision(plan, "int8"), backend="eager", dtype="bfloat16")("pizza", seed=1)
    assert error_of(result.latents, high.latents) < 0.3


def test_precision_needs_weights_only_where_it_does(emoji):
    _, plain = emoji
    plan = default_plan(plain.model, steps=2)
    with pytest.raises(vivace.UnsupportedError, match=r"step 0.*int8.*vivace quantize"):
        plain.compile(apply_precision(plan, "int8"), backend="eager")
    result = plain.compile(apply_precision(plan, "bf16"), backend="eager")("pizza")
    assert error_of(result.latents, plain.compile(plan, backend="eager")("pizza").latents) < 0.1


def test_weights_of_another_model_are_refused(emoji, tmp_path):
    weights, _ = emoji
    with pytest.raises(vivace.ModelError, match="made for model 000000000000, this one is"):
        vivace.load("emoji", quantized=replace(weights, fingerprint="0" * 64))
    extra = replace(weights, layers={**weights.layers, "blocks.0.condition.modulation": layer(2304, 384)})
    with pytest.raises(vivace.ModelError, match=r"'blocks.0.condition.modulation' is no linear layer that DiT runs"):
        vivace.load("emoji", quantized=extra)
    with pytest.raises(vivace.ModelError, match=r"blocks.0.out has shape \(3, 2\)"):
        vivace.load("emoji", quantized=replace(weights, layers={"blocks.0.out": layer(3, 2)}))
    with pytest.raises(vivace.ArgumentError, match="quantized is int"):
        vivace.load("emoji", quantized=3)
    with pytest.raises(vivace.ModelError, match="no quantized weights there"):
        vivace.load("emoji", quantized=tmp_path / "none")
    (tmp_path / "half.json").write_text("{}")
    with pytest.raises(vivace.ModelError, match=r"half\.json: is no description"):
        vivace.load("emoji", quantized=tmp_path / "half")


def test_weights_that_were_changed_since_are_refused(emoji):
    weights, _ = emoji
    pipe = vivace.load("emoji", quantized=weights)
    plan = default_plan(pipe.model, steps=2)
    with torch.no_grad():
        pipe.model.module.blocks[0].out.weight.add_(0.0)
    with pytest.raises(vivace.ModelError, match="were changed since its quantized weights were loaded"):
        pipe.compile(plan)
    changed = foreign("sd3")
    with torch.no_grad():
        next(iter(changed.networks["transformer"].parameters())).add_(1.0)
    with pytest.raises(vivace.ModelError, match="or a LoRA was added or fused"):
        changed.compile(plan_of("sd3", changed))


def test_models_of_several_networks_are_refused():
    assert network_of({"main": 1}) == 1
    with pytest.raises(vivace.UnsupportedError, match="one network; this one has main, transformer_2"):
        network_of({"main": 1, "transformer_2": 2})


def test_debugging_names_layer_and_timestep(emoji, monkeypatch):
    weights, _ = emoji
    pipe = vivace.load("emoji", quantized=weights)
    plan = apply_precision(default_plan(pipe.model, steps=2), "int8").bind(pipe.spec)
    step, x = plan.steps[0], torch.full((1, *pipe.spec.latent_shape), torch.nan)
    monkeypatch.setenv("VIVACE_DEBUG", "1")
    for backend in ("eager", "cpu"):
        made = pipe.compile(plan, backend=backend)
        with pytest.raises(vivace.StateError, match=r"blocks\.0\.qkv.* NaN or infinity.*" + f"{step.timestep:g}"):
            made.executor.evaluate(x, [step.timestep], [made.denoiser.encode("pizza")], step.variant)


def test_a_plan_runs_as_the_weights_advise_unless_it_says_itself(emoji):
    weights, plain = emoji
    plan = default_plan(plain.model, steps=4)
    told = replace(weights, advice={"first": 1, "high": "bf16"})
    assert advised(plan, told) == apply_precision(plan, "int8", first=1, high="bf16")
    said = apply_precision(plan, "bf16")
    assert advised(said, told) is said and advised(plan, None) is plan
    with pytest.raises(vivace.ModelError, match="advice is of another release"):
        advised(plan, replace(weights, advice={"middle": 1}))


@pytest.mark.parametrize(
    ("name", "groups"), [("flux", 0), ("flux", 3), ("sd3", 3), ("sd15", 0)], ids=["flux", "flux-static", "sd3", "sd15"]
)
def test_foreign_networks_compute_the_same_eagerly_and_compiled(name, groups):
    pipe = foreign(name, smooth=True, groups=groups)
    plan = apply_precision(plan_of(name, pipe), "int8")
    eager, compiled = (pipe.compile(plan, backend=backend) for backend in ("eager", "cpu"))
    plain = pipe.compile(plan_of(name, pipe), backend="eager")
    low, ours, high = (session(prompt_of(name), seed=3).latents for session in (eager, compiled, plain))
    assert error_of(ours, low) < error_of(low, high) < 0.2
    report = compiled(prompt_of(name)).receipt.to_dict()["compiled"]
    assert report["main in int8"]["replaced"]["int8 linear"]["places"] == len(pipe.quantized.layers)
    assert report["products"] and "main" not in report


def test_samples_at_different_times_keep_their_bits():
    pipe = foreign("pixart", groups=4)
    plan = apply_precision(plan_of("pixart", pipe), "int8")
    session = pipe.compile(plan, backend="cpu")
    requests = [vivace.Request(prompt_of("pixart"), seed=seed) for seed in (1, 2)]
    alone = [session(prompt_of("pixart"), seed=seed).latents for seed in (1, 2)]
    states = [session.begin(requests[0])]
    session.step(states)
    states.append(session.begin(requests[1]))
    while not all(state.done for state in states):
        session.step([state for state in states if not state.done])
    assert all(torch.equal(session.finish(state).latents, one) for state, one in zip(states, alone, strict=True))


@pytest.mark.parametrize("groups", [0, 3], ids=["token", "static"])
def test_graphs_of_foreign_networks_have_the_bits_of_eager(groups):
    pipe = foreign("pixart", groups=groups)
    plan = apply_precision(plan_of("pixart", pipe), "int8", first=1)
    denoiser = pipe.compile(plan, backend="eager").denoiser
    graphs, eager = (session(denoiser, denoiser, plan, graphs=graphs) for graphs in (True, False))
    prompt = prompt_of("pixart")
    assert torch.equal(graphs(prompt, seed=3).latents, eager(prompt, seed=3).latents)
    report = graphs.executor.report()
    assert "not_captured" not in report and report["graphs"] >= 2


def test_rows_of_several_precisions_share_a_session():
    pipe = foreign("sd3")
    plan = plan_of("sd3", pipe)
    mixed = apply_precision(apply_precision(plan, "int8", first=1, high="bf16", site="mlp"), "bf16", site="attn")
    eager, compiled = (pipe.compile(mixed, backend=backend) for backend in ("eager", "cpu"))
    high = pipe.compile(plan, backend="eager")(prompt_of("sd3"), seed=3).latents
    low = eager(prompt_of("sd3"), seed=3).latents
    assert error_of(compiled(prompt_of("sd3"), seed=3).latents, low) < error_of(low, high)
    report = compiled(prompt_of("sd3")).receipt.compiled
    assert {"main in bf16", "main in bf16+int8"} <= set(report)
    packed = report["main in bf16+int8"]["replaced"]
    assert packed["bf16 linear"]["places"] + packed["int8 linear"]["places"] > 20


def test_fp8_does_not_run_on_a_processor():
    pipe = foreign("sd3")
    layers = {
        name: replace(one, weight=one.weight.float().to(torch.float8_e4m3fn))
        for name, one in pipe.quantized.layers.items()
    }
    pipe.quantized = QuantizedWeights("fp8", pipe.spec.fingerprint, layers)
    with pytest.raises(vivace.UnsupportedError, match="fp8 has kernels on CUDA only"):
        pipe.compile(apply_precision(plan_of("sd3", pipe), "fp8"), backend="cpu")


def test_layers_under_hooks_are_named():
    pipe = foreign("sd3")
    block = pipe.networks["transformer"].transformer_blocks[0]
    handle = block.ff.net[2].register_forward_hook(lambda *_: None)
    try:
        for backend in ("eager", "cpu"):
            with pytest.raises(vivace.UnsupportedError, match=r"transformer_blocks\.0\.ff\.net\.2: .*hooks"):
                pipe.compile(apply_precision(plan_of("sd3", pipe), "int8"), backend=backend)(prompt_of("sd3"))
    finally:
        handle.remove()
