"""`vivace plan new --cache` and what `plan show` says of a plan with caches."""

import numpy as np
import pytest
from tests.cli.test_cli import call, json_of

from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.plan import Plan


def new(capsys, tmp_path, *caches, bind=True):
    path = tmp_path / "plan.json"
    options = [part for cache in caches for part in ("--cache", cache)]
    found = call(capsys, "plan", "new", "--steps", 8, *options, "--out", path, *(["--bind"] if bind else []))
    return path, found


def test_a_cache_is_written_into_the_plan_and_shown(capsys, tmp_path):
    path, (code, text, err) = new(capsys, tmp_path, "fora:interval=2,store=bf16,sites=attn+mlp")
    assert code == 0, err
    assert "block_cache Fora" in text and "RRRRRR" in text and "attn=C/bf16" in text
    plan = Plan.load(path)
    assert plan.recipe.passes[-1][1].to_dict()["sites"] == ["attn", "mlp"]
    shown = call(capsys, "plan", "show", path)[1].splitlines()[-1]
    assert shown == text.splitlines()[-1] and shown.startswith("caches  ") and "62.5% of the work computed" in shown
    data = json_of(capsys, "plan", "show", path)["plan"]
    assert data["computed_share"] == 0.625 and "cache_bytes" in data


def test_an_unbound_plan_says_how_to_know_its_bytes(capsys, tmp_path):
    path, (code, text, _) = new(capsys, tmp_path, "fora", bind=False)
    assert code == 0 and text.splitlines()[-1] == "caches  bind the plan (--bind) to know their bytes"
    assert "cache_bytes" not in json_of(capsys, "plan", "show", path)["plan"]


def test_a_plan_without_caches_has_no_such_line(capsys, tmp_path):
    _, (code, text, _) = new(capsys, tmp_path)
    assert code == 0 and "caches" not in text


def test_caches_add_up_and_guards_come_by_name(capsys, tmp_path):
    both = new(
        capsys, tmp_path, "taylor_seer:interval=2,order=1,sites=attn", 'fora:interval=3,sites=["mlp"],blocks=[1,5]'
    )
    assert both[1][0] == 0 and "block_cache TaylorSeer + block_cache Fora" in both[1][1]
    path, (code, text, _) = new(capsys, tmp_path, "FirstBlockCache:threshold=0.1,most=2")
    assert code == 0 and "guard first_block below .1" in text and "if no guard fires" in text.splitlines()[-1]
    assert Plan.load(path).steps[2].guard.params == (1.0, 2.0)


def test_tables_are_read_from_files_and_checked(capsys, tmp_path):
    path, _ = new(capsys, tmp_path)
    plan = Plan.load(path)
    metadata = {"evaluations": 8, "timesteps": [step.timestep for step in plan.steps], "latent_shape": [3, 32, 32]}
    ratios = {"magnitude_ratio": np.full(8, 0.99)}
    CalibrationTable("cache", plan.binding.fingerprint, ratios, metadata).save(tmp_path / "good.safetensors")
    CalibrationTable("cache", "0" * 64, ratios, metadata).save(tmp_path / "other.safetensors")
    code, text, err = new(capsys, tmp_path, f"magcache:table={tmp_path}/good.safetensors,threshold=0.3")[1]
    assert code == 0, err
    assert "0:6.residual=R" in text
    code, _, err = new(capsys, tmp_path, f"magcache:table={tmp_path}/other.safetensors")[1]
    assert code == 2 and "measured on model 000000000000" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("nope", "--cache 'nope'; use one of Fora"),
        ("fora:2", "write key=value"),
        ("fora:interval=2,interval=3", "each key once"),
        ("fora:speed=2", "it takes interval"),
        ("magcache", "needs table"),
        ("smoothcache:table=/nowhere.safetensors", "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, cache, message):
    path, (code, _, err) = new(capsys, tmp_path, cache)
    assert code == 2 and message in err and err.count("\n") == 1 and not path.exists()
