"""Cache rules lowered: cells, planes, what is kept no longer than it is read, bytes, shares."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vivace
from tests.engine.blocky import BLOCKS, TOKENS, WIDTH, Blocky
from tests.engine.plans import edit
from vivace.engine.caching import cache_bytes, caches, computed_share, plane_weights
from vivace.engine.plan import Action, Rule, Variant
from vivace.errors import PlanError

KEEP, REUSE, FORECAST = Action.COMPUTE, Action.REUSE, Action.FORECAST


def plan_of(*rows, forecasts=None, branches=("cond",)):
    """A bound plan whose rows have these rules."""
    schedule = vivace.NoiseSchedule.vp(np.linspace(1e-4, 2e-2, 1000))
    plan = vivace.make_plan(schedule, "ddim", steps=len(rows), prediction="eps")
    if len(branches) > 1:
        plan = vivace.passes.apply_guidance(plan, 3.0)
    for i, rules in enumerate(rows):
        weights = (forecasts or {}).get(i, ())
        plan = edit(plan, i, variant=Variant(branches=branches, rules=tuple(rules)), forecast=weights)
    return vivace.verify(plan).bind(Blocky().spec)


def uses(plan, row):
    return [item.use for item in caches(plan).rows[row].uses]


def test_a_plan_without_cache_rules_keeps_nothing():
    assert not caches(plan_of((), ())).planes
    assert computed_share(plan_of((), ())) == 1.0
    assert cache_bytes(plan_of((), ())) == 0


def test_what_no_later_row_reads_is_not_kept():
    keep = Rule((1, 2), "attn", action=KEEP)
    plan = plan_of((keep,), (Rule((1, 2), "attn", action=REUSE),), (keep,))
    assert [use.action for use in uses(plan, 0)] == [KEEP]
    assert [use.action for use in uses(plan, 1)] == [REUSE]
    assert uses(plan, 2) == []


def test_a_value_that_is_replaced_before_it_is_read_is_not_kept():
    keep, read = Rule((0, 1), "mlp", action=KEEP), Rule((0, 1), "mlp", action=REUSE)
    plan = plan_of((keep,), (keep,), (read,))
    assert [len(uses(plan, row)) for row in range(3)] == [0, 1, 1]


def test_differences_are_made_as_far_as_values_are_known_and_read():
    keep = Rule((0, 1), "mlp", action=KEEP, order=2)
    read = Rule((0, 1), "mlp", action=FORECAST, order=1)
    plan = plan_of((keep,), (keep,), (keep,), (read,), forecasts={3: (2.0, -1.0)})
    assert [[use.made for use in uses(plan, row)] for row in range(3)] == [[], [0], [1]]
    assert caches(plan).rows[3].uses[0].weights == (1.0, 1.0)  # 2 f0 - f1 = f0 + (f0 - f1)
    assert set(caches(plan).planes.values()) == {2}


def test_ranges_are_cut_where_any_row_cuts_them():
    keep = Rule((0, 4), "residual", action=KEEP)
    plan = plan_of((keep,), (Rule((1, 3), "residual", action=REUSE),), (Rule((0, 3), "residual", action=REUSE),))
    assert [use.blocks for use in uses(plan, 0)] == [(0, 1), (1, 3)]
    assert [use.blocks for use in uses(plan, 1)] == [(1, 3)]
    assert [use.blocks for use in uses(plan, 2)] == [(0, 1), (1, 3)]


def test_of_adjoining_reused_outputs_only_the_last_is_read():
    keep = Rule((0, 4), "block", action=KEEP)
    plan = plan_of((keep,), (Rule((1, 4), "block", action=REUSE),), (Rule((2, 4), "block", action=REUSE),))
    assert [use.blocks for use in uses(plan, 0)] == [(2, 4)]  # kept where both end
    assert [use.blocks for use in uses(plan, 1)] == [(1, 4)]
    assert [use.blocks for use in uses(plan, 2)] == [(2, 4)]


def test_branches_that_do_the_same_share_a_use():
    keep = Rule((0, 1), "attn", action=KEEP)
    plan = plan_of((keep,), (Rule((0, 1), "attn", branches=("uncond",), action=REUSE),), branches=("cond", "uncond"))
    assert [use.branches for use in uses(plan, 0)] == [("uncond",)]
    assert [use.branches for use in uses(plan, 1)] == [("uncond",)]
    assert computed_share(plan) == pytest.approx(1 - 1 / 4 * (1 / 3) / BLOCKS)


def test_bytes_are_planes_times_tokens_times_width_in_the_store():
    for store, size in (("fp32", 4), ("bf16", 2), ("fp8", 1), (None, 4)):
        keep = Rule((0, 2), "attn", action=KEEP, order=1, store=store)
        read = Rule((0, 2), "attn", action=FORECAST, order=1)
        plan = plan_of((keep,), (keep,), (read,), forecasts={2: (2.0, -1.0)})
        assert cache_bytes(plan) == 2 * 2 * TOKENS * WIDTH * size
    keep = Rule((0, 1), "attn", action=KEEP, store="int8")
    assert cache_bytes(plan_of((keep,), (Rule((0, 1), "attn", action=REUSE),))) == TOKENS * (WIDTH + 4)


def test_an_unbound_plan_with_caches_is_refused():
    plan = plan_of((Rule((0, 1), "attn", action=KEEP),), (Rule((0, 1), "attn", action=REUSE),))
    with pytest.raises(PlanError, match="not bound"):
        caches(replace(plan, binding=None))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.lists(st.floats(-10, 10), min_size=5, max_size=5))
def test_weights_on_differences_give_what_weights_on_values_give(weights, values):
    planes = list(
        itertools.accumulate(range(4), lambda row, _: [a - b for a, b in itertools.pairwise(row)], initial=values)
    )
    got = sum(c * row[0] for c, row in zip(plane_weights(weights), planes, strict=False))
    assert got == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=False)), abs=1e-9)


# --- verifier ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "forecasts", "message"),
    [
        ((("keep",), ("forecast",)), {1: (2.0, -1.0)}, "needs 2 kept value"),
        ((("keep1",), ("keep1",), ("forecast",)), {2: (2.0,)}, "needs 2 weights from number 0"),
        ((("range",), ("inside",)), {}, "do not run"),
        ((("rough",), ("rough",), ("rough",), ("reuse",)), {}, "lose their bits"),
        ((("keep",), ("half",), ("reuse",)), {}, "one dtype"),
        ((("reuse",), ("keep",)), {}, "first evaluated row"),
    ],
)
def test_the_verifier_refuses(rows, forecasts, message):
    named = {
        "keep": (Rule((0, 1), "attn", action=KEEP),),
        "keep1": (Rule((0, 1), "attn", action=KEEP, order=1),),
        "half": (Rule((0, 1), "attn", action=KEEP, store="bf16"),),
        "rough": (Rule((0, 1), "attn", action=KEEP, order=2, store="bf16"),),
        "reuse": (Rule((0, 1), "attn", action=REUSE),),
        "forecast": (Rule((0, 1), "attn", action=FORECAST, order=1),),
        "range": (Rule((0, 4), "residual", action=KEEP), Rule((0, 1), "attn", action=KEEP)),
        "inside": (Rule((0, 4), "residual", action=REUSE), Rule((0, 1), "attn", action=KEEP)),
    }
    with pytest.raises(PlanError, match=message):
        plan_of(*(named[name] for (name,) in rows), forecasts=forecasts)


def test_an_output_of_reused_blocks_alone_is_the_earlier_rows():
    keep, read = Rule((0, 4), "block", action=KEEP), Rule((0, 4), "block", action=REUSE)
    with pytest.raises(PlanError, match="an output of row 0"):
        plan_of((keep,), (read,))
