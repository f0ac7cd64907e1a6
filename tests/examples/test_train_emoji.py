"""The example that makes an emoji checkpoint: training on synthetic renders; rendering where the font is installed."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vivace
from vivace.errors import ArgumentError, ModelError, OutputError
from vivace.metrics import renders as font_renders
from vivace.models.dit import DiT

PATH = Path(__file__).resolve().parents[2] / "examples" / "train_emoji.py"
CLASSES = 4


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_emoji", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def options(example):
    return example.Options(
        size=8, patch=4, width=32, layers=2, heads=2, batch=4, updates=6, classes=CLASSES, rate=2e-3, every=4
    )


@pytest.fixture(scope="module")
def data(example):
    """Discs of four colours in four corners."""
    row, column = np.mgrid[:16, :16]
    renders = np.zeros((CLASSES, 4, 16, 16), dtype=np.uint8)
    for i in range(CLASSES):
        disc = (row - 4 - 7 * (i // 2)) ** 2 + (column - 4 - 7 * (i % 2)) ** 2 < 16
        renders[i, 3], renders[i, i % 3] = 255 * disc, 255 * disc
    names = [{"id": i, "name": f"disc {i}", "codepoint": f"U+{0xE000 + i:04X}"} for i in range(CLASSES)]
    return example.Data(torch.from_numpy(renders), names)


@pytest.fixture(scope="module")
def finished(example, options, data, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "discs"
    example.train(options, data, out)
    return out


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(example, options, data, finished, tmp_path):
    calls = iter(range(100))
    out = tmp_path / "discs"
    partial = example.train(options, data, out, stop=lambda: next(calls) >= 3)
    assert partial.update == 3
    assert not (out / "model").exists()
    assert example.train(options, data, out, resume=True).update == options.updates
    assert same_tensors(out / "state.safetensors", finished / "state.safetensors")
    weights = Path("model", "transformer", "diffusion_pytorch_model.safetensors")
    assert (out / weights).read_bytes() == (finished / weights).read_bytes()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_stopping_before_the_first_update_can_be_resumed(example, options, data, tmp_path):
    short = replace(options, updates=1, every=10)
    example.train(short, data, tmp_path, stop=lambda: True)
    resumed = example.train(short, data, tmp_path, resume=True)
    fresh = example.Training(short, data, torch.device("cpu"))
    fresh.step()
    assert all(torch.equal(value, fresh.average[name]) for name, value in resumed.average.items())


def test_the_folder_is_a_model_that_draws(finished, options):
    pipe = vivace.load(finished / "model")
    assert pipe.spec.latent_shape == (3, 8, 8)
    assert pipe.spec.prediction == "v"
    assert pipe.card["name"] == "discs"
    plan = vivace.make_plan(pipe.spec.schedule, steps=3, prediction="v")
    result = pipe.compile(plan)("disc 2", seed=1)
    assert result.condition.id == 2
    assert result.images[0].size == (8, 8)
    assert (finished / "model" / "README.md").read_text().startswith("# Emoji at 8x8")
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["0000004.png", "0000006.png"]


def test_diffusers_reads_the_folder(finished):
    import diffusers

    theirs = diffusers.DiTTransformer2DModel.from_pretrained(finished / "model" / "transformer").eval()
    ours = DiT.load(finished / "model" / "transformer")
    g = torch.Generator().manual_seed(0)
    x, t, labels = torch.randn(2, 3, 8, 8, generator=g), torch.tensor([10, 900]), torch.tensor([0, CLASSES])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=labels).sample
    assert torch.allclose(ours(x, t, labels[None])[0], expected, atol=1e-5)
    scheduler = diffusers.DDPMScheduler.from_pretrained(finished / "model" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"


def test_the_training_network_is_the_native_one(example, options):
    g, model = torch.Generator().manual_seed(0), DiT(options.config)
    for parameter in model.parameters():
        parameter.normal_(std=0.2, generator=g)
    x, t, labels = torch.randn(3, 3, 8, 8, generator=g), torch.tensor([0, 500, 999]), torch.tensor([0, 3, CLASSES])
    assert torch.allclose(example.predict(model, x, t, labels), model(x, t, labels[None])[0], rtol=1e-5, atol=1e-4)


def test_training_learns_a_batch(example, options, data, monkeypatch):
    monkeypatch.setattr(example, "WARM_UP", 10)
    run = example.Training(replace(options, batch=16, rate=5e-3), data, torch.device("cpu"))
    start, batch = {name: value.clone() for name, value in run.average.items()}, run.draw()
    monkeypatch.setattr(run, "draw", lambda: batch)
    losses = [float(run.step()) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    now = dict(run.model.named_parameters())
    assert all(not torch.equal(value, start[name]) for name, value in run.average.items())
    assert any(not torch.equal(value, now[name]) for name, value in run.average.items())


def test_updates_draw_anew_and_the_same_again(example, options, data):
    run = example.Training(options, data, torch.device("cpu"))
    first, again = run.draw(), run.draw()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    run.update += 1
    assert not torch.equal(first[3], run.draw()[3])
    assert first[0].shape == first[3].shape == (4, 3, 8, 8)
    assert first[0].abs().max() <= 1


def test_another_run_is_not_overwritten_or_mixed(example, options, data, finished, tmp_path):
    with pytest.raises(OutputError, match="--resume"):
        example.train(options, data, finished)
    with pytest.raises(ArgumentError, match=r"--batch 4, now 8"):
        example.train(replace(options, batch=8), data, finished, resume=True)
    other = example.Data(data.renders.flip(0), data.names)
    with pytest.raises(ArgumentError, match="other renders"):
        example.train(options, other, finished, resume=True)
    (tmp_path / "state.safetensors").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="cannot go on"):
        example.train(options, data, tmp_path, resume=True)


@pytest.mark.parametrize(
    "bad", [{"size": 10}, {"patch": 3}, {"heads": 3}, {"batch": 0}, {"classes": -1}, {"rate": float("nan")}]
)
def test_options_are_checked(options, bad):
    with pytest.raises(ArgumentError, match="--"):
        replace(options, **bad)


def test_the_command_line_says_how_to_get_the_font(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example.signal, "signal", lambda *_: None)
    code = example.main(["--out", str(tmp_path / "o"), "--font", str(tmp_path / "no.ttf")])
    assert code == 2
    assert "apt-get install fonts-noto-color-emoji" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_glyphs_of_the_font_become_distinct_classes(example, options):
    """Where the font is installed; elsewhere the search for it must say how to get it."""
    if not any((Path(folder) / font_renders.FONT).is_file() for folder in font_renders.FOLDERS):
        with pytest.raises(ModelError, match="apt-get install"):
            example.Data.from_font(options, None)
        return
    data = example.Data.from_font(replace(options, size=16, classes=12), None)
    assert data.renders.shape == (12, 4, 32, 32)
    assert data.renders[:, 3].float().mean(dim=(1, 2)).min() > 20
    assert (data.renders[:, :3] <= data.renders[:, 3:]).all()
    names = json.loads((Path(vivace.__file__).parent / "models/weights/emoji/names.json").read_text())
    known = {entry["codepoint"] for entry in names}
    assert len({entry["codepoint"] for entry in data.names} & known) >= 9
