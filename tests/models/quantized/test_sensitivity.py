"""Which layers and evaluations stay high: predictions, the greedy choice, advice."""

import math

import pytest
import torch

import vivace
from vivace.models.quantized.calibrate import calibrate_quantization, plan_of, prompts_of, samples_of
from vivace.models.quantized.effects import advise, effects, of_rows
from vivace.models.quantized.quantize import quantize_layers
from vivace.models.quantized.reach import block_linears, denoiser_of, network_of
from vivace.models.quantized.sensitivity import Sensitivity, Trial, keep_high, measure, whole_error

ERRORS = torch.tensor([[0.03, 0.03], [0.04, 0.04], [0.0, 0.12], [0.001, 0.001]])


def sensitivity(whole=None):
    together = ERRORS.square().sum(0).sqrt()
    return Sensitivity("network", ("a", "b", "c", "d"), ERRORS, together if whole is None else whole)


def test_errors_of_layers_add_as_squares():
    assert sensitivity().predicted(["a", "b"]) == pytest.approx(0.05)
    assert sensitivity().predicted(["c"]) == pytest.approx(0.12 / math.sqrt(2))
    doubled = sensitivity(2 * ERRORS.square().sum(0).sqrt())
    assert doubled.predicted(["a", "b"]) == pytest.approx(0.10)  # what was measured together counts


def test_the_most_sensitive_layers_stay_high_until_the_budget_is_kept():
    assert keep_high(sensitivity(), None) == {}
    assert keep_high(sensitivity(), 1.0) == {}
    assert list(keep_high(sensitivity(), 0.06)) == ["c"]
    kept = keep_high(sensitivity(), 0.035)
    assert list(kept) == ["c", "b"] and "alone it moves the prediction by 4.00%" in kept["b"]
    assert list(keep_high(sensitivity(), 0.0)) == ["c", "b", "a", "d"]


def test_advice_is_the_run_of_bad_evaluations_at_either_end():
    effect = [5.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.5, 2.5, 6.0]
    assert advise(effect, 2.0) == {"first": 2, "last": 3, "high": "bf16"}
    assert advise(effect, 4.0) == {"first": 1, "last": 1, "high": "bf16"}
    assert advise(effect, None) == {"first": 0, "last": 0, "high": "bf16"}
    assert advise([1.0, 1.0, 9.0, 1.0, 1.0], 2.0) == {"first": 0, "last": 0, "high": "bf16"}  # bad in the middle only
    assert advise([9.0] * 3 + [1.0] * 5, 2.0)["first"] == 2  # a quarter at most


def test_effects_of_rows_add_as_squares():
    rows = of_rows([0.3, 0.4], (100.0,), [900.0, 500.0, 300.0, 200.0, 50.0])
    assert rows == [0.2] * 4 + [0.3]


def test_advice_fits_the_pass_that_takes_it():
    pipe = vivace.load("emoji")
    plan = pipe.choose_plan(None, None, 12, None)
    assert vivace.passes.apply_precision(plan, "int8", **advise([1.0] * 11 + [9.0], 4.0)).nfe == 12


@pytest.fixture(scope="module")
def measured():
    pipe = vivace.load("emoji")
    table = calibrate_quantization(pipe, pipe.choose_plan(None, None, 4, None), samples=4, groups=2, rows=64)
    weights = quantize_layers(pipe, table, sensitivity="local")
    denoiser = denoiser_of(pipe)
    names = [f"blocks.{i}.{part}" for i in (0, 5) for part in ("qkv", "down")]
    layers = {name: weights.layers[name] for name in names}
    trial = Trial(layers, block_linears(network_of(denoiser)), "int8")
    conditions = [denoiser.encode(prompt) for prompt in prompts_of(table)]
    return denoiser, trial, samples_of(table), conditions, table.metadata["edges"], table


def test_measured_sensitivities_of_a_network(measured):
    local = torch.full((4, 2), 0.01)
    found = measure(*measured[:5], local)
    assert found.how == "network" and found.errors.shape == (4, 2) and bool((found.errors > 0).all())
    assert torch.equal(found.whole, whole_error(*measured[:5]))
    together = found.errors.square().sum(0).sqrt()
    assert bool((0.5 * together < found.whole).all()) and bool((found.whole < 2 * together).all())  # nearly independent


def test_the_local_form_shares_out_the_measured_whole(measured):
    local = torch.tensor([[0.03, 0.01], [0.04, 0.01], [0.0, 0.01], [0.0, 0.01]])
    found = measure(*measured[:5], local, how="local")
    torch.testing.assert_close(found.errors.square().sum(0).sqrt(), found.whole)
    torch.testing.assert_close(found.errors[0] / found.errors[1], local[0] / local[1])


def test_effects_are_those_of_runs_with_one_group_in_8_bits(measured):
    denoiser, trial, _, _, edges, table = measured
    plan, prompts = plan_of(table), prompts_of(table)
    found = effects(denoiser, trial, plan, prompts, edges)
    assert found.shape == (2,) and bool((found > 0).all())
    assert torch.equal(effects(denoiser, trial, plan, prompts, edges), found)
    nothing = Trial({}, trial.linears, "int8")
    assert effects(denoiser, nothing, plan, prompts, edges).tolist() == [0.0, 0.0]
