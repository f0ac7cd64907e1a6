"""The models of the benches: one folder that vivace and diffusers read alike, never a network of identity blocks."""

import pytest
import torch

import vivace
from vivace.bench import models
from vivace.bench.models import MODELS, BenchModel, flops, sizes
from vivace.kernels.spec import error_of

TINY = sizes(2, 2, 16, size=8, classes=10)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_both_libraries_read_the_folder_and_predict_the_same():
    model = BenchModel("tiny", TINY)
    x, t, labels = model.inputs(2)
    with torch.inference_mode():
        theirs = model.transformer()(x, t, class_labels=labels).sample
        ours = vivace.load(str(model.folder)).model.module(x[:1], t[:1], labels[:, None])
    assert error_of(torch.cat(ours), theirs) < 1e-5
    assert not torch.equal(theirs[0], theirs[1])  # the label reaches the output: adaLN is not zero


def test_the_weights_are_those_of_the_seed_and_written_once():
    model = BenchModel("tiny", TINY)
    torch.manual_seed(0)
    first = model.opened.fingerprint
    assert BenchModel("tiny", TINY).opened.fingerprint == first
    models_before = model.artefact.path.stat().st_mtime_ns
    assert model.folder.is_dir() and model.artefact.path.stat().st_mtime_ns == models_before
    assert BenchModel("tiny", TINY, "bfloat16").opened.fingerprint != first


def test_published_sizes_are_in_the_table():
    base, large = MODELS["DiT-B/2"].sizes, MODELS["DiT-XL/2"].sizes
    assert (base.width, base.layers, base.heads) == (768, 12, 12)
    assert (large.width, large.layers, large.heads) == (1152, 28, 16)
    assert all(m.sizes is None or (m.sizes.grid, m.sizes.out_channels) == ((16, 16), 4) for m in MODELS.values())
    assert flops(base) == pytest.approx(46.0e9, rel=0.01) and flops(large) == pytest.approx(237.2e9, rel=0.01)
    assert flops(base, modulation=False) < flops(base)


def test_inputs_are_a_class_then_the_null_label():
    x, t, labels = BenchModel("tiny", TINY).inputs(2, torch.bfloat16)
    assert x.shape == (2, 4, 8, 8) and x.dtype == torch.bfloat16 and t.dtype == torch.float32
    assert labels.tolist() == [9, 10] and torch.equal(x[0], x[1])
    assert models.MODELS["emoji"].inputs(1)[2].tolist() == [207]
