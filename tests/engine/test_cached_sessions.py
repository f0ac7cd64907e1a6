"""Sessions that cache: state of a request alone, the same bits in any mix, nothing left behind; guards by picture."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from tests.engine.blocky import BLOCKS, TOKENS, WIDTH, Blocky
from tests.engine.plans import edit
from tests.engine.toy import session
from vivace.engine.forecast import forecast_weights
from vivace.engine.grouping import group_of, grouped, whole
from vivace.engine.plan import Action, Guard, Rule, Variant
from vivace.engine.request import Request
from vivace.errors import UnsupportedError

KEEP, REUSE, FORECAST = Action.COMPUTE, Action.REUSE, Action.FORECAST
EVERY = (0, BLOCKS)


def base(steps, guided=True, solver="ddim"):
    schedule = vivace.NoiseSchedule.vp(np.linspace(1e-4, 2e-2, 1000))
    plan = vivace.make_plan(schedule, solver, steps=steps, prediction="eps")
    return vivace.passes.apply_guidance(plan, 3.0) if guided else plan


def fora(plan, interval, sites=("attn", "mlp"), order=0, store=None):
    """Sites of all blocks computed every so often, else reused or forecast."""
    for i, step in enumerate(plan.steps):
        if i % interval == 0:
            rules = [Rule(EVERY, site, action=KEEP, order=order, store=store) for site in sites]
        elif order and i > interval:
            rules = [Rule(EVERY, site, action=FORECAST, order=order) for site in sites]
            plan = edit(plan, i, forecast=forecast_weights(order, i % interval, interval))
        else:
            rules = [Rule(EVERY, site, action=REUSE) for site in sites]
        plan = edit(plan, i, variant=replace(step.variant, rules=tuple(rules)))
    return vivace.verify(plan)


def watching(plan, threshold, metric="first_block", params=(1.0, 0.0), rule="below"):
    """Every row but the first may reuse the residual of all blocks but the first."""
    keep, read = (Rule((1, BLOCKS), "residual", action=action) for action in (KEEP, REUSE))
    for i, step in enumerate(plan.steps):
        variant = replace(step.variant, rules=(keep,))
        otherwise = replace(step.variant, rules=(read,))
        guard = Guard(metric, rule, threshold, otherwise, params) if i else None
        plan = edit(plan, i, variant=variant, guard=guard)
    return vivace.verify(plan)


def run(plan, n=1, **options):
    toy = Blocky()
    one = session(plan, toy=toy, **options)
    toy.runs.clear()  # of the start-up test
    return one("red", n=n), toy


# --- what a schedule does ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_interval_of_one_keeps_the_bits(order):
    plain, _ = run(base(6))
    kept, _ = run(fora(base(6), 1, order=order))
    assert torch.equal(plain.latents, kept.latents)


def test_a_row_that_keeps_has_the_bits_of_one_that_does_not():
    toy = Blocky()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    variant = Variant(branches=("cond", "uncond"))
    state = session(fora(base(3), 3), toy=toy).begin(Request("red"))
    turns = group_of([whole(state)]).turns
    assert turns
    plain = toy.evaluate(x, [500.0], [3.0], variant)
    assert all(map(torch.equal, plain, toy.evaluate(x, [500.0], [3.0], variant, turns)))


def test_reused_sites_are_not_computed():
    result, toy = run(fora(base(6), 3))
    assert set(toy.runs.values()) == {2 * 2}  # two of six rows, two branches
    assert result.receipt.caches["reused"] == 4 * 2 * 2 * BLOCKS
    assert result.receipt.caches["computed_share"] == pytest.approx(1 / 3)


def test_what_is_kept_is_what_a_hand_written_loop_keeps():
    plan = fora(base(5, guided=False), 2, sites=("mlp",), order=1)
    toy, plain = Blocky(), Blocky()
    seen = session(plan, toy=toy)("red")
    bound = plan.bind(toy.spec)
    weights = [step.forecast for step in bound.steps]
    assert weights[3] == pytest.approx((1.5, -0.5))
    values, rows = {}, itertools.count()  # values: block -> computed ones, newest first

    def evaluate(x, timesteps, conditions, variant, turns=(), resume=None):
        row = next(rows)
        h = torch.tanh(x[0].reshape(TOKENS, WIDTH) + 0.001 * timesteps[0] + 0.1 * conditions[0])
        for i in range(BLOCKS):
            h = h + 0.2 * torch.tanh(h @ plain.matrices[i, 0])
            if row % 2 == 0:
                values.setdefault(i, []).insert(0, 0.2 * torch.tanh(h @ plain.matrices[i, 1]))
                h = h + values[i][0]
            elif row == 1:
                h = h + values[i][0]
            else:
                h = h + 1.5 * values[i][0] - 0.5 * values[i][1]
        return ((h * 0.5).reshape(1, 3, 8, 8),)

    plain.evaluate = evaluate
    expected = session(base(5, guided=False), toy=plain, probed=False)("red")
    torch.testing.assert_close(
        seen.latents, expected.latents, rtol=0, atol=64 * 2.0**-24 * float(expected.latents.abs().max())
    )


# --- mixes ------------------------------------------------------------------------------------------------------------
PLANS = {
    "plain": base(4),
    "fora": fora(base(4), 2),
    "taylor": fora(base(6), 2, order=1),
    "half": fora(base(5), 2, store="bf16"),
    "attn": fora(base(4), 3, sites=("attn",)),
    "residual": fora(base(4), 2, sites=("residual",)),
    "guarded": watching(base(5), 0.05),
    "tea": watching(base(5), 0.6, "modulated_input", (1.0, 0.0), "accumulated_below"),
}


def test_a_request_has_the_same_bits_alone_and_in_a_mix():
    alone = {
        (name, k): session(plan, toy=Blocky())("red", seed=k, n=1 + k % 2).latents
        for name, plan in PLANS.items()
        for k in range(2)
    }
    together = session(*PLANS.values(), toy=Blocky())
    rng, waiting, running = random.Random(0), list(alone), {}
    while waiting or running:
        if waiting and rng.random() < 0.5:
            name, k = waiting.pop(rng.randrange(len(waiting)))
            running[name, k] = together.begin(Request("red", PLANS[name], seed=k, n=1 + k % 2))
        some = [key for key in running if rng.random() < 0.7]
        if some:
            together.step([running[key] for key in some])
        for key in [key for key, state in running.items() if state.done]:
            assert torch.equal(together.finish(running.pop(key)).latents, alone[key]), key
    assert together.kept.idle


def given(*ranges):
    """One computed row, then one for each range whose output is given again."""
    plan = base(1 + len(ranges), guided=False)
    rules = [Rule(EVERY, "block", action=KEEP), *(Rule(blocks, "block", action=REUSE) for blocks in ranges)]
    for i, rule in enumerate(rules):
        plan = edit(plan, i, variant=replace(plan.steps[i].variant, rules=(rule,)))
    return vivace.verify(plan)


def test_plans_that_cut_their_ranges_elsewhere_share_a_row():
    one, two = given((1, 4)), given((1, 4), (2, 4))  # the second keeps what leaves blocks [2, 4)
    both = session(one, two, toy=Blocky())
    states = [both.begin(Request("red", plan, seed=3)) for plan in (one, two)]
    both.step(states)
    assert len(grouped([whole(state) for state in states])) == 1
    while not all(state.done for state in states):
        both.step([state for state in states if not state.done])
    for state, plan in zip(states, (one, two), strict=True):
        assert torch.equal(both.finish(state).latents, session(plan, toy=Blocky())("red", seed=3).latents)


def test_a_row_that_keeps_and_one_that_need_not_are_looked_at_together():
    plan = watching(base(5), 0.05)
    both, alone = session(plan, toy=Blocky()), session(plan, toy=Blocky())("red", seed=4).latents
    ahead, behind = (both.begin(Request("red", plan, seed=4)) for _ in range(2))
    for _ in range(4):
        both.step([ahead])
    both.step([behind])
    both.step([behind, ahead])  # a row that keeps, and the last one, from which nobody reads
    while not behind.done:
        both.step([behind])
    assert torch.equal(both.finish(ahead).latents, alone)
    assert torch.equal(both.finish(behind).latents, alone)


def test_two_pictures_in_a_row_are_two_runs():
    for name, plan in PLANS.items():
        one = session(plan, toy=Blocky())
        first, second = one("red", seed=1), one("blue", seed=2)
        assert torch.equal(first.latents, session(plan, toy=Blocky())("red", seed=1).latents), name
        assert torch.equal(second.latents, session(plan, toy=Blocky())("blue", seed=2).latents), name


def test_pictures_of_a_request_are_decided_one_by_one():
    plan = watching(base(6, guided=False), 0.09)
    four = session(plan, toy=Blocky())("red", n=4)
    for j in range(4):
        one = session(plan, toy=Blocky())("red", n=1, index=j)
        assert torch.equal(one.latents[0], four.latents[j])
    fired = [decision.fired for decision in four.receipt.decisions]
    assert len(fired) == 5
    assert all(len(row) == 4 for row in fired)


def test_a_thousand_requests_leave_nothing_behind():
    rng, both = random.Random(1), session(*PLANS.values(), toy=Blocky())
    names = list(PLANS)
    for name in names:
        both("red", plan=PLANS[name], n=2)
    settled = both.kept.nbytes
    for k in range(1000):
        state = both.begin(Request("red", PLANS[names[k % len(names)]], seed=k, n=1 + k % 2))
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            both.step([state])
        both.abort(state)
    assert both.kept.idle
    assert both.kept.nbytes == settled
    for name in names:
        alone = session(PLANS[name], toy=Blocky())("red", seed=9).latents
        assert torch.equal(both("red", plan=PLANS[name], seed=9).latents, alone)


# --- guards -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("metric", "rule", "params"),
    [("first_block", "below", (1.0, 0.0)), ("modulated_input", "accumulated_below", (1.0, 0.0))],
)
def test_a_threshold_of_zero_keeps_the_bits(metric, rule, params):
    plain, _ = run(base(5))
    seen, _ = run(watching(base(5), 0.0, metric, params, rule))
    assert torch.equal(plain.latents, seen.latents)
    assert not any(any(decision.fired) for decision in seen.receipt.decisions)
    assert any("no effect" in warning for warning in seen.receipt.warnings)


def test_a_guard_that_always_fires_runs_one_row_whole():
    result, toy = run(watching(base(5, guided=False), 1e9))
    assert toy.runs["attn", BLOCKS - 1] == 1
    assert result.receipt.caches["reused"] == 4
    assert [decision.fired for decision in result.receipt.decisions] == [(True,)] * 4


def test_no_more_fires_in_a_row_than_allowed():
    result, _ = run(watching(base(8, guided=False), 1e9, params=(1.0, 2.0)))
    fired = "".join("x" if decision.fired[0] else "-" for decision in result.receipt.decisions)
    assert fired == "xx-xx-x"


def test_the_residual_of_the_first_blocks_is_compared_with_the_last_computed_row():
    plan = watching(base(6, guided=False), 0.2)
    result, toy = run(plan)
    free = [run(watching(base(6, guided=False), 0.0))[0].receipt.decisions[i].values[0] for i in range(5)]
    assert result.receipt.decisions[0].values[0] == pytest.approx(free[0])
    fired = [decision.fired[0] for decision in result.receipt.decisions]
    values = [decision.values[0] for decision in result.receipt.decisions]
    assert fired == [value < 0.2 for value in values]
    assert toy.runs["attn", 0] == 6  # looked at in every row, and never twice in one


def test_an_accumulated_polynomial_starts_anew_after_a_computed_row():
    plan = watching(base(8, guided=False), 0.3, "modulated_input", (1.0, 0.0), "accumulated_below")
    result, _ = run(plan)
    each = [
        decision.values[0]
        for decision in run(watching(base(8, guided=False), 0.0, "modulated_input", (1.0, 0.0), "above"))[
            0
        ].receipt.decisions
    ]
    assert len(each) == 7
    total = 0.0
    for decision in result.receipt.decisions:
        assert decision.values[0] > total or total == 0.0
        total = decision.values[0] if decision.fired[0] else 0.0


def test_a_row_that_failed_is_decided_once():
    plan = watching(base(8, guided=False), 0.3, "modulated_input", (1.0, 0.0), "accumulated_below")
    want, toy = run(plan)
    one, evaluate = session(plan, toy=toy), toy.evaluate
    state = one.begin(Request("red"))
    while not state.done:
        toy.evaluate = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            one.step([state])
        toy.evaluate = evaluate
        one.step([state])
    result = one.finish(state)
    assert torch.equal(result.latents, want.latents)
    assert result.receipt.decisions == want.receipt.decisions


def test_a_guard_the_model_cannot_look_at_is_refused():
    plan = watching(base(3), 0.1, "cosine")
    with pytest.raises(UnsupportedError, match=r"step 1.*'cosine'.*first_block"):
        session(plan, toy=Blocky())


def test_a_row_that_fails_for_some_pictures_closes_the_request():
    plan = watching(base(6, guided=False), 0.09)
    toy = Blocky()
    one = session(plan, toy=toy)
    state = one.begin(Request("red", n=4))
    calls = []
    evaluate = toy.evaluate

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return evaluate(*args)

    split = None
    while not state.done and split is None:
        toy.evaluate = failing
        calls.clear()
        try:
            one.step([state])
        except RuntimeError:
            split = state.row
        toy.evaluate = evaluate
    if split is not None:
        assert "failed" in state.closed
        assert one.kept.idle


# --- rows that read nothing of x ----------------------------------------------------------------------------------
def propagated(plan, keys, blocks=(0, 2)):
    """What leaves the first blocks is computed in the rows of `keys`, and given again in the others."""
    keep, read = (Rule(blocks, "block", action=action) for action in (KEEP, REUSE))
    for i, step in enumerate(plan.steps):
        plan = edit(plan, i, variant=replace(step.variant, rules=(keep if i in keys else read,)))
    return vivace.verify(plan)


def test_rows_that_read_nothing_of_x_are_evaluated_together():
    result, toy = run(propagated(base(7), (0, 1, 4)))
    sizes = [size for size, _ in toy.calls[-5:]]
    assert sizes == [1, 1, 2, 1, 2]  # rows 0, 1, 2 with 3, 4, 5 with 6
    assert [row.branches for row in result.receipt.rows] == [("cond", "uncond")] * 7
    assert result.receipt.nfe == 7


def test_rows_evaluated_together_have_the_bits_of_rows_one_by_one():
    plan = propagated(base(7), (0, 1, 4))
    together = session(plan, toy=Blocky())("red", n=2).latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vivace.engine.grouping.free_of_x", lambda variant, uses: False)
        toy = Blocky()
        alone = session(plan, toy=toy, probed=False)("red", n=2).latents
        assert [size for size, _ in toy.calls] == [2] * 7
    assert torch.equal(alone, together)


def test_rows_evaluated_together_may_meet_requests_at_other_rows():
    one, two = propagated(base(7), (0, 1, 4)), propagated(base(6), (0, 3))
    both = session(one, two, toy=Blocky())
    states = [both.begin(Request("red", one, seed=1)), both.begin(Request("blue", two, n=2, seed=2))]
    both.step(states[:1])
    while not all(state.done for state in states):
        both.step([state for state in states if not state.done])
    found = [both.finish(state).latents for state in states]
    assert torch.equal(found[0], session(one, toy=Blocky())("red", seed=1).latents)
    assert torch.equal(found[1], session(two, toy=Blocky())("blue", n=2, seed=2).latents)


def test_a_row_that_reads_x_past_the_first_blocks_is_not_evaluated_ahead():
    _, toy = run(propagated(base(5), (0,), blocks=(1, 3)))
    assert [size for size, _ in toy.calls[-5:]] == [1] * 5


def test_a_plan_that_caches_states_it_on_the_receipt():
    result, _ = run(fora(base(4), 2), n=2)
    told = result.receipt.to_dict()["caches"]
    assert told["bytes"] == told["bytes_planned"] == 2 * 2 * 2 * BLOCKS * TOKENS * WIDTH * 4
    assert "reused" in str(result.receipt)
    assert [row.share for row in result.receipt.rows] == [1.0, 0.0, 1.0, 0.0]
