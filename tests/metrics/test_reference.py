"""Converged references: what they are, how they are kept, what is judged by them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vivace
from vivace.errors import ArgumentError, OutputError, ShapeError
from vivace.metrics import converged, latent_drift, psnr, quality_of, reference_plan, ssim
from vivace.metrics import reference as module

PROMPTS, SEEDS = ["red heart", None], [5, 6]


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(pipe, cache):
    return converged(pipe, PROMPTS, SEEDS, guidance=2.0, evaluations=12, folder=cache)


@pytest.fixture
def no_runs(monkeypatch):
    """Fails when a reference is computed instead of read."""

    def refuse(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr(module, "run", refuse)


def small_plan(pipe, steps, solver="unipc"):
    plan = vivace.make_plan(pipe.spec.schedule, solver, steps, prediction="v")
    return vivace.passes.apply_guidance(plan, 2.0)


def test_samples_are_prompt_major_and_share_the_sessions_noise(pipe, reference):
    assert reference.prompts == ("red heart", "red heart", None, None)
    assert reference.seeds == (5, 6, 5, 6)
    assert reference.latents.shape == (4, 3, 32, 32)
    assert reference.latents.dtype == np.float32
    alone = pipe.compile(reference.plan, backend="eager")("red heart", seed=6).latents.numpy()
    assert np.array_equal(alone[0], reference.latents[1])


def test_the_strong_plan_is_guided_third_order_and_long(pipe):
    plan = reference_plan(pipe.spec, 2.0)
    assert plan.nfe == 200
    assert plan.branch_evals == 400
    assert reference_plan(pipe.spec).branch_evals == 200
    assert plan.hash != reference_plan(pipe.spec, 3.0).hash


def test_quality_of_a_session_is_that_of_its_latents(pipe, reference):
    session = pipe.compile(small_plan(pipe, 3))
    found = quality_of(session, reference)
    latents = np.concatenate(
        [session(p, seed=s).latents.numpy() for p, s in zip(reference.prompts, reference.seeds, strict=True)]
    )
    for name, metric in (("psnr", psnr), ("ssim", ssim), ("drift", latent_drift)):
        assert getattr(found, name) == pytest.approx(metric(latents, reference.latents))
    assert np.array_equal(quality_of(latents, reference).psnr, found.psnr)
    means = found.mean()
    assert means["psnr"] == pytest.approx(found.psnr.mean())
    better = quality_of(session, reference, plan=small_plan(pipe, 6))
    assert better.mean()["psnr"] > means["psnr"] + 2
    assert better.mean()["drift"] < means["drift"]


def test_the_report_is_json_even_for_equal_latents(reference):
    report = json.loads(json.dumps(quality_of(reference.latents, reference).to_dict(), allow_nan=False))
    assert report["mean"] == {"psnr": None, "ssim": 1.0, "drift": 0.0}
    assert report["samples"]["psnr"] == [None] * 4


def test_small_latents_have_no_ssim(reference):
    from dataclasses import replace

    small = replace(reference, latents=reference.latents[..., :4, :4])
    found = quality_of(small.latents + 0.1, small)
    assert found.ssim is None
    assert found.to_dict()["samples"]["ssim"] is None
    assert found.psnr == pytest.approx(np.full(4, 20 * np.log10(2 / 0.1)), rel=1e-5)


def test_what_is_stored_is_read_back(pipe, cache, reference, no_runs):
    again = converged(pipe, PROMPTS, SEEDS, guidance=2.0, evaluations=12, folder=cache)
    assert np.array_equal(again.latents, reference.latents)
    entry = next(path for path in cache.iterdir() if path.is_dir())
    description = json.loads((entry / "reference.json").read_text())
    assert description["fingerprint"] == pipe.spec.fingerprint
    assert description["plan"] == reference.plan.hash
    assert description["prompts"] == list(reference.prompts)
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "change", [{"seeds": [5, 7]}, {"prompts": ["pizza", None]}, {"guidance": 3.0}, {"evaluations": 13}]
)
def test_anything_else_asked_for_is_another_entry(pipe, cache, reference, no_runs, change):
    asked = {"prompts": PROMPTS, "seeds": SEEDS, "guidance": 2.0, "evaluations": 12} | change
    with pytest.raises(AssertionError, match="computed"):
        converged(pipe, folder=cache, **asked)


@pytest.mark.parametrize("damage", ["cut", "lying", "no description", "other description"])
def test_a_damaged_entry_is_computed_anew(pipe, cache, reference, tmp_path, monkeypatch, damage):
    shutil.copytree(cache, tmp_path / "cache")
    entry = next((tmp_path / "cache").iterdir())
    data, description = entry / "latents.safetensors", entry / "reference.json"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-5])
    elif damage == "lying":
        data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\0")
    elif damage == "no description":
        description.unlink()
    else:
        description.write_text(description.read_text().replace("red heart", "pizza"))
    monkeypatch.setattr(module, "run", lambda *_: reference.latents)
    found = converged(pipe, PROMPTS, SEEDS, guidance=2.0, evaluations=12, folder=tmp_path / "cache")
    assert np.array_equal(found.latents, reference.latents)
    monkeypatch.setattr(module, "run", lambda *_: pytest.fail("not stored"))
    converged(pipe, PROMPTS, SEEDS, guidance=2.0, evaluations=12, folder=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from vivace.metrics.reference import _read, _write
place, description = Path(sys.argv[1]), {"format": 1}
while time.time() < float(sys.argv[2]):
    pass
for i in range(40):
    _write(place / str(i), description, np.full((4, 3), 7.0, np.float32))
    assert (_read(place / str(i), description) == 7).all()
"""


def test_processes_that_write_at_once_leave_one_whole_entry(tmp_path):
    import time

    environment = os.environ | {"PYTHONPATH": str(Path(vivace.__file__).parents[1])}
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(time.time() + 2.0)]
    writers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    for writer in writers:
        error = writer.communicate(timeout=60)[1]
        assert writer.returncode == 0, error.decode()[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(40)))


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / "vivace" / "references"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert module.cache_folder() == tmp_path / "home" / ".cache" / "vivace" / "references"


def test_bad_calls_are_refused(pipe, reference, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="at least one"):
        converged(pipe, [])
    with pytest.raises(ShapeError, match="the reference has"):
        quality_of(reference.latents[:2], reference)
    from dataclasses import replace

    session = pipe.compile(small_plan(pipe, 2))
    with pytest.raises(ArgumentError, match="reference is of 000"):
        quality_of(session, replace(reference, fingerprint="0" * 64))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "run", lambda *_: reference.latents)
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        converged(pipe, PROMPTS, SEEDS, evaluations=30, folder=tmp_path / "file")
