"""The pass that writes caches: what is kept and for whom, stores, weights, recipes, tails, INT8, printing."""

import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_planners import SPEC, computed, euler, letters, table_of, weights
from vivace.engine import planners
from vivace.engine.caching import caches
from vivace.engine.forecast import noise_gain
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_block_cache, apply_experts, apply_guidance, apply_precision
from vivace.engine.plan import Action, Plan
from vivace.engine.planning import make_plan, replan
from vivace.errors import ArgumentError, ModelError, PlanError

CURVE = np.cumsum(np.full((12, 3), 0.05), axis=1)
EVERY = [
    planners.Fora(3),
    planners.Fora(2, sites=("residual",), blocks=(1, -1)),
    planners.TaylorSeer(3, 2),
    planners.TaylorSeer(3, 1, variable="lam", form="taylor"),
    planners.SmoothCache({"attn": CURVE, "mlp": 2 * CURVE}),
    planners.MagCache(np.full(12, 0.99)),
    planners.StepMask([1, 0, 0, 1] * 3, 1, 1),
    planners.DeepCache(3),
    planners.FasterDiffusion(encoder=3),
    planners.Scheduled(
        [{"site": "attn", "blocks": [0, 2], "orders": [None, None, 1, 0] * 3, "weights": {"2": [1.5, -0.4]}}]
    ),
]
PLANS = {
    "plain": euler(),
    "guided": apply_guidance(make_plan(NoiseSchedule.flow(), "unipc", 12, prediction="flow"), 3.0, interval=(0.2, 0.7)),
    "experts": apply_experts(euler(), 0.5),
}


def each(planner):
    return type(planner).__name__


# ---------------------------------------------------------------- every planner, every kind of plan
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("planner", EVERY, ids=each)
def test_plans_are_legal_bound_or_not_and_made_again_from_their_recipe(planner, name, tmp_path):
    plan = PLANS[name]
    made = apply_block_cache(plan, planner)
    assert made.steps != plan.steps and made.bind(SPEC).steps == apply_block_cache(plan.bind(SPEC), planner).steps
    json.dumps(made.recipe.passes[-1][1].to_dict(), allow_nan=False)
    assert replan(made.recipe) == made
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").hash == made.hash


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("planner", EVERY, ids=each)
@pytest.mark.parametrize("strength", [1.0, 0.75, 0.5, 0.2, 0.1])
def test_a_tail_computes_its_first_row_and_keeps_the_others(planner, name, strength):
    made = apply_block_cache(PLANS[name], planner)
    tail = made.tail(strength)
    first = made.nfe - tail.nfe
    assert replan(tail.recipe) == tail and replan(made.recipe, tail=strength) == tail
    assert tail.recipe.passes == made.recipe.passes
    for site in ("attn", "mlp", "residual", "block"):
        whole, part = computed(made, site), computed(tail, site)
        assert part[0] == "c"
        for now, then in zip(part[1:], whole[first + 1 :], strict=True):
            assert (now == "c") == (then == "c")
            assert now in ("c", "r") or int(now) <= int(then)


def test_a_forecast_in_a_tail_reads_the_values_of_the_tail():
    made = apply_block_cache(euler(), planners.TaylorSeer(3, 1, first=1, last=0))
    assert letters(made) == "krrk11k11k11"
    tail = made.tail(8 / 12)  # begins at evaluation 4, a forecast in the full run
    assert letters(tail) == "krk11k11"
    assert weights(tail, 3) == pytest.approx((1.5, -0.5)) and weights(made, 7) == pytest.approx((4 / 3, -1 / 3))


def test_fitted_weights_stay_while_all_their_values_are_there():
    orders = [None, None, 1, None, 1, 1]
    item = {"site": "attn", "blocks": [0, 0], "orders": orders, "weights": {str(i): [1.25, -0.2] for i in (2, 4, 5)}}
    made = apply_block_cache(euler(6), planners.Scheduled([item]))
    assert weights(made, 5) == (1.25, -0.2)
    tail = made.tail(4 / 6)  # begins at evaluation 2: evaluation 1, which 4 and 5 weighed, is gone
    assert letters(tail) == "kk11" and weights(tail, 2) == (2.0, -1.0)
    assert weights(made.tail(5 / 6), 3) == (1.25, -0.2)


def test_imported_schedules_and_masks_have_tails_too():
    from vivace.engine.interchange import apply_smoothcache, apply_step_mask, to_smoothcache

    made = apply_smoothcache(euler(), {"attn": [1, 0, 0] * 4})
    assert letters(made) == "krr" * 4 and letters(made.tail(8 / 12)) == "krkrrkrr"
    assert to_smoothcache(made.tail(8 / 12)) == {"attn": [1, 0, 1, 0, 0, 1, 0, 0]}
    masked = apply_step_mask(euler(), [1, 0, 0] * 4, first=1)
    assert letters(masked.tail(0.5), "residual") == "krrkrr" and replan(masked.tail(0.5).recipe) == masked.tail(0.5)


