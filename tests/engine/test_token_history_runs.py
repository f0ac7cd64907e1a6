"""Sessions with multistep solvers and tokens of every age, against runs of every token on its own, in float64."""

import numpy as np
import pytest
import torch

from tests.engine.test_token_history import FLOW, GRID, PATCH, PICTURES, SHAPE, TOKENS, Mixture, alone, plan_of, wide
from tests.engine.toy import Toy, session
from vivace.engine.bind import ModelSpec
from vivace.engine.noise import normals
from vivace.engine.passes import apply_guidance, apply_tokens
from vivace.engine.request import Request

ROWS, SEED = 12, 5
SOLVERS = {
    "dpmpp_2m": ({}, ("dpmpp_2m", {}), 1, "x0"),
    "dpmpp_3m": ({}, ("dpmpp_2m", {"variant": "heun"}), 2, "x0"),
    "unipc": ({}, ("unipc", {"corrector": False}), 2, "x0"),
    "deis": ({"order": 2}, ("deis", {"order": 2}), 1, "eps"),
    "lms": ({}, ("lms", {"order": 2}), 3, "eps"),
    "dpmpp_2m_sde": ({}, ("dpmpp_2m_sde", {}), 1, "x0"),
    "ddpm": ({}, None, 0, "x0"),
}


class Oracle(Toy):
    """Predicts by its rows' levels, element by element; pixels of tokens that are left out are NaN."""

    sites = frozenset(("kv",))

    def __init__(self, plan, prediction="eps"):
        super().__init__(prediction)
        self.spec = ModelSpec("oracle", "3" * 64, prediction, SHAPE, 2, PATCH, width=8)
        self.mixture = Mixture.of()
        self.levels = {step.timestep: (step.alpha, step.sigma) for step in plan.steps}
        self.active = []  # by evaluated sample: which tokens

    def why_not_kept(self, site, blocks):
        return None

    def evaluate(self, x, timesteps, conditions, variant, turns=(), resume=None, focus=None):
        outs = []
        for s, timestep in enumerate(timesteps):
            active = np.ones((1, TOKENS), bool)
            if focus is not None:
                active[:] = False
                active[0, focus.ids[s].numpy()] = True
            self.active.append(active)
            out = self.mixture.predict(self.spec.prediction, x[s : s + 1].double().numpy(), *self.levels[timestep])
            outs.append(torch.from_numpy(np.where(wide(active), out, np.nan)).float())
        return (torch.cat(outs),) * len(variant.branches)


def noises(rows):
    """(start, draws [rows, n, *shape]) of a request, as its rows number them."""
    of = [[normals(SHAPE, SEED, picture=j, draw=k) for j in range(PICTURES)] for k in range(rows + 1)]
    return np.array(of[0], np.float64), np.array(of[1:], np.float64)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_session_moves_each_token_like_a_run_of_its_own(solver, backend, monkeypatch):
    monkeypatch.setenv("VIVACE_BACKEND", backend)
    options, second, depth, form = SOLVERS[solver]
    plan = plan_of(solver, **options)
    made = apply_tokens(plan, 0.5, selector="random", first=2, last=1, ages=2)
    toy = Oracle(plan)
    result = session(made, toy=toy, shape=SHAPE, probed=False)("red", n=PICTURES, seed=SEED)
    active = np.array(toy.active[-ROWS * PICTURES :]).reshape(ROWS, PICTURES, TOKENS)
    assert (active.sum(axis=2) == [[TOKENS]] * 2 + [[TOKENS // 2]] * (ROWS - 3) + [[TOKENS]]).all()
    assert not np.array_equal(active[:, 0], active[:, 1])
    noise, draws = noises(ROWS)
    want = alone(solver, options, second, depth, form, active, 2, noise, draws, toy.mixture)[-1]
    np.testing.assert_allclose(result.latents.numpy(), want, rtol=1e-3, atol=1e-3)
    assert result.computed.tolist() == active.sum(axis=0).reshape(PICTURES, *GRID).tolist()


def test_requests_with_and_without_ages_share_a_launch_and_keep_their_bits():
    """Rows by class beside plain ones, two gaps beside four, reductions before some of them."""
    plans = [plan_of(solver) for solver in ("dpmpp_2m", "ddim", "unipc", "dpmpp_2m")]
    guided = [apply_guidance(plan, 2.0, rescale=0.5 if k == 3 else 0.0) for k, plan in enumerate(plans)]
    some = {"selector": "random", "first": 3}
    made = [apply_tokens(plan, 0.5, ages=4 if k == 2 else 2, **some) for k, plan in enumerate(guided)]
    toy = Oracle(plans[0])
    one = session(*made, toy=toy, shape=SHAPE, probed=False)
    requests = [Request("red", seed=k, n=1 + k % 2, plan=plan) for k, plan in enumerate(made)]
    together = [one.begin(request) for request in requests]
    while not all(state.done for state in together):
        toy.active.clear()
        one.step(together)
        assert len(toy.active) == sum(request.n for request in requests)
    mixed = [one.finish(state).latents for state in together]
    for request, latents in zip(requests, mixed, strict=True):
        state = one.begin(request)
        while not state.done:
            one.step([state])
        assert torch.equal(one.finish(state).latents, latents)


def test_one_plan_again_binds_one_launch_and_reads_the_classes_of_its_row():
    """After the first run nothing is bound anew, and the second one has the bits of the first."""
    made = apply_tokens(plan_of("dpmpp_2m"), 0.5, selector="random", first=2)
    one = session(made, toy=Oracle(plan_of("dpmpp_2m")), shape=SHAPE, probed=False)
    first = one("red", n=PICTURES, seed=SEED)
    assert torch.equal(one("red", n=PICTURES, seed=SEED).latents, first.latents)
    assert not torch.equal(one("red", n=PICTURES, seed=SEED + 1).latents, first.latents)


def test_flow_predictions_and_the_steps_of_two_evaluations_stay_together():
    """A step of two evaluations computes the same tokens in both, and has no ages."""
    plan = plan_of("flow_heun", schedule=FLOW, prediction="flow")
    made = apply_tokens(plan, 0.5, selector="random", first=4)
    toy = Oracle(plan, "flow")
    session(made, toy=toy, shape=SHAPE, probed=False)("red", seed=SEED)
    rows = np.array(toy.active[-len(plan.steps) :])[:, 0]
    starts = [i for i, step in enumerate(plan.steps) if step.x == "x"]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        assert (rows[start:end] == rows[start]).all()
    assert made.steps[5].ops == plan.steps[5].ops
