"""Tables for caches, measured on the bundled model and on a tiny foreign one."""

import json

import numpy as np
import pytest
import torch
from tests.models.pipelines import tiny

import vivace
from vivace.cli import run
from vivace.engine import planners
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.passes import apply_block_cache
from vivace.engine.plan import Variant
from vivace.errors import ArgumentError, ModelError
from vivace.models.caching.calibrate import calibrate_cache
from vivace.models.caching.tape import places_of, pull_back, record, slope
from vivace.models.quantized.reach import denoiser_of

STEPS = 4
FEW = {"pictures": 2, "probes": 2}
GUIDED = Variant(branches=("cond", "uncond"))


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


@pytest.fixture(scope="module")
def plan(pipe):
    return pipe.choose_plan(None, None, STEPS, None)


@pytest.fixture(scope="module")
def table(pipe, plan):
    return calibrate_cache(pipe, plan, **FEW)


@pytest.fixture(scope="module")
def tapes(pipe):
    denoiser = denoiser_of(pipe)
    conditions = [denoiser.encode(i) for i in range(2)]
    x = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return [
        record(denoiser, x + shift, [500.0] * 2, conditions, GUIDED, [g for g in places_of(denoiser) if g])
        for shift in (0.0, 0.02)
    ]


def test_recording_changes_no_bit(pipe, tapes):
    denoiser, tape = denoiser_of(pipe), tapes[0]
    outs = denoiser.evaluate(tape.x, tape.timesteps, tape.conditions, GUIDED)
    assert all(torch.equal(a, b) for a, b in zip(tape.outs, outs, strict=True))


def test_own_values_are_no_change_and_those_of_another_row_leave_the_tape_as_it_was(pipe, tapes):
    denoiser = denoiser_of(pipe)
    for group in places_of(denoiser):
        before = tapes[0].values(group, group[0], "cond").clone()
        moved = slope(denoiser, tapes[0], tapes[1], group, 1.0)
        assert slope(denoiser, tapes[0], tapes[0], group, 1.0).abs().max() < 1e-3 * moved.abs().max()
        assert torch.equal(tapes[0].values(group, group[0], "cond"), before)


def test_gradients_are_those_of_differences(pipe, tapes):
    denoiser, tape, chance = denoiser_of(pipe), tapes[0], torch.Generator().manual_seed(1)
    against = [torch.randn((1, *tape.x.shape), generator=chance) for _ in GUIDED.branches]
    move = 1e-3 * torch.randn(tape.x.shape, generator=chance)
    ends = [denoiser.evaluate(tape.x + s * move, tape.timesteps, tape.conditions, GUIDED) for s in (1, -1)]
    told = sum(float((a[0] * (up - down)).sum()) / 2 for a, up, down in zip(against, *ends, strict=True))
    assert float((pull_back(denoiser, tape, against)[0] * move).sum()) == pytest.approx(told, rel=1e-2)


def test_a_table_has_what_planners_read(pipe, plan, table):
    assert table.kind == "cache" and table.fingerprint == pipe.spec.fingerprint
    assert table.metadata["evaluations"] == STEPS and table.metadata["plan_hash"] == plan.hash
    assert table.metadata["sites"] == ["attn", "mlp", "residual"]
    curve = table.arrays["error/attn"]
    assert curve.shape == (STEPS, STEPS - 1)
    assert np.array_equal(np.isnan(curve), [[i + k >= STEPS for k in range(1, STEPS)] for i in range(STEPS)])
    assert (table.arrays["magnitude_ratio"] > 0).all() and table.arrays["magnitude_ratio"][0] == 1.0
    assert table.arrays["teacache/coefficients"].shape == (5,)
    effect = table.arrays["effect/attn+mlp"]
    assert effect.shape == (STEPS, STEPS - 1, FEW["probes"], FEW["pictures"])
    assert np.array_equal(np.isnan(effect[:, :, 0, 0]), [[age > r for age in range(1, STEPS)] for r in range(STEPS)])
    for planner in (planners.SmoothCache(table), planners.MagCache(table), planners.OptimalCache(table, 0.6)):
        assert apply_block_cache(plan, planner).nfe == STEPS
    with pytest.raises(ArgumentError, match="evaluations"):
        planners.OptimalCache(table, 0.6).schedule(pipe.choose_plan(None, None, STEPS + 1, None))


def test_the_same_seed_gives_the_same_table_and_it_survives_a_file(pipe, plan, table, tmp_path):
    assert calibrate_cache(pipe, plan, **FEW).hash == table.hash
    table.save(tmp_path / "table.safetensors")
    assert CalibrationTable.load(tmp_path / "table.safetensors").hash == table.hash


def test_effects_foretell_what_a_cached_row_does(pipe, plan, table):
    """The last row given the values of the row before: its effect is the difference of final latents."""
    orders = [None] * (STEPS - 1) + [0]
    tracks = [{"site": site, "blocks": [0, 0], "orders": orders} for site in ("attn", "mlp")]
    cached = apply_block_cache(plan, planners.Scheduled(tracks))
    prompts = [int(c) for c in table.metadata["prompts"]]
    session = pipe.compile([plan, cached], backend="eager")
    errors = []
    for picture, prompt in enumerate(prompts):
        ends = [session(prompt, plan=each, seed=0, index=picture).latents for each in (plan, cached)]
        errors.append(float((ends[1] - ends[0]).square().sum()))
    foretold = float((table.arrays["effect/attn+mlp"][STEPS - 1, 0] ** 2).mean())
    assert 0.25 < foretold / np.mean(errors) < 4.0  # two signs a picture: a rough estimate of a squared norm


def test_foreign_networks_are_measured_too(pipe):
    made = vivace.load(tiny.make("dit"))
    plan = made.choose_plan(None, None, 3, 2.0)
    found = calibrate_cache(made, plan, pictures=2, probes=1, prompts=[1, 2])
    assert "error/residual" in found.arrays
    effects = [name for name in found.arrays if name.startswith("effect/")]
    assert effects and all(np.isfinite(found.arrays[name][1:, 0]).all() for name in effects)
    apply_block_cache(plan, planners.OptimalCache(found, 0.7))
    with pytest.raises(ModelError):
        planners.OptimalCache(found, 0.7).schedule(pipe.choose_plan(None, None, 3, 2.0).bind(pipe.spec))


def test_what_cannot_be_measured_is_refused(pipe, plan):
    with pytest.raises(ArgumentError, match="caches already"):
        calibrate_cache(pipe, apply_block_cache(plan, planners.Fora(2)))
    with pytest.raises(ArgumentError, match="pictures"):
        calibrate_cache(pipe, plan, pictures=0)
    with pytest.raises(ArgumentError, match="empty"):
        calibrate_cache(pipe, plan, prompts=[])


def test_the_command_writes_a_table(tmp_path, capsys):
    out = tmp_path / "caches.safetensors"
    run(["calibrate", "emoji", "--cache", "--out", str(out), "--steps", "3", "--samples", "1", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "cache" and CalibrationTable.load(out).hash == told["hash"]
