"""The schedule of least measured effect, against every schedule there is."""

import itertools
import math

import numpy as np
import pytest

from tests.engine.test_planners import SPEC, computed, euler, table_of
from vivace.engine.bind import ModelSpec
from vivace.engine.forecast import node_weights
from vivace.engine.passes import apply_block_cache
from vivace.engine.planners.optimal import DOUBT, OptimalCache
from vivace.errors import ArgumentError, ModelError

SIGNS, PICTURES = 8, 2


def effects_of(count, seed=0):
    """Effects of values on a smooth path in many directions: those of old values are larger, neighbours' are alike."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(np.cumsum(rng.normal(size=(count, SIGNS, PICTURES)), 0), 0)
    found = np.full((count, count - 1, SIGNS, PICTURES), np.nan)
    for r in range(count):
        for age in range(1, r + 1):
            found[r, age - 1] = (path[r - age] - path[r]) * rng.uniform(0.5, 1.5)
    return found


def table(plan, effects, name="effect/attn+mlp", **changes):
    return table_of(plan, {name: effects.astype(np.float32)}, **{"outside": 0.0, **changes})


def score_of(orders, effects):
    """The score of the module's head, written out."""
    whole, apart, done = 0.0, 0.0, []
    for r, order in enumerate(orders):
        if order is None:
            done.insert(0, r)
            continue
        nodes = done[: order + 1]
        weights = node_weights(nodes, r) if order else (1.0,)
        change = sum(w * effects[r, r - j - 1] for w, j in zip(weights, nodes, strict=True))
        whole, apart = whole + change, apart + (change**2).mean(0)
    return float(np.log((np.square(whole)).mean(0) + DOUBT * apart).mean())


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_of_all_schedules(seed):
    count, most = 7, 4
    plan, effects = euler(count), effects_of(count, seed).astype(np.float32)
    best = math.inf
    for others in itertools.combinations(range(1, count), most - 1):
        orders = [None if r == 0 or r in others else 0 for r in range(count)]
        spans = [
            [None] if order is None else range(min(2, orders[:r].count(None) - 1) + 1) for r, order in enumerate(orders)
        ]
        best = min(best, *(score_of(each, effects) for each in itertools.product(*spans)))
    found = OptimalCache(table(plan, effects), most / count).schedule(plan).tracks
    assert [track.site for track in found] == ["attn", "mlp"] and found[0].orders == found[1].orders
    assert found[0].orders.count(None) <= most
    assert score_of(found[0].orders, effects) == pytest.approx(best, rel=1e-4)


def test_evaluations_that_matter_are_computed():
    plan, effects = euler(10), np.ones((10, 9, SIGNS, PICTURES))
    effects[[4, 7]] *= 1e6
    letters = computed(apply_block_cache(plan, OptimalCache(table(plan, effects), 0.3, order=0)))
    assert letters == "crrrcrrcrr"


def test_the_budget_counts_what_is_outside_of_blocks():
    plan, effects = euler(10), effects_of(10)
    for outside, most in ((0.0, 5), (0.25, 3)):
        orders = OptimalCache(table(plan, effects, outside=outside), 0.5).schedule(plan).tracks[0].orders
        assert orders.count(None) <= most
    with pytest.raises(ArgumentError, match="less than what must be computed"):
        OptimalCache(table(plan, effects, outside=0.5), 0.5).schedule(plan)


def test_a_whole_budget_caches_nothing():
    plan = euler(6)
    made = apply_block_cache(plan, OptimalCache(table(plan, effects_of(6)), 1.0))
    assert made.steps == plan.steps


def test_the_recipe_repeats_the_schedule_without_the_table():
    plan = euler(8)
    made = apply_block_cache(plan, OptimalCache(table(plan, effects_of(8)), 0.5))
    (name, args), *_ = made.recipe.passes
    assert name == "apply_block_cache" and args.to_dict()["planner"] == "Scheduled"
    assert "table" not in args.to_dict() and args.to_dict()["measured"]["fingerprint"] == SPEC.fingerprint
    assert made.tail(0.5).nfe == 4


def test_old_values_that_were_not_measured_are_not_used():
    plan, effects = euler(12), effects_of(12)[:, :3]
    orders = OptimalCache(table(plan, effects), 0.5).schedule(plan).tracks[0].orders
    last = 0
    for r, order in enumerate(orders):
        last = r if order is None else last
        assert r - last <= 3
    with pytest.raises(ArgumentError, match="larger budget"):
        OptimalCache(table(plan, effects), 0.1).schedule(plan)


def test_the_trunk_is_used_where_blocks_offer_nothing_inside():
    plan = euler(6)
    (track,) = OptimalCache(table(plan, effects_of(6), "effect/residual"), 0.5).schedule(plan).tracks
    assert track.site == "residual" and track.blocks == (0, 0)


def test_tables_of_something_else_are_refused():
    plan = euler(6)
    with pytest.raises(ModelError, match="quantization"):
        OptimalCache(table(plan, effects_of(6), kind="quantization")).schedule(plan)
    with pytest.raises(ArgumentError, match="6 evaluations, the plan has 7"):
        OptimalCache(table(plan, effects_of(6))).schedule(euler(7))
    with pytest.raises(ModelError, match="no effects"):
        OptimalCache(table_of(plan, {})).schedule(plan)
    with pytest.raises(ModelError, match="shape"):
        OptimalCache(table(plan, effects_of(6)[:4])).schedule(plan)
    with pytest.raises(ArgumentError, match="calibration table"):
        OptimalCache([1, 2, 3]).schedule(plan)
    other = ModelSpec("other", "1" * 64, "flow", (2, 4, 4), 6, (1, 1), width=8)
    with pytest.raises(ModelError):
        apply_block_cache(plan.bind(other), OptimalCache(table(plan, effects_of(6))))
