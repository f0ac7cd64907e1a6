"""`export_onnx`: what a pack of the bundled model holds, and that it runs as the eager session does."""

import json

import numpy as np
import pytest

import vivace
from tests.export.quantized import static_weights
from vivace.errors import ArgumentError, OutputError, UnsupportedError
from vivace.export import export_onnx
from vivace.runtime.calls import calls_of, structures_of
from vivace.runtime.pack import open_pack
from vivace.runtime.verify import verify_pack


def plan_of(pipe, steps=8):
    return vivace.make_plan(pipe.spec.schedule, "unipc", steps, prediction=pipe.spec.prediction)


def everything(pipe):
    """Guidance in the middle, halves of blocks given again, half the tokens, all at once."""
    plan = vivace.passes.apply_guidance(plan_of(pipe), 2.0, interval=(0.1, 0.9))
    plan = vivace.passes.apply_block_cache(plan, vivace.planners.Fora(interval=2))
    return vivace.passes.apply_tokens(plan, keep=0.5, selector="change")


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


@pytest.fixture(scope="module")
def pack(pipe, tmp_path_factory):
    return export_onnx(pipe, everything(pipe), tmp_path_factory.mktemp("packs") / "all")


def test_a_plan_with_caches_tokens_and_skipped_guidance_runs_as_the_eager_session_does(pack):
    found = verify_pack(pack, threads=1)
    assert found.holds and found.error <= 1e-4


def test_every_structure_of_the_plan_has_one_graph(pack):
    graphs = [graph.structure for graph in pack.graphs("row")]
    assert len(graphs) == len(set(graphs)) >= 5
    assert set(graphs) == set(structures_of(pack.plan))


def test_rows_without_guidance_run_the_graph_of_guided_ones(pack):
    branches = {call.branches for row in calls_of(pack.plan) for call in row.own}
    assert branches == {("cond",), ("cond", "uncond")}


def test_weights_are_stored_once_however_many_graphs_read_them(pack):
    size = sum(info.bytes for info in pack.manifest.files)
    assert size - 5_000_000 <= 1.05 * sum(pack.manifest.weights.values())
    assert (pack.path / "weights.bin").stat().st_size <= 1.01 * sum(pack.manifest.weights.values())


def test_the_same_export_has_the_same_bytes(pack, pipe, tmp_path):
    again = export_onnx(pipe, everything(pipe), tmp_path / "again")
    assert again.manifest == pack.manifest
    for info in pack.manifest.files:
        assert (again.path / info.name).read_bytes() == (pack.path / info.name).read_bytes(), info.name


def test_a_pack_is_replaced_only_when_asked_for(pack, pipe, tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(pipe, plan_of(pipe, 2), pack.path)
    (tmp_path / "notes").mkdir()
    with pytest.raises(OutputError, match="holds no pack"):
        export_onnx(pipe, plan_of(pipe, 2), tmp_path / "notes", overwrite=True)
    first = export_onnx(pipe, plan_of(pipe, 2), tmp_path / "pack")
    second = export_onnx(pipe, plan_of(pipe, 3), tmp_path / "pack", overwrite=True)
    assert first.plan != second.plan == open_pack(tmp_path / "pack").plan


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        ({"dtype": "float64"}, "dtype is 'float64'; use float32 or float16 or bfloat16"),
        ({"opset": 17}, "opset is 17; use 21 or 23"),
        ({"target": "gpu"}, "target is 'gpu'; use cpu or tensorrt"),
    ),
)
def test_wrong_options_are_refused_before_any_work(pipe, tmp_path, wrong, message):
    with pytest.raises(ArgumentError, match=message):
        export_onnx(pipe, plan_of(pipe, 2), tmp_path / "pack", **wrong)
    assert not any(tmp_path.iterdir())


def test_what_no_pack_holds_is_refused_with_the_row_and_nothing_is_left(pipe, tmp_path):
    with pytest.raises(UnsupportedError, match="step 0: a pack holds no rows with merged tokens"):
        export_onnx(pipe, vivace.passes.apply_merge(plan_of(pipe, 2), share=0.5), tmp_path / "pack")
    assert not any(tmp_path.iterdir())


def test_a_source_of_steps_is_refused_for_the_plan_that_a_run_records(pipe, tmp_path):
    with pytest.raises(UnsupportedError, match=r"not AdaptiveODE; .* record a run: result.plans"):
        export_onnx(pipe, vivace.sources.AdaptiveODE(pipe.spec.schedule, pipe.spec.prediction), tmp_path / "pack")
    assert not any(tmp_path.iterdir())


def test_scales_by_token_are_refused_with_the_recipe_to_take(tmp_path):
    from vivace.models.quantized.plain import round_layers

    pipe = vivace.load("emoji")
    pipe = vivace.load("emoji", quantized=round_layers(pipe))
    with pytest.raises(UnsupportedError, match="--recipe ptq4dm"):
        export_onnx(pipe, plan_of(pipe, 2), tmp_path / "pack")
    assert not any(tmp_path.iterdir())


def test_rows_in_narrower_floats_run_and_verify_in_the_dtype_of_the_network(pipe, tmp_path):
    plan = vivace.passes.apply_precision(plan_of(pipe, 3), "bf16", first=1)
    found = verify_pack(export_onnx(pipe, plan, tmp_path / "pack"), threads=1)
    assert found.holds and found.tolerance == 1e-4


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    plain = vivace.load("emoji")
    pipe = vivace.load("emoji", quantized=static_weights(plain))
    return export_onnx(pipe, everything(pipe), tmp_path_factory.mktemp("narrow") / "all")


def test_eight_bits_go_with_caches_tokens_and_skipped_guidance(narrow):
    assert narrow.manifest.precision["int8"] == "cpu"
    assert all(graph.structure.precisions for graph in narrow.graphs("row"))
    assert verify_pack(narrow, threads=1).holds


def test_layers_that_run_in_eight_bits_only_are_not_stored_twice(narrow, pack):
    assert (narrow.path / "weights.bin").stat().st_size < 0.75 * (pack.path / "weights.bin").stat().st_size
    size = sum(info.bytes for info in narrow.manifest.files)
    assert size - 5_000_000 <= 1.05 * sum(narrow.manifest.weights.values())


def test_goldens_hold_a_request_and_what_every_row_left(pack):
    request, arrays = pack.goldens()
    assert request["n"] == 2 and request["prompt"]
    latent = (2, *pack.manifest.model["latent_shape"])
    assert arrays["noise"].shape == arrays["latents"].shape == latent
    assert all(arrays[f"row.{i}"].shape == latent for i in range(len(pack.plan.steps)))
    assert np.array_equal(arrays[f"row.{len(pack.plan.steps) - 1}"], arrays["latents"])
    assert any(name.endswith(".tokens") for name in arrays)


def test_the_manifest_tells_what_the_model_is(pack, pipe):
    model = json.loads((pack.path / "manifest.json").read_text())["model"]
    assert (model["fingerprint"], model["blocks"]) == (pipe.spec.fingerprint, pipe.spec.blocks)
    assert "OFL" in model["licence"] or "Open Font License" in model["licence"]