# ---------------------------------------------------------------- what the lowered plan computes
@st.composite
def schedules(draw):
    count = draw(st.integers(3, 10))
    orders = st.one_of(st.none(), st.none(), st.integers(0, 3))
    sites = draw(st.lists(st.sampled_from(["attn", "mlp", "cross_attn"]), min_size=1, max_size=3, unique=True))
    tracks = []
    for site in sites:
        line = draw(st.lists(orders, min_size=count, max_size=count))
        fitted = {}
        for i, order in enumerate(line):
            if order is not None and draw(st.booleans()):
                fitted[str(i)] = draw(
                    st.lists(st.sampled_from([1.5, -0.5, 0.25]), min_size=order + 1, max_size=order + 1)
                )
        tracks.append({"site": site, "blocks": [0, 2], "orders": line, "weights": fitted})
    edges = sorted(draw(st.lists(st.integers(0, count), min_size=2, max_size=2, unique=True)))
    return count, tracks, edges, draw(st.sampled_from([None, 0.4]))


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_planes_and_their_weights_give_the_polynomial_through_computed_values(case):
    count, tracks, (first, last), expert = case
    plan = apply_guidance(euler(count), 2.0, interval=((first + 0.5) / count, min(1.0, (last + 0.5) / count)))
    plan = plan if expert is None else apply_experts(plan, expert)
    made = apply_block_cache(plan, planners.Scheduled(tracks)).bind(SPEC)
    rng = np.random.default_rng(0)
    planes, history = {}, {}
    for i, (step, row) in enumerate(zip(made.steps, caches(made).rows, strict=True)):
        seen = set()
        for item in row.uses:
            use = item.use
            for branch in use.branches:
                cell = step.variant.model, use.site, use.blocks, branch
                seen.add(cell)
                kept = planes.setdefault(cell, [0.0] * 8)
                if use.action == Action.COMPUTE:
                    fresh = [rng.normal()]
                    for j in range(use.made):
                        fresh.append(fresh[j] - kept[j])
                    kept[: len(fresh)] = fresh
                    history.setdefault(cell, []).append((i, fresh[0]))
                    continue
                got = sum(w * plane for w, plane in zip(item.weights, kept, strict=False))
                rule = next(r for r in step.variant.rules if r.site == use.site)
                wanted = [1.0] if rule.action == Action.REUSE else step.forecast[rule.weights :][: rule.order + 1]
                values = [value for _, value in reversed(history[cell])][: len(wanted)]
                assert got == pytest.approx(np.dot(wanted, values), abs=1e-9)
                newest = history[cell][-1][0]
                line = letters(made, use.site)
                assert set(line[newest + 1 : i]) <= set("r0123")  # nothing was computed since without being kept


def test_what_nobody_reads_is_not_kept():
    made = apply_block_cache(euler(), planners.Fora(3, last=3))
    assert letters(made) == "krrkrrkrrccc"
    orders = [[r.order for r in step.variant.rules if r.action == Action.COMPUTE] for step in made.steps]
    assert sum(orders, []) == [0] * 6
    rising = apply_block_cache(euler(), planners.TaylorSeer(4, 2, first=3))
    kept = {i: r.order for i, s in enumerate(rising.steps) for r in s.variant.rules if r.action == Action.COMPUTE}
    assert kept == {0: 0, 1: 1, 2: 2, 6: 2, 10: 2} or kept == {0: 0, 1: 1, 2: 2, 6: 2}


def test_a_branch_is_kept_no_longer_than_it_runs():
    plan = apply_guidance(euler(), 3.0, interval=(0.0, 0.5))
    found = caches(apply_block_cache(plan, planners.Fora(2, last=0)).bind(SPEC))
    for i, row in enumerate(found.rows):
        for item in row.uses:
            assert ("uncond" in item.use.branches) == (i < 6)
    assert not any(item.use.action == Action.COMPUTE for item in found.rows[5].uses)  # the edge: nobody reads it


def test_sites_of_one_order_share_their_weights():
    made = apply_block_cache(euler(), planners.TaylorSeer(3, 1))
    row = made.steps[4]
    assert len(row.forecast) == 2 and {rule.weights for rule in row.variant.rules} == {0}
    both = apply_block_cache(made, planners.TaylorSeer(4, 1, sites=("cross_attn",)))
    assert len(both.steps[4].forecast) == 2 and len(both.steps[7].forecast) == 4  # 5 and 2 are read, 6 and 2
    assert both.bind(SPEC).nfe == 12


