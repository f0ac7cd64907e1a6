"""Plans whose rows compute some tokens: what the passes write, what is refused and how, files, tails, printouts."""

from dataclasses import replace

import pytest
import torch

import vivace
from tests.engine.plans import edit
from tests.engine.test_token_sessions import base, run, some
from tests.engine.tokeny import SHAPE, Tokeny
from tests.engine.toy import Toy, session
from vivace.engine.passes import apply_mask
from vivace.engine.plan import Action, Guard, Rule, Variant
from vivace.engine.token_rows import token_rows
from vivace.errors import ArgumentError, PlanError, UnsupportedError

HALF = Variant(keep=0.5, selector="deviation", rules=(Rule((0, 0), "kv", action=Action.REUSE),))
KEEP = Variant(rules=(Rule((0, 0), "kv", action=Action.COMPUTE),))


def keeps(plan):
    return [None if step.variant is None else step.variant.keep for step in plan.steps]


def by_hand(*variants, steps=None):
    """A plan without guidance whose rows have these variants."""
    plan = base(len(variants), guided=False)
    for i, variant in enumerate(variants):
        plan = edit(plan, i, variant=variant)
    return plan


# --- where tokens are left out -------------------------------------------------------------------------------------
def test_first_last_resets_and_every_are_full():
    plan = some(base(14), 0.5, first=3, last=2, resets=(5,), every=4)
    assert [i for i, keep in enumerate(keeps(plan)) if keep == 1.0] == [0, 1, 2, 4, 5, 8, 12, 13]


def test_the_slope_keeps_the_mean_and_later_rows_compute_fewer():
    plan = some(base(9), 0.5, first=2, last=1, slope=0.5)
    shares = keeps(plan)[2:8]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) / len(shares) == pytest.approx(0.5)
    assert (shares[0], shares[-1]) == (0.75, 0.25)


def test_a_share_for_every_evaluation():
    shares = [1.0, 1.0, 0.5, 0.25, 1.0, 0.5]
    assert keeps(some(base(6), shares, last=0)) == shares


def test_rows_at_the_edge_of_a_guidance_interval_are_full():
    plan = some(base(10, interval=(0.3, 0.7)), 0.5)
    assert keeps(plan)[3] == 1.0  # the first with branch uncond
    assert keeps(plan)[7] == 0.5  # without it nothing is missing
    run(plan)


def test_evaluations_of_one_step_compute_the_same_tokens():
    plan = some(base(5, solver="heun"), 0.5, first=2, last=1)
    said = [(step.x, step.variant.keep, step.variant.selector) for step in plan.steps]
    assert said[2:4] == [("x", 0.5, "deviation"), ("u", 0.5, "same")]
    _, toy = run(plan)
    assert toy.runs[2] == toy.runs[3]
    assert toy.runs[4] == toy.runs[5]


def test_the_bound_is_stated():
    lines = str(some(base(8), 0.25)).splitlines()
    assert ".25 deviation<=8" in lines[5]
    assert "tokens" in lines[0]
    assert "4/16 deviation<=8" in str(some(base(8), 0.25).bind(Tokeny().spec))


def test_a_mask_has_no_bound():
    assert ".25 mask " in str(some(base(8), 0.25, selector="mask"))


def test_all_full_rows_that_may_matter_keep_keys_and_values():
    plan = some(base(8), 0.5, every=4).bind(Tokeny().spec)
    kept = [i for i, step in enumerate(plan.steps) for rule in step.variant.rules if rule.action == Action.COMPUTE]
    assert kept == [1, 4]


# --- files, tails --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "heun"])
def test_a_plan_file_holds_the_rows(tmp_path, solver):
    plan = apply_mask(some(base(8, solver=solver), 0.25, selector="mask"))
    for k, each in enumerate((plan, plan.bind(Tokeny().spec))):
        each.save(tmp_path / f"{k}.json")
        assert vivace.Plan.load(tmp_path / f"{k}.json") == each


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_the_recipe_makes_the_plan_again(solver):
    plan = some(apply_mask(base(9, solver=solver)), 0.25, selector="norm", every=5)
    assert plan.again() == plan
    assert plan.again(steps=12).nfe == 12


def test_a_tail_computes_what_the_full_run_did_but_its_first_row():
    plan = some(base(12), 0.5, every=6, slope=0.4)
    tail = plan.tail(0.5)
    assert keeps(tail) == [1.0, *keeps(plan)[7:]]
    assert "tokens" in str(tail).splitlines()[0]


def test_a_tail_without_such_rows_warns():
    plan = some(base(8), [1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0], last=0)
    result, _ = run(plan.tail(0.3), image=torch.zeros(SHAPE))
    assert any("tokens had no effect" in warning for warning in result.receipt.warnings)


