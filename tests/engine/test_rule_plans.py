"""Plans of momentum, DualFast, restarts and analytical first steps in sessions: alone, together, from diffusers."""

import numpy as np
import pytest
import torch

from vivace.engine.calibrate.problem import Problem
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_afs, apply_dualfast, apply_experts, apply_guidance, apply_momentum, apply_restart
from vivace.engine.plan import Plan, Transform
from vivace.engine.planning import make_plan
from vivace.engine.request import Request
from vivace.engine.solvers.quadrature import lagrange_rows
from vivace.engine.solvers.rows import start_from_noise
from vivace.engine.timesteps import make_grid

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
SHAPE = (2, 4, 4)
CONFIG = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


def made(solver, steps=8, **options):
    return make_plan(VP, solver, steps, prediction="v", **options)


PLANS = {
    "restart": apply_restart(made("dpmpp_2m"), [(3, 2, 0.3, 1.0)]),
    "restart of Heun": apply_restart(made("heun", 5), [(3, 1, 0.5, 2.0)]),
    "afs": apply_afs(made("unipc")),
    "heavy ball": apply_momentum(made("dpmpp_2m")),
    "nesterov": apply_momentum(made("heun", 5), kind="nesterov"),
    "dualfast": apply_dualfast(made("dpmpp_2m"), form="eps"),
    "ghvb": made("ghvb", order=4),
    "gradient estimation": made("gradient_estimation", mu=0.3),
    "all": apply_momentum(
        apply_dualfast(apply_afs(apply_restart(made("dpmpp_2m"), [(3, 1, 0.3, 1.0)])), anchor="first"), 0.8
    ),
}


def answer(x, t, branch="cond"):
    """A prediction that bends, differs by branch and by time, and treats samples alike."""
    return torch.tanh(1.3 * x + (0.4 if branch == "cond" else -0.2)) * (0.5 + t.reshape(-1, 1, 1, 1) / 1000.0)


@pytest.fixture(scope="module")
def session():
    return Problem.of_callable(answer, VP, "v", SHAPE, guidance=4.0, dtype=torch.float32).session


def finished(session, *states):
    while any(not state.done for state in states):
        session.step([state for state in states if not state.done])
    return [session.finish(state).latents for state in states]


@pytest.mark.parametrize("name", list(PLANS))
def test_requests_at_different_rows_have_the_bits_they_have_alone(session, name):
    plan = apply_guidance(PLANS[name], 4.0)
    alone = [finished(session, session.begin(Request(plan=plan, seed=seed)))[0] for seed in (3, 4)]
    first = session.begin(Request(plan=plan, seed=3))
    for _ in range(2):
        session.step([first])
    together = finished(session, first, session.begin(Request(plan=plan, seed=4)))
    for one, other in zip(alone, together, strict=True):
        assert bool(torch.isfinite(one).all())
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", list(PLANS))
def test_receipts_count_what_was_evaluated(session, name):
    plan = apply_guidance(PLANS[name], 4.0)
    result = session(None, plan=plan, seed=3)
    assert result.receipt.to_dict()["nfe"] == plan.nfe == sum(step.variant is not None for step in plan.steps)


@pytest.mark.parametrize("name", list(PLANS))
def test_a_second_expert_takes_its_rows_whatever_the_rule(name):
    plan = apply_experts(apply_guidance(PLANS[name], 4.0), 300.0)
    assert {variant.model for variant in plan.variants} == {"main", "transformer_2"}


def test_plans_from_diffusers_take_momentum_dualfast_and_the_analytical_step(session):
    for extra in ({}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}):
        plan = Plan.from_diffusers(CONFIG | {"prediction_type": "v_prediction"} | extra, 8)
        for change in (apply_momentum, apply_dualfast, apply_afs):
            changed = change(plan)
            assert changed.steps != plan.steps and changed.tail(0.5).nfe == 4
            result = finished(session, session.begin(Request(plan=apply_guidance(changed, 2.0), seed=1)))[0]
            assert bool(torch.isfinite(result).all())


def test_a_changed_x0_kept_as_eps_is_eps():
    """A clamp on x0 between two conversions: what the slot holds is eps."""
    clamp = Transform("clamp", "m0", params=(("low", -1.0), ("high", 1.0)))
    rows = lagrange_rows(make_grid(VP, 8), "v", [2] * 8, form="eps", variable="rho", transform=clamp)
    plan = Plan(rows, "v", start_from_noise(1.0))
    own = apply_dualfast(plan, 0.2, form="eps")
    assert own.steps == apply_dualfast(plan, 0.2).steps != plan.steps