# ---------------------------------------------------------------- stores
@pytest.mark.parametrize("store", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_the_store_is_said_where_values_are_kept(store):
    made = apply_block_cache(euler(), planners.TaylorSeer(3, 1), store=store)
    for rule in itertools.chain.from_iterable(step.variant.rules for step in made.steps):
        assert rule.store == (store if rule.action == Action.COMPUTE else None)
    assert set(caches(made.bind(SPEC)).stores.values()) == {store}


@pytest.mark.parametrize("store", ["bf16", "fp16", "fp8", "int8"])
def test_differences_of_differences_are_not_kept_in_few_bits(store):
    with pytest.raises(PlanError, match=f"order 2 kept in {store}; .* keep them in fp32 or lower the order"):
        apply_block_cache(euler(), planners.TaylorSeer(3, 2), store=store)
    apply_block_cache(euler(), planners.TaylorSeer(3, 2), store="fp32")


@pytest.mark.parametrize(
    ("arguments", "message"), [({"store": "int4"}, "store 'int4'"), ({"history": "none"}, "history 'none'")]
)
def test_stores_and_histories_are_checked(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        apply_block_cache(euler(), "fora", **arguments)


# ---------------------------------------------------------------- order of passes
def test_a_plan_with_guards_is_refused():
    from vivace.engine.passes import apply_guards

    with pytest.raises(PlanError, match="step 1 has a guard"):
        apply_block_cache(apply_guards(euler(), planners.FirstBlockCache()), "fora")


def test_two_caches_of_one_site_conflict_and_of_two_sites_do_not():
    made = apply_block_cache(euler(), planners.Fora(2, sites=("attn",)))
    with pytest.raises(PlanError, match="two values"):
        apply_block_cache(made, planners.Fora(3, sites=("attn",)))
    assert set(letters(apply_block_cache(made, planners.Fora(3, sites=("mlp",))), "mlp")) == set("krc")


def test_blocks_of_a_bound_plan_must_exist():
    with pytest.raises(ArgumentError, match="none of the model's 6"):
        apply_block_cache(euler().bind(SPEC), planners.StepMask([1, 0] * 6))


# ---------------------------------------------------------------- 8 bits
@pytest.mark.parametrize("order", [1, 2, 3])
def test_rows_in_8_bits_lower_the_order_where_noise_would_be_multiplied(order):
    plan = euler(50)
    far = planners.TaylorSeer(7, order, first=order + 1)
    exact, coarse = apply_block_cache(plan, far), apply_block_cache(apply_precision(plan, "int8"), far)
    assert computed(coarse).replace("r", "0") != computed(exact) or order == 1
    for i, (now, then) in enumerate(zip(computed(coarse), computed(exact), strict=True)):
        assert (now == "c") == (then == "c")
        if now not in "c" + then:  # the gain of what was asked for would have been the larger
            assert noise_of(exact, i) > noise_of(coarse, i)


def noise_of(plan, i):
    rule = next(rule for rule in plan.steps[i].variant.rules if rule.site == "attn")
    return 1.0 if rule.action == Action.REUSE else sum(w * w for w in weights(plan, i))


def test_the_gain_in_the_plan_is_the_amplification_rule():
    made = apply_block_cache(euler(), planners.TaylorSeer(5, 1, first=2))
    assert [noise_of(made, i) for i in (2, 3, 4, 5)] == pytest.approx([(1 + k) ** 2 + k**2 for k in (1, 2, 3, 4)])
    assert noise_of(made, 3) == pytest.approx(noise_gain(1, 2))


def errors_of(plan, bias, variance):
    """bias: squared relative error by order, at every evaluation and lag."""
    forecast = np.broadcast_to(np.array(bias)[None, :, None], (plan.nfe, len(bias), 4)).copy()
    arrays = {f"forecast/{site}": forecast for site in ("attn", "mlp")}
    arrays |= {f"noise_variance/{site}": np.full(plan.nfe, variance) for site in ("attn", "mlp")}
    return table_of(plan, arrays)


@pytest.mark.parametrize(
    ("bias", "variance", "want"),
    [
        ((0.1, 0.01, 0.001), 0.0, "2"),  # no noise: the least bias
        ((0.1, 0.01, 0.001), 1e-3, "1"),  # order 2, two ahead of three that lie one apart, multiplies by 100
        ((0.1, 0.09, 0.09), 0.1, "r"),  # noise as large as the bias: give the newest again
    ],
)
def test_measured_errors_decide_between_bias_and_noise(bias, variance, want):
    plan = apply_precision(euler(), "int8")
    made = apply_block_cache(plan, planners.TaylorSeer(4, 2), errors=errors_of(plan, bias, variance))
    assert computed(made)[4] == want
    assert replan(made.recipe).steps == made.steps  # the recipe holds what the table decided
    assert computed(apply_block_cache(euler(), planners.TaylorSeer(4, 2)))[4] == "2"  # not a row in 8 bits


@pytest.mark.parametrize(
    ("store", "bias", "want"),
    [
        (None, (0.0105, 0.01), "1"),
        ("bf16", (0.0105, 0.01), "1"),
        ("int8", (0.0105, 0.01), "1"),  # two ahead: 5e-5 (1 + 2^2) is less than what order 1 wins
        ("fp8", (0.0105, 0.01), "r"),  # 7e-4 (1 + 2^2) is more
        ("fp8", (0.1, 0.01), "1"),
    ],
)
def test_rounding_of_the_store_decides_too(store, bias, want):
    planner, errors = planners.TaylorSeer(3, 1, first=2), errors_of(euler(), bias, 0.1)
    made = apply_block_cache(euler(), planner, store=store, errors=errors)
    assert computed(made)[3] == want  # of 1 and 0
    assert replan(made.recipe).steps == made.steps
    assert computed(apply_block_cache(euler(), planner, store=store, errors=False))[3] == "1"


@pytest.mark.parametrize("stated", [0.1, {"attn": 0.1, "mlp": 0.1}])
def test_the_noise_may_be_one_number_of_the_table(stated):
    plan = apply_precision(euler(), "int8")
    measured = errors_of(plan, (0.1, 0.09, 0.09), 0.1)
    bare = {name: value for name, value in measured.arrays.items() if name.startswith("forecast/")}
    for table in (measured, table_of(plan, bare, noise_variance=stated)):
        assert computed(apply_block_cache(plan, planners.TaylorSeer(4, 2), errors=table))[4] == "r"
    assert computed(apply_block_cache(plan, planners.TaylorSeer(4, 2), errors=table_of(plan, bare)))[4] == "1"
    with pytest.raises(ModelError, match="no array 'forecast/attn'"):
        apply_block_cache(plan, planners.TaylorSeer(4, 2), errors=table_of(plan, {}))


def test_only_values_computed_in_8_bits_count_as_noisy():
    early = apply_precision(euler(), "int8", last=9)  # evaluations 0 to 2
    made = apply_block_cache(
        early, planners.TaylorSeer(3, 2, form="newton"), errors=errors_of(early, (0.1, 0.05, 0.04), 1.0)
    )
    assert computed(made)[3:5] == "rr" and computed(made)[9:11] == "11"  # 8 and 5, not 2


# ---------------------------------------------------------------- printing
def test_the_printout_says_what_is_kept_forecast_and_in_what():
    made = apply_block_cache(euler(8), planners.TaylorSeer(3, 1, first=2), store="bf16").bind(SPEC)
    head, _, _, *rows = str(made).splitlines()
    assert "| flow_euler + block_cache TaylorSeer |" in head
    cells = [row.split() for row in rows]
    assert cells[1][5] == "CCCCCC,0:6.attn=C1/bf16,0:6.mlp=C1/bf16"
    assert cells[2][5] == "FFFFFF,0:6.attn=F1,0:6.mlp=F1" and cells[2][-2:] == ["forecast", "2,-1"]


def test_letters_of_blocks_are_small_where_part_of_them_computes():
    one = apply_block_cache(euler(4), planners.Fora(2, sites=("mlp",), blocks=(1, -1), last=0)).bind(SPEC)
    assert str(one).splitlines()[4].split()[5] == "CrrrrC,1:5.mlp=R"
    trunk = apply_block_cache(euler(4), planners.StepMask([1, 0, 1, 0], 1, 1)).bind(SPEC)
    assert str(trunk).splitlines()[4].split()[5] == "CRRRRC,1:5.residual=R"


def test_the_printout_says_what_history_holds():
    plan = make_plan(NoiseSchedule.flow(), "dpmpp_2m", 8, prediction="flow")
    made = apply_block_cache(plan, planners.Fora(2), history="computed")
    assert "+ block_cache Fora history computed |" in str(made).splitlines()[0]
    again = replace(made, recipe=None)
    assert "made by hand" in str(again)


# ---------------------------------------------------------------- schedules that were searched for
@dataclass(frozen=True, slots=True)
class Searching(planners.Planner):
    """A planner whose search recipes do not repeat."""

    searched = True

    def schedule(self, plan):
        track = planners.Track("mlp", (0, 0), (None, None, 1) * 4, {2: (1.2, -0.2)})
        return planners.Schedule((track,), tuple(map(float, range(12))))


def test_a_recipe_repeats_the_schedule_that_was_found_and_names_who_found_it():
    made = apply_block_cache(apply_precision(euler(), "int8"), Searching())
    assert weights(made, 2, "mlp") == (1.2, -0.2) and replan(made.recipe) == made
    for plan in (made, made.tail(0.5), replan(made.recipe)):
        assert "+ block_cache Searching |" in str(plan).splitlines()[0]
