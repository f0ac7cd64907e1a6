"""Plans as planners write them, run: nothing asked changes no bit, what is said runs, frozen is what was decided."""

import numpy as np
import pytest
import torch

import vivace
from tests.engine.blocky import BLOCKS, Blocky
from tests.engine.toy import session
from vivace.engine import planners
from vivace.engine.passes import apply_block_cache, apply_guards, apply_guidance, freeze

STEPS = 12
SCHEDULE = vivace.NoiseSchedule.vp(np.linspace(1e-4, 2e-2, 1000))


def base(solver="unipc", interval=(0.0, 0.75)):
    return apply_guidance(vivace.make_plan(SCHEDULE, solver, STEPS), 3.0, interval=interval)


def run(plan, n=1, seed=0):
    toy = Blocky()
    one = session(plan, toy=toy)
    toy.runs.clear()  # of the start-up test
    return one("red", n=n, seed=seed), toy


EVERY = [
    planners.Fora(3),
    planners.Fora(2, sites=("residual",), blocks=(1, -1)),
    planners.Fora(3, sites=("mlp",), window=(0.2, 0.9)),
    planners.TaylorSeer(3, 2),
    planners.TaylorSeer(3, 1, variable="lam"),
    planners.SmoothCache({"attn": np.full((STEPS, 3), 0.1), "mlp": np.full((STEPS, 3), 0.16)}),
    planners.MagCache(np.full(STEPS, 0.98)),
    planners.StepMask([1, 0, 0] * 4, 1, 1),
    planners.DeepCache(3),
    planners.FasterDiffusion(encoder=2),
]
NOTHING = [
    planners.Fora(1),
    planners.TaylorSeer(1, 2),
    planners.SmoothCache({"attn": np.full((STEPS, 3), 0.1)}, alpha=0.0),
    planners.MagCache(np.ones(STEPS), threshold=0.0),
    planners.StepMask([1] * STEPS, 1),
    planners.DeepCache(1),
]
GUARDS = [
    planners.FirstBlockCache(0.25),
    planners.DBCache(first=2, last=1, threshold=0.25, warm_up=3, most=2),
    planners.TeaCache((1.0, 0.0), 0.6),
]


def each(planner):
    return type(planner).__name__


@pytest.mark.parametrize("planner", NOTHING, ids=each)
def test_what_gives_nothing_again_keeps_every_bit(planner):
    plain, _ = run(base())
    cached, _ = run(apply_block_cache(base(), planner))
    assert torch.equal(cached.latents, plain.latents)


@pytest.mark.parametrize("guards", GUARDS, ids=each)
def test_a_threshold_of_zero_keeps_every_bit(guards):
    plain, _ = run(base())
    cached, _ = run(apply_guards(base(), guards.__class__(**guards.arguments() | {"threshold": 0.0})))
    assert torch.equal(cached.latents, plain.latents) and not cached.receipt.decisions


@pytest.mark.parametrize(
    ("solver", "planner"), [*(("unipc", p) for p in EVERY), ("heun", EVERY[0]), ("heun", EVERY[4])]
)
def test_every_planner_runs_and_computes_what_it_says(solver, planner):
    count = base(solver).nfe
    plan = apply_block_cache(base(solver), planner).bind(Blocky().spec)
    found, toy = run(plan)
    said = sum(
        len(step.variant.branches) for step in plan.steps for block in range(BLOCKS) for site in ("attn", "mlp")
        if not any(
            rule.site in (site, "residual", "block") and rule.blocks[0] <= block < rule.blocks[1]
            and rule.action in (vivace.Action.REUSE, vivace.Action.FORECAST)
            for rule in step.variant.rules
        )
    )  # fmt: skip
    assert sum(toy.runs.values()) == said < 2 * BLOCKS * plan.branch_evals and found.receipt.nfe == count
    assert torch.isfinite(found.latents).all()


@pytest.mark.parametrize("history", ["lower_order", "computed"])
def test_histories_run_and_change_the_picture(history):
    own, _ = run(apply_block_cache(base(), planners.Fora(3)))
    other, _ = run(apply_block_cache(base(), planners.Fora(3), history=history))
    assert torch.isfinite(other.latents).all() and not torch.equal(own.latents, other.latents)


@pytest.mark.parametrize("guards", GUARDS, ids=each)
def test_a_frozen_plan_draws_the_picture_whose_decisions_it_took(guards):
    plan = apply_guards(base(), guards)
    guarded, toy = run(plan)
    fired = [decision.row for decision in guarded.receipt.decisions if all(decision.fired)]
    assert 0 < len(fired) < sum(step.guard is not None for step in plan.steps)
    frozen, same = run(freeze(plan, guarded.receipt.decisions))
    assert torch.equal(frozen.latents, guarded.latents) and not frozen.receipt.decisions
    many = [run(plan, n=3, seed=seed)[0].receipt.decisions for seed in range(3)]
    assert run(freeze(plan, many))[0].receipt.nfe == STEPS


@pytest.mark.parametrize("planner", [EVERY[0], EVERY[3], EVERY[7]], ids=each)
def test_a_tail_draws_what_its_own_plan_draws(planner):
    plan = apply_block_cache(base(), planner)
    toy = Blocky()
    start = torch.zeros(1, *toy.spec.latent_shape)
    one = session(plan, toy=toy)
    tail = plan.tail(0.5)
    first, second = (one("red", plan=tail, image=start) for _ in range(2))
    assert torch.equal(first.latents, second.latents) and first.receipt.nfe == STEPS // 2
