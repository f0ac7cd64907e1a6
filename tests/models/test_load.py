"""Sources resolve to models; what a plan needs is known without torch."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from vivace.errors import ArgumentError, BackendError, ModelError
from vivace.models.load import WEIGHTS, bundled, load, open_model, prediction_of

SCHEDULER = json.loads((WEIGHTS / "emoji" / "scheduler" / "scheduler_config.json").read_text())


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A model folder around the tiny transformer."""
    root = tmp_path / "mine"
    shutil.copytree(tiny_folder, root / "transformer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, "prediction_type": "epsilon"}))
    return root


def test_the_bundled_model():
    model = load("emoji")
    assert bundled() == ("emoji",)
    assert (model.name, model.prediction, model.shape, model.blocks, model.grid) == (
        "emoji",
        "v",
        (3, 32, 32),
        6,
        (8, 8),
    )
    assert model.pixels
    assert len(model.names) == model.classes == 1000
    assert model.card["guidance_scale"] == 2.0
    assert model.card["solver"] == "unipc"
    assert model.card["steps"] == 20
    assert model.module.dtype == torch.float32
    assert model.spec.tokens() == 64
    assert model.spec.schedule == model.schedule
    assert len(model.fingerprint) == 64
    assert (
        model.fingerprint == open_model(WEIGHTS / "emoji").fingerprint == load("emoji", dtype=torch.float64).fingerprint
    )
    assert model.prompts.find("rocket").name == "rocket"


def test_the_licence_stays_with_the_weights():
    for text in ((WEIGHTS / "emoji" / "README.md").read_text(), load("emoji").card["licence"]):
        assert "(c) Google Inc., SIL Open Font License 1.1 (font), Apache-2.0 (artwork sources)" in text


def test_opening_a_model_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
from vivace.models.load import open_model
from vivace.models import pictures
from vivace.models.prompts import Prompts
model = open_model("emoji")
print(model.spec.fingerprint, model.prompts.find("cat").id)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split()[0] == open_model("emoji").fingerprint


def test_a_folder_and_its_transformer_are_the_same_model(folder):
    model, bare = open_model(folder), open_model(folder / "transformer")
    assert model.name == bare.name == "mine"
    assert model.path == bare.path
    assert model.fingerprint == bare.fingerprint
    assert (model.prediction, model.shape, model.names, model.card, model.pixels) == ("eps", (4, 8, 8), (), {}, False)


def test_a_bare_transformer_needs_a_schedule(tiny_folder):
    with pytest.raises(ModelError, match="scheduler_config.json: no such file"):
        open_model(tiny_folder)
    assert open_model(tiny_folder, scheduler=SCHEDULER).prediction == "v"


def test_labels_of_a_diffusers_index_are_names(folder):
    (folder / "model_index.json").write_text(json.dumps({"id2label": {"0": "tench, Tinca tinca", "3": "tiger shark"}}))
    assert open_model(folder).prompts.find("tench").id == 0
    assert open_model(folder).prompts.find("tiger shark").id == 3


@pytest.mark.parametrize(
    "names",
    ["{}", '[{"id": 0}]', '[{"id": 11, "name": "a"}]', '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "[3]"],
)
def test_bad_names_are_refused(folder, names):
    (folder / "names.json").write_text(names)
    if names == "{}":
        assert open_model(folder).names == ()
        return
    with pytest.raises(ModelError, match="names.json"):
        open_model(folder)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="no such model or folder; need one of emoji"):
        open_model("emojy")
    with pytest.raises(ModelError, match="neither transformer/ nor config.json"):
        open_model(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        open_model(tmp_path / "file")
    (tmp_path / "unet").mkdir()
    with pytest.raises(ModelError, match="UNet"):
        open_model(tmp_path)


def test_predictions_by_name():
    named = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
    assert {name: prediction_of({"prediction_type": name}) for name in named} == named
    assert prediction_of({}) == "eps"
    assert prediction_of({"_class_name": "FlowMatchEulerDiscreteScheduler"}) == "flow"
    with pytest.raises(ModelError, match="prediction_type is 'score'"):
        prediction_of({"prediction_type": "score"})


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="dtype"):
        load("emoji", dtype=torch.int8)
    with pytest.raises(ArgumentError, match="dtype"):
        load("emoji", dtype="float32")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="cuda"):
            load("emoji", device="cuda")
