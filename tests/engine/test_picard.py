"""Picard iteration over plans: the sequential result, what is reported, what is refused."""

import math

import numpy as np
import pytest
import torch

import vivace
from tests.engine.plans import edit
from tests.engine.toy import SHAPE, Toy
from vivace.bench.oracle import Mixture, schedule_denoiser
from vivace.engine.denoiser import CallableDenoiser
from vivace.engine.executors import make_executor
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.executors.picard import PicardExecutor
from vivace.engine.noise import normals
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Action, Guard, Rule, Transform, Variant
from vivace.engine.request import Request
from vivace.engine.session import Session
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, UnsupportedError

BETAS = np.linspace(1e-4, 2e-2, 1000)
VP = vivace.NoiseSchedule.vp(BETAS)
DATA = Mixture.seven()


def v_plan(steps=8, solver="unipc", **options):
    return vivace.make_plan(VP, solver, steps, prediction="v", **options)


def picard(*plans, toy=None, **options):
    toy = toy or Toy()
    executor = PicardExecutor(EagerExecutor(toy), **options)
    return Session(toy, plans, executor, shape=SHAPE, expand=lambda plan: plan.bind(toy.spec, SHAPE))


def sequential(plan):
    toy = Toy()
    return Session(toy, [plan], EagerExecutor(toy), shape=SHAPE, expand=lambda plan: plan.bind(toy.spec, SHAPE))


def rms(a):
    return float(a.double().square().mean().sqrt())


PLANS = [
    v_plan(),
    v_plan(solver="ddim"),
    v_plan(solver="ddim", eta=1.0),
    v_plan(solver="dpmpp_2m_sde"),
    v_plan(5, "heun"),
    v_plan(12, "dpmpp_3m"),
    apply_guidance(v_plan(9), 2.0),
    apply_guidance(v_plan(9), 2.0, interval=(0.3, 0.7)),
    v_plan().tail(0.5),
]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_without_tolerance_it_is_the_sequential_result_bit_for_bit(plan, window):
    image = torch.rand(SHAPE) if plan.recipe.tail else None
    want = sequential(plan)("abc", n=2, seed=3, image=image)
    got = picard(plan, tolerance=0.0, window=window)("abc", n=2, seed=3, image=image)
    assert torch.equal(got.latents, want.latents) and got.plan == want.plan
    told = got.receipt.details["picard"]
    assert told["iterations"] <= plan.nfe and told["evaluations"] >= plan.nfe
    if window == 1:
        assert told["iterations"] == told["evaluations"] == plan.nfe


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("plan", PLANS[:7], ids=range(7))
def test_the_result_is_the_sequential_one_to_its_tolerance(plan, tolerance):
    want = sequential(plan)("abc", n=2, seed=3).latents
    result = picard(plan, tolerance=tolerance)("abc", n=2, seed=3)
    assert rms(result.latents - want) <= tolerance
    assert result.receipt.details["picard"]["iterations"] < plan.nfe


def plain(x, tolerance, window):
    """Picard of DDIM in y = x / alpha: y_j = y_f + sum over f <= i < j of (rho_{i+1} - rho_i) eps_i, plain sums.

    The first evaluation is alone; a row not evaluated yet has the eps of the last one that was.
    """
    times = list(vivace.make_plan(VP, "ddim", 12).steps)
    levels = [(step.alpha, step.sigma) for step in times] + [(1.0, 0.0)]
    rhos = [sigma / alpha for alpha, sigma in levels]
    y, front, eps, iterations, evaluations = x / levels[0][0], 0, {}, 0, 0

    def states(last):
        out, sums = {}, torch.zeros_like(y)
        for j in range(front, last + 1):
            out[j] = levels[j][0] * (y + sums)
            if j in eps:
                sums = sums + (rhos[j + 1] - rhos[j]) * eps[j]
        return out

    def network(x, j):
        alpha, sigma = levels[j]
        return (x - alpha * DATA.x0(x, alpha, sigma)) / sigma

    while front < 12:
        last = min(front + window, 12) - 1 if eps else 0
        newest = eps[max(eps)] if eps else None
        for j in range(front, last + 1):
            eps.setdefault(j, newest)
        if not iterations:
            eps = {}
        before = states(last)
        eps = {j: network(before[j], j) for j in before}
        iterations, evaluations = iterations + 1, evaluations + len(before)
        after, stop = states(last), front + 1
        while stop <= last and rms(after[stop] - before[stop]) <= tolerance * levels[stop][1]:
            stop += 1
        for j in range(front, stop):
            y = y + (rhos[j + 1] - rhos[j]) * eps[j]
        front = stop
        if front < 12 and front > last:
            eps = {front - 1: eps[front - 1]}
    return y, iterations, evaluations


@pytest.mark.parametrize(("tolerance", "window"), [(0.1, 12), (0.1, 5), (1e-3, 12), (1e-9, 4)])
def test_it_is_plain_picard_on_ddim(tolerance, window):
    plan, noise = vivace.make_plan(VP, "ddim", 12), torch.from_numpy(normals((2,), 5)).double()[None]
    wrapped = CallableDenoiser(schedule_denoiser(DATA, VP, "eps"), "eps", (2,), noise)
    executor = PicardExecutor(EagerExecutor(wrapped), tolerance=tolerance, window=window)
    s = Session(wrapped, [plan], executor, shape=(2,), state_dtype=torch.float64, probed=False, expand=verify)
    result = s(latents=noise)
    want, iterations, evaluations = plain(noise, tolerance, window)
    told = result.receipt.details["picard"]
    assert (told["iterations"], told["evaluations"]) == (iterations, evaluations)
    torch.testing.assert_close(result.latents, want, rtol=0.0, atol=1e-10)
    exact = vivace.sample(schedule_denoiser(DATA, VP, "eps"), plan, noise)
    assert rms(result.latents - exact) <= max(tolerance, 1e-10)


