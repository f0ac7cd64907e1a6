"""What 8 bits add to the sites of caches: measured on the bundled model with quantized weights, and what plans do."""

import json

import numpy as np
import pytest
import torch

import vivace
from vivace.cli import run
from vivace.engine import planners
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.passes import apply_block_cache, apply_precision
from vivace.engine.precision import precisions_of
from vivace.models.caching.calibrate import calibrate_cache
from vivace.models.quantized.plain import round_layers
from vivace.models.quantized.stand_in import stand_in

STEPS = 6
SITES = ("attn", "mlp", "residual")


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji", quantized=round_layers(vivace.load("emoji")))


@pytest.fixture(scope="module")
def plan(pipe):
    return pipe.choose_plan(None, None, STEPS, None)


@pytest.fixture(scope="module")
def table(pipe, plan):
    return calibrate_cache(pipe, plan, pictures=1, seed=3, effects=False)


def trunk_of(network, x, timesteps, labels):
    """What the blocks add to the hidden states [rows, tokens, width]."""
    modulation = network.condition(timesteps, labels)
    start = network.embed(x).repeat(len(labels), 1, 1)
    hidden = start
    for i in range(len(network.blocks)):
        hidden = network.block(i, hidden, modulation)
    return (hidden.float() - start.float()).flatten(1)


@torch.no_grad()
def test_it_is_the_difference_of_an_evaluation_in_8_bits_and_in_float32_of_one_latent(pipe, plan, table):
    found = table.arrays["noise_variance/residual"]
    session = vivace.load("emoji").compile(plan, backend="eager")
    state = session.begin(vivace.Request(table.metadata["prompts"][0], seed=3))
    low = apply_precision(plan, "int8").bind(pipe.spec).steps
    eight = stand_in(pipe.model.module, precisions_of(low[0].variant, pipe.spec.blocks), pipe.quantized)
    for row in (0, 1):
        x, step = state.pool.net[list(state.lanes)].clone(), state.plan.steps[row]
        labels = torch.tensor([[session.denoiser.encode(table.metadata["prompts"][0]).id], [pipe.model.classes]])
        given = x, torch.tensor([step.timestep], dtype=torch.float64), labels
        exact, rounded = trunk_of(pipe.model.module, *given), trunk_of(eight, *given)
        wanted = ((rounded - exact).square().sum(1) / exact.square().sum(1)).mean()
        assert found[row] == pytest.approx(float(wanted), rel=1e-3)
        session.step([state])
    session.abort(state)


def test_the_table_has_it_of_every_site_and_evaluation_and_says_of_which_weights(pipe, plan, table):
    for site in SITES:
        noise = table.arrays[f"noise_variance/{site}"]
        assert noise.shape == (STEPS,) and (noise > 0.0).all() and (noise < 0.1).all()
    assert table.metadata["quantized"] == {"format": "int8", "digest": pipe.quantized.digest}
    plain = calibrate_cache(vivace.load("emoji"), plan, pictures=1, seed=3, effects=False)
    assert plain.metadata["quantized"] is None and not any("noise" in name for name in plain.arrays)
    for name, array in plain.arrays.items():  # the runs are of the model's own precision
        assert np.array_equal(array, table.arrays[name], equal_nan=True)


def test_rows_that_the_plan_keeps_high_are_not_measured(pipe, plan):
    some = calibrate_cache(pipe, apply_precision(plan, "int8", first=2), pictures=1, effects=False)
    assert np.array_equal(np.isnan(some.arrays["noise_variance/mlp"]), [True] * 2 + [False] * (STEPS - 2))


def test_changes_are_errors_of_forecasts(table):
    """Of order o, from values that lie N = k + 1 apart, at k: what "forecast" holds follows from "change"."""
    change, forecast = table.arrays["change/attn"], table.arrays["forecast/attn"]
    assert change.shape == (STEPS, STEPS - 1, STEPS - 1)
    for i in range(1, STEPS):
        for age in range(1, i + 1):
            assert change[i, age - 1, age - 1] == pytest.approx(forecast[i - age, 0, age - 1], rel=1e-4)
    weights = np.array([1.5, -0.5])  # evaluation 5 from 4 and 2
    told = weights @ change[5][np.ix_([0, 2], [0, 2])] @ weights
    assert told == pytest.approx(forecast[4, 1, 0], rel=1e-3)


def test_an_int8_plan_with_the_table_plans_otherwise_and_loses_less(pipe, plan, table):
    """Newton's weights of order 2, four ahead of values that lie close, multiply noise and roughness by hundreds."""
    low = apply_precision(plan, "int8")
    planner = planners.TaylorSeer(4, 2, first=3, last=0, form="newton")
    told, measured = (apply_block_cache(low, planner, errors=errors) for errors in (False, table))
    assert measured.steps != told.steps
    session = pipe.compile([low, told, measured], backend="eager")
    exact, *cached = (
        session(table.metadata["prompts"][0], plan=each, seed=11).latents for each in (low, told, measured)
    )
    lost = [float((latents - exact).square().mean()) for latents in cached]
    assert lost[1] < lost[0]


def test_the_command_measures_it(pipe, tmp_path, capsys):
    pipe.quantized.save(tmp_path / "weights")
    out = tmp_path / "caches.safetensors"
    asked = ["calibrate", "emoji", "--cache", "--out", str(out), "--steps", "3", "--samples", "1"]
    run([*asked, "--quantized", str(tmp_path / "weights"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["quantized"] == {"format": "int8", "digest": pipe.quantized.digest}
    assert "noise_variance/attn" in CalibrationTable.load(out).arrays
    asked = ["calibrate", "emoji", "--quantization", "--out", str(out), "--quantized", str(tmp_path / "weights")]
    assert run(asked) != 0
    assert "--quantized says nothing with --quantization" in capsys.readouterr().err
