"""DualFast on any multistep plan: against transcriptions, where it changes nothing, in tails, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from vivace.bench import oracle
from vivace.engine.interchange.replay import replay
from vivace.engine.lower import Given, lower_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import (
    apply_afs,
    apply_dualfast,
    apply_guidance,
    apply_mask,
    apply_momentum,
    apply_restart,
    apply_tokens,
)
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.02, 20.0)
FLOW = NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(16, 2)))


class Run:
    """One run of a solver: predictions at every row, and what the zeroth-order term takes in their place."""

    def __init__(self, strength, anchor, schedule, form):
        self.knobs, self.form = (strength, anchor, schedule), form
        self.seen = []  # (x0, eps) of every row, oldest first

    def look(self, x, alpha, sigma):
        x0 = SEVEN.x0(x, alpha, sigma)
        self.seen.append((x0, (x - alpha * x0) / sigma))
        self.c = self.knobs[0] * (alpha**2 / (alpha**2 + sigma**2) if self.knobs[2] == "linear" else 1.0)
        return self.seen[-1]

    def zeroth(self, wanted, x, alpha, sigma):
        """x0 or eps, whichever the solver wants, extrapolated in `form`."""
        x0, eps = self.seen[-1]
        if len(self.seen) > 1:
            anchor = self.seen[0] if self.knobs[1] == "first" else self.seen[-2]
            if self.form == "x0":
                x0 = (1 + self.c) * x0 - self.c * anchor[0]
                eps = (x - alpha * x0) / sigma
            else:
                eps = (1 + self.c) * eps - self.c * anchor[1]
                x0 = (x - sigma * eps) / alpha
        return x0 if wanted == "x0" else eps


def ddim(run, levels, x):
    for (alpha, sigma), (alpha_end, sigma_end) in zip(levels, levels[1:], strict=False):
        run.look(x, alpha, sigma)
        x0, eps = run.zeroth("x0", x, alpha, sigma), run.zeroth("eps", x, alpha, sigma)
        x = alpha_end * x0 + sigma_end * eps
    return x


def two_m(run, levels, x):
    """DPM-Solver++ 2M: the difference stays what it was."""
    for i, ((alpha, sigma), (alpha_end, sigma_end)) in enumerate(zip(levels, levels[1:], strict=False)):
        m = run.look(x, alpha, sigma)[0]
        d = run.zeroth("x0", x, alpha, sigma)
        if i and sigma_end:
            h = math.log(alpha_end / sigma_end) - math.log(alpha / sigma)
            last = math.log(alpha / sigma) - math.log(levels[i - 1][0] / levels[i - 1][1])
            d = d + (m - run.seen[-2][0]) * h / last / 2
        x = sigma_end / sigma * x + (alpha_end - sigma_end * alpha / sigma) * d
    return x


def adams_2(run, levels, x):
    """Adams-Bashforth of order 2 in rho on any steps (DEIS rhoAB-1)."""
    for i, ((alpha, sigma), (alpha_end, sigma_end)) in enumerate(zip(levels, levels[1:], strict=False)):
        eps = run.look(x, alpha, sigma)[1]
        rise = sigma_end / alpha_end - sigma / alpha
        step = rise * run.zeroth("eps", x, alpha, sigma)
        if i and sigma_end:
            last = sigma / alpha - levels[i - 1][1] / levels[i - 1][0]
            step = step + rise**2 / (2 * last) * (eps - run.seen[-2][1])
        x = alpha_end * (x / alpha + step)
    return x


CASES = [
    ("ddim", {}, ddim, "x0"),
    ("dpmpp_2m", {"lower_order_final": False}, two_m, "x0"),
    ("deis", {"order": 2, "variant": "rhoab", "lower_order_final": False}, adams_2, "eps"),
]


@pytest.mark.parametrize("form", [None, "x0", "eps"])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("anchor", ["previous", "first"])
@pytest.mark.parametrize(("solver", "options", "loop", "own"), CASES, ids=[case[0] for case in CASES])
def test_it_is_the_rule_of_the_paper(solver, options, loop, own, anchor, schedule, form):
    for noise, prediction in ((VP, "v"), (EDM, "x0")):
        plan = make_plan(noise, solver, 9, prediction=prediction, **options)
        levels = [*((step.alpha, step.sigma) for step in plan.steps), (1.0, 0.0)]
        plan = apply_dualfast(plan, 0.3, anchor=anchor, schedule=schedule, form=form)
        got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE)
        run = Run(0.3, anchor, schedule, form or own)
        want = loop(run, levels, NOISE * (levels[0][1] if noise is EDM else 1.0))
        assert float((got - want).abs().max()) < 1e-9 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("solver", "ddim ddpm dpmpp_2m dpmpp_3m dpmpp_2m_sde unipc deis lms ipndm dpm_solver".split())
def test_weights_move_and_their_sum_stays(solver):
    """Only what is read of the prediction changes, by c W (m - m_tau); without strength nothing does."""
    plan = make_plan(VP, solver, 8, prediction="v")
    assert apply_dualfast(plan, 0.0) is plan
    made = apply_dualfast(plan, 0.2)
    changed = 0
    for before, after in zip(plan.steps, made.steps, strict=True):
        old, new = dict(before.ops[-1].terms), dict(after.ops[-1].terms)
        history = [[coef for slot, coef in terms.items() if slot[0] == "m"] for terms in (old, new)]
        assert math.fsum(history[1]) == pytest.approx(math.fsum(history[0]), abs=1e-13)
        others = [{slot: coef for slot, coef in terms.items() if slot[0] != "m"} for terms in (old, new)]
        assert others[0] == others[1]
        changed += history[0] != history[1]
    assert changed == 7
    assert made.nfe == plan.nfe


def test_memory_is_that_of_two_values_at_least():
    def slots(plan):
        return {op.dst for op in plan.ops()} - {"x"}

    for solver, form, want in (
        ("ddim", None, {"m0", "m1"}),
        ("dpmpp_2m", None, {"m0", "m1"}),
        ("unipc", None, {"m0", "m1", "m2"}),
        ("dpmpp_2m", "eps", {"m0", "m1", "p0", "p1"}),
    ):
        plan = apply_dualfast(make_plan(VP, solver, 8, prediction="v"), 0.2, form=form)
        assert slots(plan) == want
        lowered = lower_plan(plan, Given({}))
        assert all(len(lowered.launches(span)) == 1 for span in lowered.spans)
    assert slots(apply_dualfast(make_plan(VP, "dpmpp_2m", 8, prediction="v"), 0.2, anchor="first")) == {
        "m0",
        "m1",
        "p0",
    }


@pytest.mark.parametrize("form", [None, "eps", "x0"])
def test_from_pure_noise(form):
    for solver in ("ddim", "deis", "dpmpp_2m"):
        plan = apply_dualfast(make_plan(FLOW, solver, 6, prediction="flow"), 0.2, form=form)
        assert bool(torch.isfinite(sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE)).all())


def test_a_tail_has_the_strength_of_its_levels():
    plan = apply_dualfast(apply_guidance(make_plan(VP, "ddim", 10, prediction="v"), 4.0), 0.3)
    tail = plan.tail(0.5)
    for full, cut in zip(plan.steps[6:], tail.steps[1:], strict=True):
        own = [dict(step.ops[-1].terms) for step in (full, cut)]
        assert sorted(own[0].values()) == sorted(own[1].values())


def test_plans_survive_files_and_other_step_counts(tmp_path):
    plan = apply_dualfast(
        apply_guidance(make_plan(VP, "unipc", 10, prediction="v"), 4.0), 0.2, anchor="first", form="eps"
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert replay(make_plan(VP, "unipc", 10, prediction="v"), plan.recipe.passes).steps == plan.steps
    assert plan.again(steps=6).nfe == 6


def test_guidance_before_or_behind_gives_the_same_rows():
    plan = make_plan(VP, "dpmpp_2m", 8, prediction="v")
    for options in ({}, {"anchor": "first"}, {"form": "eps"}):
        one = apply_dualfast(apply_guidance(plan, 4.0), **options)
        assert one.steps == apply_guidance(apply_dualfast(plan, **options), 4.0).steps


def test_the_anchor_is_not_taken_from_before_fresh_noise():
    plan = apply_dualfast(apply_restart(make_plan(VP, "ddim", 8, prediction="v"), [(3, 1, 0.3, 1.0)]), 0.2)
    jump = next(i for i, step in enumerate(plan.steps) if step.variant is None)
    assert len(plan.steps[jump + 1].ops[-1].terms) == 2 and len(plan.steps[jump + 2].ops[-1].terms) == 3
    free = apply_dualfast(apply_afs(make_plan(VP, "ddim", 8, prediction="v")), 0.2)
    assert len(free.steps[1].ops[-1].terms) == 3, "what the analytical step says is an earlier prediction"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -0.1}, r"apply_dualfast: strength must be a number in \[0, 2\]"),
        ({"anchor": "last"}, "apply_dualfast: anchor: unknown 'last'; known: previous, first"),
        ({"schedule": "cosine"}, "apply_dualfast: schedule"),
        ({"form": "v"}, "apply_dualfast: form: unknown 'v'; known: eps, x0"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        apply_dualfast(make_plan(VP, "ddim", 5), **arguments)


def test_what_it_does_not_fit_is_refused():
    plan = make_plan(VP, "dpmpp_2m", 12, prediction="v")
    with pytest.raises(PlanError, match="step 0 is one of several evaluations of a step"):
        apply_dualfast(make_plan(VP, "heun", 5))
    with pytest.raises(PlanError, match="keeps no history of x0 or eps to change"):
        apply_dualfast(make_plan(VP, "ghvb", 5))
    with pytest.raises(PlanError, match="steps by another sum than of its history.*bdia has no such history"):
        apply_dualfast(make_plan(VP, "bdia", 5))
    with pytest.raises(PlanError, match="went through this pass already"):
        apply_dualfast(apply_dualfast(plan))
    with pytest.raises(PlanError, match="writes x more than once.*apply_mask comes after"):
        apply_dualfast(apply_mask(plan))
    with pytest.raises(PlanError, match="step 0 steps by another sum than of its history; apply_momentum comes after"):
        apply_dualfast(apply_momentum(plan))
    with pytest.raises(PlanError, match="reads slot 'p0' of an earlier row, which tokens left out would lack"):
        apply_tokens(apply_dualfast(plan, anchor="first"), 0.5)
    assert apply_tokens(apply_dualfast(plan), 0.5).nfe == 12, "weights on history are history"
