"""Adaptive Guidance: a guard on the cosine of the branches, at run time and frozen; what it leaves out does not run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from tests.engine.plans import edit, euler
from tests.engine.toy import SHAPE, Toy, session
from vivace.bench import oracle
from vivace.engine import guiding, looking, verify
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import (
    adaptive_guidance,
    apply_adaptive_guidance,
    apply_afs,
    apply_block_cache,
    apply_guards,
    apply_guidance,
    apply_linear_ag,
    apply_merge,
    apply_tokens,
    freeze,
)
from vivace.engine.plan import Guard, Plan, Transform, Variant
from vivace.engine.request import Request
from vivace.errors import ArgumentError, PlanError

FLOW = NoiseSchedule.flow()
SCHEDULES = {"eps": NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000)), "v": FLOW, "flow": FLOW}


class Counted:
    """Three of the seven modes as the class, all seven without one; counts the samples a branch is asked for."""

    def __init__(self, prediction):
        seven = oracle.Mixture.seven()
        few = oracle.Mixture(seven.means[:3], seven.weights[:3] / seven.weights[:3].sum(), seven.deviations[:3])
        self.of = {
            branch: oracle.schedule_denoiser(data, SCHEDULES[prediction], prediction)
            for branch, data in (("cond", few), ("uncond", seven))
        }
        self.seen = {"cond": 0, "uncond": 0}

    def __call__(self, x, t, branch="cond"):
        self.seen[branch] += len(x)
        return self.of[branch](x, t)


def ddim(prediction="flow", steps=12):
    return vivace.make_plan(SCHEDULES[prediction], "ddim", steps, prediction=prediction)


def guided(prediction="flow", steps=12, scale=3.0):
    return apply_guidance(ddim(prediction, steps), scale)


def guards_of(plan, **changes):
    """The plan with its guards changed."""
    changed = [
        step if step.guard is None else replace(step, guard=replace(step.guard, **changes)) for step in plan.steps
    ]
    return replace(plan, steps=tuple(changed))


def noise(n=6, seed=3):
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def published(prediction, start, scale, threshold, steps=12):
    """Castillo et al. 2023, algorithm 1, sample by sample, over DDIM in x0 form; -> results, branch evaluations."""
    net, rows = Counted(prediction), ddim(prediction, steps).steps
    levels = [*((row.timestep, row.alpha, row.sigma) for row in rows), (0.0, 1.0, 0.0)]
    results = []
    for x in start.clone():
        truncated = False
        for (t, alpha, sigma), (_, after, noise_after) in zip(levels, levels[1:], strict=False):
            at = torch.full((1,), t, dtype=torch.float64)
            made = net(x[None], at, "cond")[0]
            if not truncated:
                without = net(x[None], at, "uncond")[0]
                truncated = float(torch.dot(made, without) / (made.norm() * without.norm())) > threshold
                made = without + scale * (made - without)
            if prediction == "eps":
                eps, data = made, (x - sigma * made) / alpha
            elif prediction == "v":
                eps = (sigma * x + alpha * made) / (alpha**2 + sigma**2)
                data = (alpha * x - sigma * made) / (alpha**2 + sigma**2)
            else:
                eps, data = x + alpha * made, x - sigma * made
            x = after * data + noise_after * eps
        results.append(x)
    return torch.stack(results), net.seen


@pytest.mark.parametrize("prediction", list(SCHEDULES))
@pytest.mark.parametrize("threshold", [0.2, 0.9, 0.99])
def test_it_is_the_papers_algorithm_sample_by_sample(prediction, threshold):
    start, net = noise(), Counted(prediction)
    got = vivace.sample(net, apply_adaptive_guidance(guided(prediction), threshold), start)
    want, seen = published(prediction, start, 3.0, threshold)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)
    assert net.seen == seen and 0 < seen["uncond"] < seen["cond"] == 72


def test_a_guard_that_never_fires_gives_the_bits_of_guidance():
    start = noise()
    for prediction in SCHEDULES:
        plan, first, second = guided(prediction), Counted(prediction), Counted(prediction)
        never = guards_of(apply_adaptive_guidance(plan, 0.9), threshold=2.0)
        assert torch.equal(vivace.sample(first, never, start), vivace.sample(second, plan, start))
        assert first.seen == second.seen


def test_threshold_one_adds_nothing():
    plan = guided()
    assert apply_adaptive_guidance(plan, 1.0).steps == plan.steps


def test_rows_behind_the_first_guided_one_have_the_guard():
    plan = apply_guidance(vivace.make_plan(FLOW, "dpmpp_2m", 10, prediction="flow"), 3.0, interval=(0.2, 0.8))
    made = apply_adaptive_guidance(plan, 0.9)
    assert [i for i, step in enumerate(made.steps) if step.guard is not None] == [3, 4, 5, 6, 7]
    guard = made.steps[4].guard
    assert (guard.metric, guard.rule, guard.threshold, guard.sticky) == (looking.METRIC, "above", 0.9, True)
    assert guard.otherwise.branches == ("cond",) and made.branch_evals == plan.branch_evals
    assert adaptive_guidance.METRIC == looking.METRIC == verify.HEARD


# ---------------------------------------------------------------- sessions
def run(plan, prompts=("abc",), n=2, toy=None, **options):
    made = session(plan, toy=toy, **options)
    states = [made.begin(Request(prompt, n=n, seed=7)) for prompt in prompts]
    while not states[0].done:
        made.step(states)
    return [made.finish(state) for state in states]


def toy_plan(threshold=0.9, steps=6):
    return apply_adaptive_guidance(guided("v", steps), threshold)


def toy_apart():
    """Fires below a cosine, since those of the toy fall: its pictures stop at rows of their own."""
    return guards_of(toy_plan(), rule="below", threshold=0.89)


def test_what_is_left_out_is_not_computed_and_the_receipt_counts_it():
    toy = Toy()
    (result,) = run(toy_apart(), ("ab",), n=3, toy=toy, probed=False)
    counted = sum(samples * len(branches) for samples, branches in toy.calls)
    receipt = result.receipt
    assert receipt.guidance["branch_evals"] == counted < receipt.guidance["of"] == 36
    assert receipt.guidance["removed"] == 1 - counted / 36
    assert receipt.branch_evals == math.ceil(counted / 3) and receipt.branch_evals_planned == 12
    first = receipt.guidance["stopped"]
    assert all(row > 0 for row in first) and len(set(first)) > 1
    for decision in receipt.decisions:
        assert decision.fired == tuple(decision.row >= row for row in first)
    assert "branch evaluations" in str(receipt) and "guidance" in receipt.to_dict()


def test_pictures_decide_alone_and_keep_their_bits_in_any_company():
    plan = toy_apart()
    together = run(plan, ("ab", "abcdefgh"), n=3, probed=False)
    for prompt, result in zip(("ab", "abcdefgh"), together, strict=True):
        for j in range(3):
            alone = session(plan, probed=False)(prompt, seed=7, index=j)
            assert torch.equal(alone.latents[0], result.latents[j])
            assert alone.receipt.guidance["stopped"] == [result.receipt.guidance["stopped"][j]]
    stopped = [row for result in together for row in result.receipt.guidance["stopped"]]
    assert len(set(stopped)) > 1


@pytest.mark.parametrize("params", [(), (2.0,)])
def test_a_row_that_failed_is_decided_once(params):
    plan = guards_of(toy_apart(), params=params, sticky=not params)
    toy = Toy()
    made = session(plan, toy=toy, probed=False)
    want, evaluate = made("ab", n=3), toy.evaluate
    state = made.begin(Request("ab", n=3))
    while not state.done:
        toy.evaluate = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            made.step([state])
        toy.evaluate = evaluate
        made.step([state])
    result = made.finish(state)
    assert torch.equal(result.latents, want.latents)
    assert result.receipt.decisions == want.receipt.decisions
    assert result.receipt.guidance == want.receipt.guidance


def test_a_stuck_guard_reads_the_device_no_more():
    made = session(toy_plan(-0.9), probed=False)
    state = made.begin(Request("abc", n=2))
    while not state.done:
        made.step([state])
    values = [decision.values for decision in state.watch.decisions]
    assert all(value is not None for value in values[0]) and all(set(each) == {None} for each in values[1:])
    made.finish(state)


def test_predictions_of_zero_never_fire():
    cosines = guiding.Cosines([None, None])
    cosines.note(0, torch.zeros(4), torch.ones(4))
    assert cosines.decide(Guard(looking.METRIC, "above", 0.5, Variant(), sticky=True)) == ((False, False), (None, None))


def test_a_guard_that_does_not_stay_asks_the_last_cosine_again():
    cosines, guard = guiding.Cosines([None]), Guard(looking.METRIC, "below", 0.5, Variant())
    cosines.note(0, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert cosines.decide(guard) == cosines.decide(guard) == ((True,), (0.0,))


# ---------------------------------------------------------------- frozen
def test_frozen_it_runs_what_the_guard_chose():
    plan = toy_plan()
    (result,) = run(plan, n=1, probed=False)
    static = freeze(plan, result.receipt.decisions)
    toy = Toy()
    (again,) = run(static, n=1, toy=toy, probed=False)
    assert torch.allclose(again.latents, result.latents, rtol=0, atol=1e-6)
    assert static.branch_evals == sum(len(branches) for _, branches in toy.calls) == result.receipt.branch_evals
    assert all(step.guard is None for step in static.steps)


def test_frozen_rows_are_those_of_a_guidance_interval():
    plan = apply_adaptive_guidance(guided(steps=10), 0.5)
    static = freeze(plan, {row: row >= 4 for row in range(1, 10)})
    interval = apply_guidance(ddim(steps=10), 3.0, interval=(0.0, 0.4))
    assert [step.branches for step in static.steps] == [step.branches for step in interval.steps]
    start = noise()
    got, want = (vivace.sample(Counted("flow"), made, start) for made in (static, interval))
    assert torch.allclose(got, want, rtol=1e-14, atol=1e-14)


def test_frozen_rows_are_not_rescaled_and_others_are():
    plan = apply_guidance(ddim(steps=3), 3.0, rescale=0.7)
    static = freeze(apply_adaptive_guidance(plan, 0.5), {1: False, 2: True})
    kinds = [sum(isinstance(op, Transform) for op in step.ops) for step in static.steps]
    assert kinds == [1, 1, 0] and static.steps[2].outs == ("cond",)


@pytest.mark.parametrize("strength", [0.9, 0.75, 0.5])
def test_a_tail_of_a_frozen_plan_whose_first_step_is_in_closed_form_keeps_its_rows(strength):
    made = apply_adaptive_guidance(apply_afs(guided("v")), 0.9)
    full = freeze(made, {row: row % 2 == 0 for row in range(2, 12)})
    tail, told = full.tail(strength), {step.timestep: step.branches for step in full.steps}
    first, *rest = tail.steps
    assert first.branches == ("cond", "uncond") and len(rest) == int(12 * strength) - 1
    assert all(step.branches == told[step.timestep] for step in rest)


def test_a_frozen_plan_takes_caches_of_any_order():
    static = freeze(apply_adaptive_guidance(guided(steps=10), 0.5), {row: row >= 4 for row in range(1, 10)})
    made = apply_block_cache(static, "fora", interval=2)
    assert made.nfe == 10 and made.branch_evals == static.branch_evals


# ---------------------------------------------------------------- recipes, files
def test_recipe_tail_and_again():
    plan = toy_plan(0.8, 8)
    assert plan.recipe.passes[-1][0] == "apply_adaptive_guidance"
    assert plan.again().steps == plan.steps and len(plan.again(steps=5).steps) == 5
    tail = plan.tail(0.5)
    assert [step.guard is not None for step in tail.steps] == [False, True, True, True]
    static = freeze(plan, {row: row >= 5 for row in range(1, 8)})
    assert static.again().steps == static.steps
    assert [step.branches for step in static.tail(0.5).steps] == [("cond", "uncond"), *[("cond",)] * 3]


def test_files_keep_it(tmp_path):
    plan = toy_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_caches_without_differences_go_with_it():
    cached = apply_block_cache(guided("v", 8), "fora", interval=2)
    made = apply_adaptive_guidance(cached, 0.9).bind(Toy().spec, SHAPE)
    assert {rule.branches for step in made.steps if step.guard for rule in step.guard.otherwise.rules} == {None}


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("threshold", [1.5, -1.0, float("nan"), "0.9", True, None])
def test_a_bad_threshold_is_refused(threshold):
    with pytest.raises(ArgumentError, match="threshold"):
        apply_adaptive_guidance(guided(), threshold)


def test_plans_that_cannot_leave_uncond_out_are_refused():
    with pytest.raises(PlanError, match="no unconditional branch"):
        apply_adaptive_guidance(euler(4))
    with pytest.raises(PlanError, match="has a guard already"):
        apply_adaptive_guidance(apply_guards(guided(), "first_block_cache", threshold=0.1))
    with pytest.raises(PlanError, match="has a guard"):
        apply_guards(toy_plan(), "first_block_cache", threshold=0.1)
    with pytest.raises(PlanError, match="a guard and some tokens"):
        apply_adaptive_guidance(apply_tokens(guided(), 0.5, selector="norm"), 0.9)


def test_two_kinds_of_guards_in_one_plan_are_refused():
    plan = toy_plan()
    look = Guard("first_block", "below", 0.1, plan.steps[3].variant, (1.0,))
    with pytest.raises(PlanError, match="one kind"):
        verify.verify(edit(plan, 3, guard=look))
    for changes in ({"rule": "accumulated_below"}, {"params": (1.0,)}, {"params": (0.5,), "sticky": False}):
        with pytest.raises(PlanError, match="above or below a threshold"):
            verify.verify(edit(plan, 3, guard=replace(plan.steps[3].guard, **changes)))


def test_merged_tokens_are_for_plans_without_guards():
    merged = apply_merge(guided("v", 4), 0.5)
    with pytest.raises(PlanError, match="merges tokens in a plan with guards"):
        apply_adaptive_guidance(merged, 0.9)


# ---------------------------------------------------------------- with an estimate in place of cond
def estimated_by_hand(start, threshold, most, steps=12, scale=3.0):
    """A plain loop over flow Euler: after `most` rows with the last difference, one with both branches."""
    net, rows, results = Counted("flow"), ddim(steps=steps).steps, []
    for x in start.clone():
        gamma, gap, count = -2.0, None, 0
        for step, after in zip(rows, [*(row.sigma for row in rows[1:]), 0.0], strict=True):
            t = torch.full((1,), step.timestep, dtype=torch.float64)
            cond = net(x[None], t, "cond")[0]
            if gamma > threshold and count < most:
                uncond, count = cond - gap, count + 1
            else:
                uncond, count = net(x[None], t, "uncond")[0], 0
                gamma = float(torch.dot(cond, uncond) / (cond.norm() * uncond.norm()))
                gap = cond - uncond
            x = x + (after - step.sigma) * (uncond + scale * (cond - uncond))
        results.append(x)
    return torch.stack(results), net.seen


@pytest.mark.parametrize(("threshold", "most"), [(-0.999, 1), (-0.999, 3), (0.5, 2), (0.9, 100)])
def test_a_row_that_fired_reads_the_last_difference(threshold, most):
    start, net = noise(), Counted("flow")
    got = vivace.sample(net, apply_adaptive_guidance(guided(), threshold, estimate=most), start)
    want, seen = estimated_by_hand(start, threshold, most)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10) and net.seen == seen and seen["uncond"] < 72


def test_estimates_are_those_of_the_static_rows_and_pictures_stay_alone():
    plan = apply_adaptive_guidance(guided("v", 6), -0.999, estimate=2)
    static = apply_linear_ag(guided("v", 6), rows=[1, 2, 4, 5])
    (one,), (two,) = run(plan, n=3, probed=False), run(static, n=3, probed=False)
    assert torch.allclose(one.latents, two.latents, atol=1e-5)
    assert one.receipt.branch_evals == two.receipt.branch_evals == 8
    alone = session(plan, probed=False)("abc", seed=7, index=1)
    assert torch.equal(alone.latents[0], one.latents[1])


def test_what_estimates_is_recorded_and_refused_where_it_cannot_be(tmp_path):
    plan = apply_adaptive_guidance(guided("v", 6), 0.2, estimate=2)
    assert plan.again().steps == plan.steps and plan.steps[2].guard.params == (2.0,) and not plan.steps[2].guard.sticky
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match=r"rows \[1, 2\] estimate"):
        freeze(plan, {1: True, 2: True})
    for bad in (-1, 1.5, True, 1001):
        with pytest.raises(ArgumentError, match="estimate"):
            apply_adaptive_guidance(guided(), 0.9, estimate=bad)
    for params in ((0.5,), (1.0, 2.0), (0.0,)):
        with pytest.raises(PlanError, match="whole number of rows"):
            verify.verify(guards_of(plan, params=params))
