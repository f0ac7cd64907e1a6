"""Calibration of whole denoisers, from a plan to quantized weights, on the bundled model and tiny families."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models.pipelines import tiny
from tests.models.quantized.made import same

import vivace
from vivace.cli import run
from vivace.engine.calibrate.draw import group_of
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.passes import apply_precision
from vivace.errors import ArgumentError, ModelError, UnsupportedError
from vivace.models.quantized.calibrate import VECTOR, calibrate_quantization, plan_of, prompts_of, samples_of
from vivace.models.quantized.collect import Recorder, collect_inputs, evaluate
from vivace.models.quantized.quantize import quantize_layers
from vivace.models.quantized.reach import ASKED, OUTSIDE, block_linears, denoiser_of, network_of, with_linears
from vivace.models.quantized.recipes import RECIPES, Recipe, recipe_of
from vivace.models.quantized.stand_in import stand_in
from vivace.models.quantized.weights import QuantizedWeights

FEW = {"samples": 5, "groups": 3, "rows": 96}
STEPS = 4
FAST = {"sensitivity": "local", "advice": False}


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


@pytest.fixture(scope="module")
def plan(pipe):
    return pipe.choose_plan(None, None, STEPS, None)


@pytest.fixture(scope="module")
def table(pipe, plan):
    return calibrate_quantization(pipe, plan, **FEW)


@pytest.fixture(scope="module")
def weights(pipe, table):
    return quantize_layers(pipe, table, sensitivity="local")


def test_a_table_holds_every_linear_of_the_blocks_by_group(pipe, plan, table):
    network = network_of(denoiser_of(pipe))
    names = [f"blocks.{i}.{part}" for i in range(6) for part in ("qkv", "out", "up", "down")]
    assert sorted(table.metadata["layers"]) == sorted(names) and table.kind == "quantization"
    assert table.fingerprint == pipe.spec.fingerprint and table.metadata["plan"]["hash"] == plan.hash
    samples = samples_of(table)
    branches = Counter(group_of(table.metadata["edges"], s.timestep) for s in samples for _ in s.branches)
    for name in names:
        depth = network.get_submodule(name).in_features
        maxima, rows = table.arrays[f"{name}.maxima"], table.arrays[f"{name}.rows"]
        groups, counts = table.arrays[f"{name}.rows_group"], table.arrays[f"{name}.counts"]
        assert maxima.shape == (3, depth) and rows.shape == (96, depth) and (np.bincount(groups) == 32).all()
        assert counts.tolist() == [64 * branches[g] for g in range(3)]  # 64 tokens
        for g in range(3):
            assert (np.abs(rows[groups == g].astype(np.float32)) <= maxima[g] * (1 + 1e-3)).all()
    assert set(table.metadata["kept"].values()) == {OUTSIDE} and "final" in table.metadata["kept"]


def test_states_carry_their_timesteps_and_prompts(plan, table):
    timesteps = [step.timestep for step in plan.steps]
    samples = samples_of(table)
    assert len(samples) >= 5 and all(timesteps[s.evaluation] == s.timestep for s in samples)
    assert table.metadata["plan"]["timesteps"] == timesteps
    assert plan_of(table).hash == plan.bind(vivace.load("emoji").spec).hash
    assert all(0 <= prompt < 1000 for prompt in prompts_of(table)) and len(samples[0].branches) == 2
    # Noise is unit at the noise end: what belongs to a late timestep is not labelled with an early one.
    first = [s.x.std() for s in samples if s.evaluation == 0]
    assert all(0.9 < float(std) < 1.1 for std in first)


def test_what_is_recorded_is_what_layers_read(pipe, table):
    denoiser, name = denoiser_of(pipe), "blocks.2.up"
    samples = samples_of(table)[:2]
    conditions = [denoiser.encode(prompt) for prompt in prompts_of(table)]
    network, read = network_of(denoiser), []
    layer = network.get_submodule(name)

    def look(x):
        read.append(x)
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    watched = with_linears(denoiser, {name: look})
    for sample in samples:
        out = evaluate(watched, [sample], conditions)
        torch.testing.assert_close(out, evaluate(denoiser, [sample], conditions))
    recorder = collect_inputs(denoiser, samples, conditions, (), rows=1 << 20)
    rows, _ = recorder.seen[name].rows()
    expected = torch.cat([x.reshape(-1, x.shape[-1]) for x in read])
    assert rows.shape == expected.shape
    torch.testing.assert_close(recorder.seen[name].maxima[0], expected.abs().amax(0))
    torch.testing.assert_close(rows.sort(0).values, expected.sort(0).values, rtol=1e-4, atol=1e-4)
    assert type(network.get_submodule(name)) is torch.nn.Linear  # nothing was patched


def test_rows_are_a_bounded_uniform_sample():
    recorder, layer = Recorder(1, 20, seed=3), torch.nn.Linear(1, 1)
    record = recorder.tap("x", layer)
    for call in range(10):
        record(torch.arange(100.0).view(1, 100, 1) + 100 * call)
    rows, groups = recorder.seen["x"].rows()
    assert rows.shape == (20, 1) and recorder.seen["x"].counts == [1000] and groups.tolist() == [0] * 20
    assert len(set(rows[:, 0].tolist())) == 20  # without replacement
    found = Counter(int(r) // 500 for s in range(40) for r in _sample(s))
    assert abs(found[0] - 400) < 5 * math.sqrt(800 * 0.25)  # either half of the calls as often


def _sample(seed):
    recorder = Recorder(1, 20, seed=seed)
    record = recorder.tap("x", torch.nn.Linear(1, 1))
    for call in range(10):
        record(torch.arange(100.0).view(1, 100, 1) + 100 * call)
    return recorder.seen["x"].rows()[0][:, 0].tolist()


def test_a_seed_decides_everything(pipe, plan, table):
    again = calibrate_quantization(pipe, plan, **FEW)
    assert again.hash == table.hash
    assert same(quantize_layers(pipe, again, **FAST), quantize_layers(pipe, table, **FAST))
    assert calibrate_quantization(pipe, plan, **FEW, seed=1).hash != table.hash


def test_calibration_runs_in_full_precision_whatever_the_plan_says(pipe, plan, table):
    mixed = calibrate_quantization(pipe, apply_precision(plan, "int8"), **FEW)
    assert np.array_equal(mixed.arrays["samples.x"], table.arrays["samples.x"])
    assert mixed.metadata["plan"]["hash"] != table.metadata["plan"]["hash"]


def test_a_table_of_another_model_is_refused(pipe, table):
    other = CalibrationTable(table.kind, "0" * 64, table.arrays, table.metadata)
    with pytest.raises(ModelError, match="made for model 000000000000, this one is .*calibrate this model"):
        quantize_layers(pipe, other)
    with pytest.raises(ModelError, match="for caching"):
        quantize_layers(pipe, CalibrationTable("caching", table.fingerprint, table.arrays, table.metadata))


def test_quantized_layers_stand_for_the_models(pipe, table, weights):
    linears = block_linears(network_of(denoiser_of(pipe)))
    assert weights.fingerprint == pipe.spec.fingerprint and set(weights.layers) == set(linears)
    for name, layer in weights.layers.items():
        moved = linears[name].weight if layer.smooth is None else linears[name].weight / layer.smooth
        off = (moved / layer.weight_scale[:, None] - layer.weight).abs()
        assert bool(((off < 0.5 + 1e-4) | (layer.weight.abs() == 127)).all())  # the nearest code, or the last one
        assert layer.x_scale is None and layer.weight.dtype == torch.int8
    assert any(layer.smooth is not None for layer in weights.layers.values())
    assert set(weights.advice) == {"first", "last", "high"} and len(weights.source["effect_by_group"]) == 3
    assert weights.source["calibration"] == table.hash and weights.source["recipe"]["name"] == "per_token"


def test_the_stated_error_is_that_of_the_weights(pipe, table, weights):
    """As the eager twin of the kernels runs them, on other states of the same trajectories."""
    samples = samples_of(table)
    conditions = [denoiser_of(pipe).encode(prompt) for prompt in prompts_of(table)]
    denoiser = denoiser_of(pipe)
    model = replace(pipe.model, module=stand_in(network_of(denoiser), (("int8", "int8"),) * 6, weights))
    twin = type(denoiser)(model)
    squares = []
    for sample in samples:
        target = evaluate(denoiser, [sample], conditions)
        off = evaluate(twin, [sample], conditions) - target
        squares.append(float(off.square().sum() / target.square().sum()))
    told = weights.source["error"]["measured"]
    assert 0.5 * told < math.sqrt(sum(squares) / len(squares)) < 2 * told


def test_static_scales_are_one_a_layer_and_group(pipe, table, weights):
    static = quantize_layers(pipe, table, activations="static", **FAST)
    assert static.static and static.edges == weights.edges and len(static.edges) == 2
    for name, layer in static.layers.items():
        assert layer.x_scale.shape == (3,)
        largest = torch.from_numpy(table.arrays[f"{name}.maxima"])
        smooth = 1.0 if layer.smooth is None else layer.smooth
        assert bool((layer.x_scale * 127 <= (largest * smooth).amax(1) * (1 + 1e-6)).all())
    assert static.source["error"]["measured"] >= weights.source["error"]["measured"]


def test_gptq_lowers_the_error(pipe, table, weights):
    rounded = quantize_layers(pipe, table, rounding="gptq", **FAST)
    assert rounded.source["rounding"] == "gptq"
    assert rounded.source["error"]["measured"] < weights.source["error"]["measured"]
    assert any(not torch.equal(rounded.layers[name].weight, weights.layers[name].weight) for name in weights.layers)


def test_fp8_takes_the_same_table(pipe, table):
    weights = quantize_layers(pipe, table, format="fp8", **FAST)
    assert weights.format == "fp8" and weights.layers["blocks.0.qkv"].weight.dtype == torch.float8_e4m3fn
    assert 0 < weights.source["error"]["measured"] < 0.1


def test_layers_stay_high_as_asked_and_by_budget(pipe, table):
    asked = quantize_layers(pipe, table, high=("blocks.0", "*.down"), **FAST)
    assert set(asked.layers) == {f"blocks.{i}.{part}" for i in range(1, 6) for part in ("qkv", "out", "up")}
    assert asked.kept["blocks.0.qkv"] == asked.kept["blocks.3.down"] == ASKED
    most = ("blocks.1", "blocks.2", "blocks.3", "blocks.4")
    whole = quantize_layers(pipe, table, high=most, advice=False)
    assert whole.source["sensitivity"]["how"] == "network"
    budget = 0.7 * whole.source["error"]["measured"]
    tight = quantize_layers(pipe, table, high=most, advice=False, budget=budget)
    high = [name for name in tight.kept if name in whole.layers]
    errors = {n: np.mean(np.square(e)) for n, e in whole.source["sensitivity"]["layers"].items()}
    assert high and set(high) == set(sorted(errors, key=errors.get)[-len(high) :])  # the most sensitive ones
    assert tight.source["error"]["predicted"] <= budget
    assert all("alone it moves the prediction by" in tight.kept[name] for name in high)
    nothing = quantize_layers(pipe, table, high=("blocks.*",))
    assert not nothing.layers and not nothing.advice
    with pytest.raises(ArgumentError, match="'blocks.9' names no layer"):
        quantize_layers(pipe, table, high=("blocks.9",))


def test_weights_keep_through_their_file(weights, tmp_path):
    weights.save(tmp_path / "w")
    again = QuantizedWeights.load(tmp_path / "w")
    assert same(again, weights) and again.source["error"] == weights.source["error"]


def test_recipes_are_data(pipe, plan):
    for recipe in RECIPES.values():
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe == recipe_of(recipe.name)
    with pytest.raises(ArgumentError, match="recipe 'best' is unknown; use per_token, ptq4dm, static"):
        recipe_of("best")
    with pytest.raises(ArgumentError, match="law 'gamma'"):
        calibrate_quantization(pipe, plan, recipe=replace(RECIPES["static"], law="gamma"))
    with pytest.raises(ArgumentError, match="another release"):
        Recipe.from_dict({"name": "x"})
    with pytest.raises(ArgumentError, match="samples is True"):
        calibrate_quantization(pipe, plan, samples=True)
    with pytest.raises(ArgumentError, match="prompts is empty"):
        calibrate_quantization(pipe, plan, prompts=[])


def test_ptq4dm_is_one_static_scale_a_layer_without_migration(pipe, plan):
    table = calibrate_quantization(pipe, plan, recipe="ptq4dm", samples=6, rows=96)
    weights = quantize_layers(pipe, table, **FAST)
    assert weights.edges == () and weights.advice == {"first": 0, "last": 0, "high": "bf16"}
    assert all(layer.x_scale.shape == (1,) and layer.smooth is None for layer in weights.layers.values())


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "sdxl"])
def test_families_of_diffusers_are_calibrated(name, tmp_path):
    pipe = vivace.load(tiny.make(name), call={"height": 16, "width": 16} if name != "dit" else {})
    prompts = None if name == "dit" else [None]
    with pytest.raises(ArgumentError, match="give some") if prompts else pytest.MonkeyPatch.context():
        calibrate_quantization(pipe, pipe.choose_plan(None, None, 2, None), samples=1, groups=1, rows=8)
    table = calibrate_quantization(
        pipe, pipe.choose_plan(None, None, 2, None), samples=2, groups=2, rows=32, prompts=prompts
    )
    table.save(tmp_path / "t")
    weights = quantize_layers(pipe, CalibrationTable.load(tmp_path / "t"), **FAST)
    network = network_of(denoiser_of(pipe))
    assert set(weights.layers) | set(weights.kept) == {
        name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert {OUTSIDE, VECTOR} == set(weights.kept.values())  # modulation by what it reads, not by its name
    assert 0 < weights.source["error"]["measured"] < 0.05
    assert not any("norm1.linear" in name or "time_emb_proj" in name for name in weights.layers)


def test_prompts_of_a_bare_network_are_kept(tmp_path):
    network = tiny.make("sd3").transformer
    pipe = vivace.load(network, scheduler=tiny.make("sd3").scheduler)
    prompt = {
        "encoder_hidden_states": tiny.embeddings(1, tiny.TEXT, tiny.WIDTH),
        "pooled_projections": tiny.embeddings(1, tiny.WIDTH),
    }
    plan = pipe.choose_plan(None, "flow_euler", 2, None)
    calibrate_quantization(pipe, plan, samples=2, groups=1, rows=16, prompts=[prompt]).save(tmp_path / "t")
    weights = quantize_layers(pipe, CalibrationTable.load(tmp_path / "t"), sensitivity="local")
    assert weights.source["error"]["measured"] < 0.05 and 0 < weights.source["effect_by_group"][0] < 0.05


def test_two_networks_are_refused():
    pipe = vivace.load(tiny.make("wan22"), call={"height": 16, "width": 16, "num_frames": 5})
    with pytest.raises(UnsupportedError, match="several networks"):
        calibrate_quantization(pipe, pipe.choose_plan(None, None, 2, None), prompts=[None])


def test_command_line(capsys, tmp_path):
    out, lines = tmp_path / "t.safetensors", tmp_path / "prompts.txt"
    lines.write_text("pizza\n\nred heart\n")
    options = ["--steps", "3", "--samples", "3", "--groups", "2", "--prompts", str(lines), "--seed", "5"]
    assert run(["calibrate", "emoji", "--quantization", "--out", str(out), *options, "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    table = CalibrationTable.load(out)
    assert data["hash"] == table.hash and data["groups"] == 2 and len(data["layers"]) == 24
    assert prompts_of(table) == ["pizza", "red heart"] and table.metadata["seed"] == 5
    assert run(["calibrate", "emoji", "--quantization", "--out", str(out), *options]) == 0
    assert "24 layers measured" in capsys.readouterr().out
    for bad, message in (
        (["calibrate", "emoji", "--out", str(out)], "say what for: --solver METHOD, --quantization"),
        (["calibrate", "emoji", "--quantization", "--out", str(tmp_path / "no" / "t")], "cannot be written"),
        (["calibrate", "emoji", "--quantization", "--out", str(tmp_path)], "is a folder"),
        (["calibrate", "emoji", "--quantization", "--out", str(out), "--recipe", "best"], "recipe 'best'"),
        (["calibrate", "emoji", "--quantization", "--out", str(out), "--prompts", str(out)], "cannot be read as text"),
    ):
        assert run(bad) == 2
        assert message in capsys.readouterr().err
