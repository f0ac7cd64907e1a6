"""Planners that follow a calibration table: the right model, run and arrays, and no other."""

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.test_planners import SPEC, euler, table_of
from vivace.engine import planners
from vivace.engine.passes import apply_block_cache
from vivace.engine.plan import Args
from vivace.errors import ArgumentError, ModelError

CURVES = {"error/attn": np.full((12, 3), 0.1), "error/mlp": np.full((12, 3), 0.1), "magnitude_ratio": np.full(12, 0.99)}


@pytest.mark.parametrize("planner", [planners.SmoothCache, planners.MagCache])
def test_a_table_gives_what_its_numbers_give(planner):
    plan = euler().bind(SPEC)
    from_table = apply_block_cache(plan, planner(table_of(plan, CURVES)))
    plain = {"attn": CURVES["error/attn"], "mlp": CURVES["error/mlp"]}
    by_hand = apply_block_cache(plan, planner(plain if planner is planners.SmoothCache else CURVES["magnitude_ratio"]))
    assert from_table.steps == by_hand.steps != plan.steps


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "quantization"}, ModelError, "is for quantization, not for cache"),
        ({"fingerprint": "1" * 64}, ModelError, "measured on model 111111111111"),
        ({"latent_shape": [2, 8, 8]}, ModelError, r"measured at latent shape \[2, 8, 8\]"),
        ({"evaluations": 11}, ArgumentError, "measured over 11 evaluations, the plan has 12"),
        ({"timesteps": [1.0] * 12}, ArgumentError, "measured at other timesteps"),
        ({"timesteps": [0.5]}, ArgumentError, "measured at other timesteps"),
    ],
)
def test_a_table_of_another_model_or_run_is_refused(change, error, message):
    plan = euler().bind(SPEC)
    with pytest.raises(error, match=message):
        apply_block_cache(plan, planners.MagCache(table_of(plan, CURVES, **change)))


def test_a_plan_from_a_table_binds_to_that_model_only(tmp_path):
    plan = apply_block_cache(euler(), planners.SmoothCache(table_of(euler(), CURVES)))
    plan.save(tmp_path / "plan.json")
    for made in (plan, type(plan).load(tmp_path / "plan.json"), plan.tail(0.5)):
        assert made.bind(SPEC).binding is not None
        with pytest.raises(
            ModelError, match="apply_block_cache: measured on model 000000000000, this one is 222222222222"
        ):
            made.bind(replace(SPEC, fingerprint="2" * 64))
        with pytest.raises(ModelError, match="this run has"):
            made.bind(SPEC, (2, 8, 8))


@pytest.mark.parametrize("measured", [{}, {"fingerprint": 3}, {"fingerprint": "0" * 64, "latent_shape": 7}])
def test_a_damaged_origin_fits_no_model(measured):
    plan = apply_block_cache(euler(), planners.Fora(2))
    passes = (("apply_block_cache", Args.of({"planner": "Fora", "measured": measured})),)
    with pytest.raises(ModelError, match="apply_block_cache: measured"):
        replace(plan, recipe=replace(plan.recipe, passes=passes)).bind(SPEC)


def test_a_table_without_the_array_says_so():
    plan = euler()
    with pytest.raises(ModelError, match="no array 'magnitude_ratio' .it has error/attn"):
        apply_block_cache(plan, planners.MagCache(table_of(plan, {"error/attn": CURVES["error/attn"]})))
