"""The analytical first step: what it says, where it is exact, how it goes with other passes, and refusals."""

import numpy as np
import pytest
import torch

from vivace.bench import oracle
from vivace.engine.interchange.replay import replay
from vivace.engine.lower import Given, lower_plan
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_afs, apply_block_cache, apply_guidance, apply_restart, apply_tokens
from vivace.engine.plan import AgeRef, Plan, coefs
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.02, 20.0)
FLOW = NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(8, 2)))
CASES = [(VP, "eps"), (VP, "x0"), (VP, "v"), (EDM, "x0"), (EDM, "eps"), (FLOW, "flow"), (FLOW, "v")]


def test_it_is_a_run_whose_first_evaluation_answers_eps_of_x_over_sigma():
    """DDIM on VP and Euler in EDM, by hand: the first step with eps = x / sigma, x0 = 0."""
    for schedule, prediction in ((VP, "v"), (EDM, "x0")):
        plan = apply_afs(make_plan(schedule, "ddim", 7, prediction=prediction))
        assert plan.nfe == 6
        levels = [*((step.alpha, step.sigma) for step in plan.steps), (1.0, 0.0)]
        x = NOISE * (levels[0][1] if schedule is EDM else 1.0)
        for i, ((alpha, sigma), (alpha_end, sigma_end)) in enumerate(zip(levels, levels[1:], strict=False)):
            x0 = torch.zeros_like(x) if i == 0 else SEVEN.x0(x, alpha, sigma)
            eps = (x - alpha * x0) / sigma
            x = alpha_end * x0 + sigma_end * eps
        assert float((sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE) - x).abs().max()) < 1e-12


@pytest.mark.parametrize("solver", "ddim heun dpmpp_2m dpmpp_3m unipc deis ipndm ghvb gradient_estimation".split())
@pytest.mark.parametrize(("schedule", "prediction"), CASES)
def test_it_is_exact_for_data_of_that_variance(schedule, prediction, solver):
    """Normal data of mean 0 and variance v: the network would have said the same."""
    data = oracle.Gaussian(torch.zeros(2).double(), torch.full((2,), 0.6, dtype=torch.float64))
    plan = make_plan(schedule, solver, 7, prediction=prediction)
    made = apply_afs(plan, 0.6)
    assert made.nfe == plan.nfe - 1
    results = [sample(oracle.denoiser_for(data, p), p, NOISE) for p in (plan, made)]
    assert float((results[0] - results[1]).abs().max()) < 1e-11


def test_every_branch_says_the_same_and_guidance_goes_before_or_behind():
    plan = make_plan(VP, "dpmpp_2m", 8, prediction="v")
    before, behind = apply_afs(apply_guidance(plan, 4.0)), apply_guidance(apply_afs(plan), 4.0)
    assert before.branch_evals == behind.branch_evals == 14

    def answer(x, t, branch):
        return x * 0.3 if branch == "cond" else x * 0.1

    results = [sample(answer, p, NOISE) for p in (before, behind)]
    assert float((results[0] - results[1]).abs().max()) < 1e-13
    rows = lower_plan(before, Given({}))
    assert len(rows.launches(rows.spans[0])) == 1


def test_a_tail_below_the_noise_end_has_no_first_step_to_replace():
    plan = apply_block_cache(apply_afs(make_plan(VP, "dpmpp_2m", 10, prediction="v")), "fora", interval=3)
    tail = plan.tail(0.5)
    assert tail.nfe == 5 and tail.steps[0].variant is not None
    assert plan.tail(1.0).nfe == 9


def test_plans_survive_files_and_other_step_counts(tmp_path):
    plan = apply_guidance(apply_afs(make_plan(VP, "unipc", 10, prediction="v"), 0.25), 4.0)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert replay(make_plan(VP, "unipc", 10, prediction="v"), plan.recipe.passes).steps == plan.steps
    assert plan.again(steps=6).nfe == 5


def test_it_goes_with_restarts_and_token_rows():
    plan = apply_afs(apply_restart(make_plan(VP, "ddim", 8, prediction="v"), [(3, 1, 0.3, 1.0)]))
    assert plan.nfe == 7 + 2
    tokens = apply_tokens(apply_afs(make_plan(VP, "dpmpp_3m", 12, prediction="v")), 0.5, first=1)
    assert any(isinstance(coef, AgeRef) for op in tokens.ops() for coef in coefs(op))


@pytest.mark.parametrize("variance", [-0.1, "1", float("inf")])
def test_wrong_arguments_are_one_clear_line(variance):
    with pytest.raises(ArgumentError, match="apply_afs: variance must be a number >= 0"):
        apply_afs(make_plan(VP, "ddim", 5), variance)


def test_what_it_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="the plan has one evaluation"):
        apply_afs(make_plan(VP, "ddim", 1))
    with pytest.raises(PlanError, match="begins with a row without evaluation"):
        apply_afs(apply_afs(make_plan(VP, "ddim", 5)))
    with pytest.raises(PlanError, match="this pass comes before caches and guards"):
        apply_afs(apply_block_cache(make_plan(VP, "ddim", 10), "fora", interval=3))
