"""Text encoders, tokenizers and decoders of pipelines in a pack: from a prompt to a picture without the pipeline."""

import numpy as np
import pytest

import vivace
from tests.export.families import load
from tests.models.pipelines.texts import stable_diffusion
from vivace import passes
from vivace.export.packing import export_onnx
from vivace.export.text import encode_graph, prompts_of
from vivace.export.weights import WeightStore
from vivace.runtime import verify_pack


@pytest.fixture(scope="module")
def pipe():
    made = stable_diffusion()
    made.set_progress_bar_config(disable=True)
    return vivace.load(made)


@pytest.fixture(scope="module")
def pack(pipe, tmp_path_factory):
    plan = passes.apply_guidance(pipe.plan(2), 3.0)
    return export_onnx(pipe, plan, tmp_path_factory.mktemp("text") / "pack")


def test_a_pack_with_texts_holds_its_goldens(pack):
    report = verify_pack(pack)
    assert report.holds and report.levels <= 1


@pytest.mark.parametrize("prompt", ["A blue  cat, on a BOAT", "", "boat " * 90])
def test_a_prompt_gives_the_picture_of_the_pipeline(pipe, pack, prompt):
    wanted = pipe.compile(pack.plan)(prompt, seed=5)
    found = pack.session()(prompt, seed=5)
    exact = wanted.latents.numpy()
    assert np.abs(found.latents - exact).max() <= 1e-5 * np.abs(exact).max()
    difference = np.array(found.images[0]).astype(int) - np.array(wanted.images[0]).astype(int)
    assert np.abs(difference).max() <= 1


def test_the_manifest_tells_tokenizers_and_ports(pack):
    roles = {graph.role: graph for graph in pack.manifest.graphs}
    assert [port.source for port in roles["encode"].inputs] == ["text"]
    assert [port.key for port in roles["encode"].outputs] == ["encoder_hidden_states"]
    assert roles["decode"].inputs[0].shape == ("rows", 4, "height", "width")
    assert pack.manifest.prompts["tokenizers"]["tokenizer"]["file"] == "tokenizer.json"


def test_decoders_take_latents_of_any_size(pack):
    import onnxruntime

    (decode,) = [graph for graph in pack.manifest.graphs if graph.role == "decode"]
    session = onnxruntime.InferenceSession(str(pack.path / decode.file))
    (picture,) = session.run(None, {"latents": np.zeros((3, 4, 6, 10), np.float32)})
    assert picture.dtype == np.uint8 and picture.shape == (3, 6, 10, 3)


def test_the_same_graph_has_the_same_bytes(pipe):
    denoiser = pipe._denoiser(dict(pipe.networks))
    found = []
    for _ in range(2):
        with WeightStore() as store:
            graph = encode_graph(denoiser, 21, store)
            found.append(graph.model.SerializeToString(deterministic=True))
    assert found[0] == found[1]


def test_a_pipeline_without_text_encoders_takes_tensors():
    pipe = load("pixart")
    prompts, files = prompts_of(pipe._denoiser(dict(pipe.networks)))
    assert prompts["kind"] == "tensors" and "no text encoder" in prompts["why"] and not files