# --- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.0}, "keep 0.0"),
        ({"keep": [0.5, 0.5]}, "2 shares; the plan has 8"),
        ({"keep": [0.5] * 8, "slope": 0.1}, "slope 0.1"),
        ({"selector": "same"}, "selector 'same'; use one of deviation"),
        ({"selector": "taste"}, "selector 'taste'"),
        ({"first": 0}, "first=0"),
        ({"every": 0}, "every=0"),
        ({"resets": ("a",)}, "resets"),
        ({"slope": 3.0}, "leaves share"),
        ({"starvation": -1.0}, "starvation=-1.0"),
        ({"drop_high": 1.5}, "drop_high=1.5"),
        ({"store": "int3"}, "store 'int3'"),
        ({"selector": "mask", "bound": 3}, "bound 3"),
        ({"bound": -2}, "bound=-2"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        some(base(8), **arguments)


def test_a_bound_that_cannot_be_kept_is_refused():
    with pytest.raises(
        PlanError, match=r"step 2: rows that compute 0\.25 of 1 tokens .* within 2 rows; raise the bound to 3"
    ):
        some(base(8), 0.25, bound=2)
    some(base(8), 0.25, bound=3)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ((HALF, HALF), "step 0: .*first evaluated row"),
        ((KEEP, replace(HALF, selector="all")), "step 1: it keeps 0.5 of 1 tokens and nobody chooses"),
        ((KEEP, replace(HALF, selector="taste")), "step 1: selector 'taste'; use one of deviation"),
        ((KEEP, replace(HALF, selector_params=(("bond", 1.0),))), "step 1: selector parameters"),
        ((KEEP, replace(HALF, selector_params=(("bound", 1.5),))), "step 1: bound 1.5"),
        ((KEEP, replace(HALF, selector_params=(("bound", 4096.0),))), "step 1: bound 4096; .* up to 4095"),
        ((KEEP, replace(HALF, selector_params=(("drop_high", 2.0),))), "drop_high <= 1"),
        ((KEEP, replace(HALF, selector="same")), "step 1: selector 'same'.*keeps 1"),
        ((KEEP, replace(HALF, selector="change")), "step 1: selector 'change'.*two full rows"),
        ((KEEP, replace(HALF, selector="guidance")), "step 1: selector 'guidance'.*apply_guidance"),
        ((KEEP, replace(HALF, branches=("cond", "uncond"))), "step 1: .*branch 'uncond'"),
        ((KEEP, replace(HALF, model="other")), "step 1: .*model 'main'"),
        ((KEEP, replace(HALF, rules=())), "step 1: .*no keys and values"),
        ((Variant(), HALF), "step 1: REUSE .* site 'kv' .* needs 1 kept"),
        ((KEEP, replace(KEEP, rules=HALF.rules)), "step 1: REUSE of site 'kv'; a row that computes all"),
        ((KEEP, replace(HALF, rules=KEEP.rules)), "step 1: COMPUTE of site 'kv'; a row that computes some"),
        ((KEEP, replace(HALF, selector="attention")), "step 1: selector 'attention' ranks by site 'received'"),
        ((KEEP, replace(HALF, rules=(*HALF.rules, Rule((0, 0), "mlp", None, Action.COMPUTE, 1)))), "order 1 kept"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_are_refused(variants, message):
    plan = by_hand(*variants)
    if "uncond" in variants[1].branches:
        plan = edit(plan, 1, outs=("out", "other"))
    with pytest.raises(PlanError, match=message):
        vivace.verify(plan)


def test_a_guard_beside_some_tokens_is_refused():
    plan = by_hand(KEEP, HALF, Variant())
    with pytest.raises(PlanError, match=r"step 1: a guard and some tokens in one row"):
        vivace.verify(edit(plan, 1, guard=Guard("cosine", "below", 0.1, Variant())))
    with pytest.raises(PlanError, match=r"step 2 guard: a guard and some tokens in one row"):
        vivace.verify(edit(plan, 2, guard=Guard("cosine", "below", 0.1, HALF)))
    with pytest.raises(PlanError, match=r"step 2 computes some tokens already"):
        some(some(base(6), 0.5), 0.5)


def test_a_forecast_of_what_some_tokens_left_is_refused():
    attn = {action: Rule((0, 0), "attn", action=action, order=order) for action, order in (
        (Action.COMPUTE, 1), (Action.FORECAST, 1))}  # fmt: skip
    partly = replace(HALF, rules=(*HALF.rules, Rule((0, 0), "attn", action=Action.COMPUTE)))
    full = replace(KEEP, rules=(*KEEP.rules, attn[Action.COMPUTE]))
    plan = by_hand(full, full, partly, full, Variant(rules=(attn[Action.FORECAST],)))
    with pytest.raises(PlanError, match=r"step 4: FORECAST .* of which step 2 computed some"):
        vivace.verify(edit(plan, 4, forecast=(2.0, -1.0)))
    plan = by_hand(full, full, partly, full, full, Variant(rules=(attn[Action.FORECAST],)))
    vivace.verify(edit(plan, 5, forecast=(2.0, -1.0)))


def test_attention_without_the_keys_of_others_is_refused_once_bound():
    some, every = (Rule((0, last), "kv", action=Action.COMPUTE) for last in (2, 3))
    read = Rule((0, 2), "kv", action=Action.REUSE)
    for kept in (some, every):
        plan = by_hand(replace(KEEP, rules=(kept,)), replace(HALF, rules=(read,)))
        with pytest.raises(PlanError, match=r"step 1: .*attention of block 2 .* REUSE"):
            vivace.verify(plan).bind(Tokeny().spec)


def test_a_model_that_keeps_no_keys_and_values_says_so():
    with pytest.raises(UnsupportedError, match=r"step 2: .*keeps no keys and values"):
        session(some(base(6), 0.5), toy=Toy("eps"))


@pytest.mark.parametrize("keep", [5e-324, 1e-300, 1e-7])
def test_a_share_next_to_nothing_is_refused_by_its_bound(keep):
    with pytest.raises(PlanError, match=r"cannot reach each within 4095 rows"):
        some(base(5), keep)
    plan = by_hand(KEEP, replace(HALF, keep=keep, selector_params=(("bound", 3.0),)))
    with pytest.raises(PlanError, match=r"step 1: .* raise the bound to \d+, or keep more"):
        vivace.verify(plan)


def test_a_long_plan_of_such_rows_is_read_in_one_pass():
    plan = by_hand(KEEP, *(replace(HALF, selector_params=(("bound", 1.0),)) for _ in range(400)))
    assert [row is None for row in token_rows(vivace.verify(plan))] == [True] + [False] * 400