def test_receipts_count_what_was_evaluated():
    toy, plan = Toy(), apply_guidance(v_plan(10), 2.0)
    s = picard(plan, toy=toy, tolerance=0.05, window=4)
    toy.calls.clear()
    receipt = s("ab", n=3).receipt
    told = receipt.details["picard"]
    assert told["iterations"] == len(toy.calls) and told["window"] == 4 and told["tolerance"] == 0.05
    assert sum(n for n, _ in toy.calls) == 3 * told["evaluations"] and max(n for n, _ in toy.calls) == 12
    assert (receipt.nfe, receipt.branch_evals) == (told["evaluations"], 2 * told["evaluations"])
    assert (receipt.nfe_planned, receipt.branch_evals_planned) == (10, 20)
    assert receipt.executor == "picard" and receipt.phases["picard"] > 0
    assert receipt.compiled["network by"] == "eager" and "iterations" in str(receipt)
    assert all(row.branches for row in receipt.rows)


def test_requests_share_iterations_and_do_not_touch_each_other():
    plans = [v_plan(7), v_plan(9, "ddim", eta=1.0), apply_guidance(v_plan(6), 2.0)]
    requests = [Request("a" * k, plan, n=1 + k % 2, seed=k) for k, plan in enumerate(plans * 2)]
    s = picard(*plans, tolerance=0.05, window=5)
    want = [s(r.prompt, plan=r.plan, n=r.n, seed=r.seed).latents for r in requests]
    toy = Toy()
    s = picard(*plans, toy=toy, tolerance=0.05, window=5)
    states = [s.begin(request) for request in requests]
    toy.calls.clear()
    s.step(states)
    assert len(toy.calls) == 2  # one batch for rows of one branch, one for guided ones
    while running := [state for state in states if not state.done]:
        s.step(running)
    for state, latents in zip(states, want, strict=True):
        assert torch.equal(s.finish(state).latents, latents)


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("plan", [v_plan(9), apply_guidance(v_plan(9), 2.0, interval=(0.3, 0.7))], ids=["", "guided"])
def test_a_failing_network_leaves_its_states_as_they_were(plan, failing):
    toy, calls = Toy(), []
    s = picard(plan, toy=toy, tolerance=1e-3)
    want = s("pizza", seed=8)
    evaluate = toy.evaluate

    def once(*args):
        calls.append(args)
        return evaluate(*args) if len(calls) != failing + 1 else 1 / 0

    toy.evaluate = once
    state = s.begin(Request("pizza", seed=8))
    with pytest.raises(ZeroDivisionError):
        while not state.done:
            s.step([state])
    while not state.done:
        s.step([state])
    result = s.finish(state)
    assert torch.equal(result.latents, want.latents)
    assert result.receipt.details["picard"] == want.receipt.details["picard"]


def test_not_a_number_ends():
    toy = Toy()
    s = picard(v_plan(4), toy=toy)
    evaluate = toy.evaluate
    toy.evaluate = lambda x, *rest: tuple(out * math.nan for out in evaluate(x, *rest))
    assert torch.isnan(s("a").latents).all()


REFUSED = [
    ({"variant": Variant(rules=(Rule((0, 2), action=Action.COMPUTE, order=1),))}, "caching"),
    ({"variant": Variant(rules=(Rule((0, 2), site="merge", share=0.5),))}, "merging"),
    ({"variant": Variant(keep=0.5, selector="norm")}, "some tokens"),
    ({"guard": Guard("cosine", "above", 0.9, Variant())}, "guard"),
    ({"net_inputs": (("scale", 2.0),)}, "further network inputs"),
]


@pytest.mark.parametrize(("change", "fragment"), REFUSED, ids=[fragment for _, fragment in REFUSED])
def test_what_rows_may_not_have_is_refused_naming_the_row(change, fragment):
    plan = edit(v_plan(4, "ddim"), 1, **change)
    with pytest.raises(UnsupportedError, match=f"step 1: the picard executor does not run .*{fragment}"):
        PicardExecutor(EagerExecutor(Toy())).check(plan)


def test_transforms_are_refused():
    step = v_plan(4, "ddim").steps[2]
    plan = edit(v_plan(4, "ddim"), 2, ops=(*step.ops, Transform("clamp", "x", (), (("low", -1.0), ("high", 1.0)))))
    with pytest.raises(UnsupportedError, match="step 2: .*'clamp'"):
        picard(plan)
    with pytest.raises(UnsupportedError, match="step 0: .*'cfg_rescale'"):
        picard(apply_guidance(v_plan(4), 2.0, rescale=0.7))


@pytest.mark.parametrize(
    ("backend", "options", "fragment"),
    [
        ("picard", {"tolerance": -1.0}, "tolerance"),
        ("picard", {"tolerance": math.nan}, "tolerance"),
        ("picard", {"window": 0}, "window"),
        ("picard", {"window": 2.0}, "window"),
        ("eager", {"tolerance": 0.1}, "backend='picard'"),
        ("auto", {"window": 3}, "backend='picard'"),
    ],
)
def test_bad_options_are_refused(backend, options, fragment):
    toy = Toy()
    toy.compiler = lambda: CallableDenoiser.compiler(toy)
    with pytest.raises(ArgumentError, match=fragment):
        make_executor(backend, toy, **options)
