"""Requests that follow sources of steps in a session: whose neighbours they are, what they read, what they tell."""

import math

import numpy as np
import pytest
import torch

import vivace
from tests.engine.toy import SHAPE, Toy, session
from vivace.engine.request import Request
from vivace.engine.sources import AdaptiveODE, AdaptiveSDE, TimeShift
from vivace.errors import StateError

VP = vivace.NoiseSchedule.vp(np.linspace(1e-4, 2e-2, 1000))
WIDE = (4, 96, 96)  # so many elements that torch splits their sum among threads


def ode(**options):
    return AdaptiveODE(VP, "v", rtol=0.01, **options)


class Spoilt(Toy):
    """Its predictions for one prompt are not numbers."""

    def evaluate(self, x, timesteps, conditions, variant):
        nan = torch.tensor([math.nan if condition == 5.0 else 1.0 for condition in conditions]).view(-1, 1, 1, 1)
        return tuple(out * nan for out in super().evaluate(x, timesteps, conditions, variant))


def test_a_source_that_cannot_go_on_ends_its_own_request_alone():
    s = session(ode(), toy=Spoilt())
    want = [s("red", n=2, seed=seed) for seed in (1, 2)]
    good, bad, last = (
        s.begin(Request(prompt, n=2, seed=seed)) for prompt, seed in (("red", 1), ("black", 3), ("red", 2))
    )
    running = [good, bad, last]
    while running:
        try:
            s.step(running)
        except StateError as error:
            assert "not finite" in str(error) and bad.closed == "aborted"
        running = [state for state in running if not state.done and not state.closed]
    for state, alone in zip((good, last), want, strict=True):
        result = s.finish(state)
        assert torch.equal(result.latents, alone.latents) and result.plans == alone.plans
        assert result.receipt.nfe == alone.receipt.nfe
    assert bad.closed and s.pool.idle


@pytest.mark.parametrize(
    "source",
    [AdaptiveODE(VP), AdaptiveSDE(VP, rtol=0.5, atol=0.1), TimeShift(VP, cutoff=0.0)],
    ids=lambda source: source.name,
)
def test_what_is_decided_does_not_depend_on_the_threads(source):
    noise = torch.randn(1, *WIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plans = []
            latents = vivace.sample(lambda x, t: torch.tanh(0.7 * x), source, noise, plans=plans)
            found.append((latents, plans[0].hash))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][0], latents) and found[0][1] == plan for latents, plan in found[1:])


def test_the_receipt_is_of_the_picture_with_the_most_evaluations_and_tells_every_phase():
    results = [session(ode(), probed=False)("a", n=3, seed=seed) for seed in range(6)]
    places = set()
    for receipt in (result.receipt for result in results):
        spent = receipt.details["source"]["evaluations"]
        places.add(spent.index(max(spent)))
        assert (
            receipt.nfe == max(spent)
            and receipt.plan_hash[:12] == receipt.details["source"]["plans"][spent.index(max(spent))]
        )
        assert {"hoist", "network", "solver_step", "decode"} <= receipt.phases.keys()
    assert len(places) > 1
    assert results[0].latents.shape == (3, *SHAPE)


def test_many_pictures_that_follow_leave_the_rows_of_plans_where_they_are():
    plan = vivace.make_plan(VP, "unipc", 8, prediction="v")
    s = session(plan, probed=False)
    s.abort(s.begin(Request("a")))
    (known,) = s.pool._entries
    for _ in range(s.pool.kept_entries):
        s.abort(s.begin(Request("a", ode(), n=2)))
    assert known in s.pool._entries and len(s.pool._entries) == 4  # the plan, the source's first rows, one a lane
