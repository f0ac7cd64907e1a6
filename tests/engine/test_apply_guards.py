"""Guards written into plans, and guarded plans frozen by what runs decided."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.engine.test_planners import SPEC, euler, letters, table_of
from vivace.engine import planners
from vivace.engine.passes import (
    apply_adaptive_guidance,
    apply_block_cache,
    apply_experts,
    apply_guards,
    apply_guidance,
    apply_precision,
    freeze,
)
from vivace.engine.plan import Action, Plan
from vivace.engine.planning import replan
from vivace.errors import ArgumentError, ModelError, PlanError

POLYNOMIAL = (498.65, -283.78, 55.86, -3.82, 0.26)
EVERY = [
    planners.FirstBlockCache(0.08),
    planners.FirstBlockCache(0.2, warm_up=3, last=2, most=2),
    planners.DBCache(first=2, last=1, warm_up=4, most=3),
    planners.TeaCache(POLYNOMIAL, 0.25),
]


def each(guards):
    return type(guards).__name__


def guarded(plan):
    return [i for i, step in enumerate(plan.steps) if step.guard is not None]


# ---------------------------------------------------------------- the rows
def test_first_block_cache_looks_at_the_first_block_and_leaves_out_the_others():
    made = apply_guards(euler(6), planners.FirstBlockCache(0.1, most=3)).bind(SPEC)
    assert guarded(made) == [1, 2, 3, 4, 5] and letters(made, "residual") == "kkkkkc"
    guard = made.steps[2].guard
    assert (guard.metric, guard.rule, guard.threshold, guard.params) == ("first_block", "below", 0.1, (1.0, 3.0))
    (reuse,) = guard.otherwise.rules
    (keep,) = made.steps[2].variant.rules
    assert reuse.action == Action.REUSE and reuse.blocks == keep.blocks == (1, 6) and reuse.site == "residual"


def test_dbcache_has_blocks_in_front_and_behind():
    made = apply_guards(euler(12), planners.DBCache(first=2, last=1)).bind(SPEC)
    assert guarded(made) == [8, 9, 10, 11]
    assert made.steps[8].guard.params == (2.0, 0.0) and made.steps[8].guard.otherwise.rules[0].blocks == (2, 5)


def test_teacache_accumulates_a_polynomial_and_runs_both_ends():
    made = apply_guards(euler(6), planners.TeaCache(POLYNOMIAL, 0.25)).bind(SPEC)
    guard = made.steps[1].guard
    assert guarded(made) == [1, 2, 3, 4] and guard.params == POLYNOMIAL
    assert (guard.metric, guard.rule, guard.threshold) == ("modulated_input", "accumulated_below", 0.25)
    assert guard.otherwise.rules[0].blocks == (0, 6)


def test_a_guard_chooses_between_variants_of_its_rows_expert():
    with pytest.raises(PlanError, match="of model 'transformer_2'"):  # kept values never cross
        apply_experts(apply_guards(euler(6), planners.FirstBlockCache(0.1)), 0.55)
    made = apply_experts(apply_adaptive_guidance(apply_guidance(euler(6), 2.0)), 0.55)
    models = [(step.variant.model, step.guard.otherwise.model) for step in made.steps if step.guard is not None]
    assert {"main", "transformer_2"} == {model for model, _ in models}
    assert all(model == otherwise for model, otherwise in models)


def test_rows_at_a_guidance_edge_and_of_a_new_model_have_no_guard():
    plan = apply_guidance(euler(), 3.0, interval=(0.25, 0.75))
    assert guarded(apply_guards(plan, planners.FirstBlockCache())) == [1, 4, 5, 6, 7, 10, 11]
    plan = apply_experts(euler(), 0.55)
    switch = next(i for i, step in enumerate(plan.steps) if step.variant.model != "main")
    assert switch not in guarded(apply_guards(plan, planners.FirstBlockCache()))


@pytest.mark.parametrize(
    "guards",
    [planners.FirstBlockCache(0.0), planners.DBCache(threshold=0), planners.TeaCache(POLYNOMIAL, 0.0)],
    ids=each,
)
def test_a_threshold_of_zero_writes_nothing(guards):
    assert apply_guards(euler(), guards).steps == euler().steps


@pytest.mark.parametrize("guards", EVERY, ids=each)
def test_guarded_plans_are_legal_bound_or_not_and_made_again(guards, tmp_path):
    plan = apply_precision(apply_guidance(euler(), 3.0, interval=(0.0, 0.6)), "bf16")
    made = apply_guards(plan, guards, store="bf16")
    assert made.bind(SPEC).steps == apply_guards(plan.bind(SPEC), guards, store="bf16").steps
    assert replan(made.recipe) == made and guarded(made)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").hash == made.hash
    assert f"guards {each(guards)}" in str(made).splitlines()[0]


@pytest.mark.parametrize("guards", EVERY, ids=each)
@pytest.mark.parametrize("strength", [1.0, 0.75, 0.4])
def test_a_tail_guards_the_rows_that_the_run_guards(guards, strength):
    plan = apply_guidance(euler(), 3.0, interval=(0.0, 0.6))
    made = apply_guards(plan, guards)
    tail = made.tail(strength)
    first = made.nfe - tail.nfe
    assert guarded(tail) == [i - first for i in guarded(made) if i > first]
    assert replan(tail.recipe) == tail and tail.bind(SPEC).nfe == tail.nfe


def test_a_table_gives_the_coefficients_of_its_model():
    table = table_of(euler(), {"teacache/coefficients": np.array(POLYNOMIAL)})
    made = apply_guards(euler(), planners.TeaCache(table, 0.25))
    assert made.steps == apply_guards(euler(), planners.TeaCache(POLYNOMIAL, 0.25)).steps
    with pytest.raises(ModelError, match="apply_guards: measured on model 000000000000"):
        made.bind(replace(SPEC, fingerprint="3" * 64))
    with pytest.raises(ModelError, match="TeaCache: measured on model 000000000000"):
        apply_guards(euler().bind(replace(SPEC, fingerprint="3" * 64)), planners.TeaCache(table))


def test_guards_come_last():
    with pytest.raises(PlanError, match="step 1 has a guard or reuses blocks already"):
        apply_guards(apply_guards(euler(), "first_block_cache"), "teacache", table=POLYNOMIAL)
    with pytest.raises(PlanError, match="step 1 has a guard or reuses blocks already"):
        apply_guards(apply_block_cache(euler(), "fora"), "first_block_cache")


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        (planners.FirstBlockCache(-0.1), "FirstBlockCache: threshold=-0.1"),
        (planners.FirstBlockCache(most=-1), "FirstBlockCache: most=-1"),
        (planners.DBCache(first=0), "DBCache: first=0"),
        (planners.TeaCache([]), "TeaCache: 0 coefficients"),
        (planners.TeaCache("abc"), "TeaCache: coefficients='abc'"),
        ("nope", "guards 'nope'; use one of FirstBlockCache"),
    ],
)
def test_bad_arguments_name_method_and_field(guards, message):
    with pytest.raises(ArgumentError, match=message):
        apply_guards(euler(), guards)
    with pytest.raises(ArgumentError, match="store 'int4'"):
        apply_guards(euler(), "first_block_cache", store="int4")


# ---------------------------------------------------------------- frozen
@dataclass
class Decision:
    """As on a receipt."""

    row: int
    fired: tuple[bool, ...]


def test_the_majority_of_all_pictures_decides_and_a_tie_computes():
    made = apply_guards(euler(6), planners.FirstBlockCache())
    one = (
        Decision(1, (True, True)),
        Decision(2, (True, False)),
        Decision(3, (False, False)),
        Decision(4, (True, True)),
    )
    other = (Decision(1, (False,)), Decision(2, (True,)), Decision(3, (True,)), Decision(4, (False,)))
    frozen = freeze(made, [one, other])
    assert letters(frozen, "residual") == "krrkrc"
    assert letters(freeze(made, one), "residual") == "krckrc"
    assert not guarded(frozen) and frozen.bind(SPEC).nfe == 6


@pytest.mark.parametrize("fired", [True, False])
@pytest.mark.parametrize("guards", EVERY, ids=each)
def test_decisions_that_agree_are_the_static_plan(guards, fired):
    plan = apply_guidance(euler(), 3.0, interval=(0.0, 0.6))
    made = apply_guards(plan, guards)
    frozen = freeze(made, {row: fired for row in guarded(made)})
    orders = [0 if fired and i in guarded(made) else None for i in range(12)]
    blocks = made.steps[0].variant.rules[0].blocks
    static = apply_block_cache(plan, planners.Scheduled([{"site": "residual", "blocks": blocks, "orders": orders}]))
    assert frozen.steps == static.steps and freeze(made.bind(SPEC), {}).bind(SPEC).steps == plan.bind(SPEC).steps


def test_a_frozen_plan_is_made_again_and_has_tails():
    made = freeze(apply_guards(euler(), planners.FirstBlockCache()), {i: i % 3 != 0 for i in range(1, 12)})
    assert letters(made, "residual") == "krr" * 4 and replan(made.recipe) == made
    tail = made.tail(8 / 12)
    assert letters(tail, "residual") == "krkrrkrr" and replan(tail.recipe) == tail


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ({0: True}, "traces decide row 0, where the plan has no guard"),
        ({"x": True}, "traces decide row x"),
        ({1: 0.3}, "decision 0.3; True"),
        ("fired", "traces 'fired'"),
        (3, "traces 3"),
    ],
)
def test_traces_of_another_plan_are_refused(traces, message):
    with pytest.raises(ArgumentError, match=message):
        freeze(apply_guards(euler(), planners.FirstBlockCache()), traces)
    with pytest.raises(PlanError, match="has no guards"):
        freeze(euler(), {})
