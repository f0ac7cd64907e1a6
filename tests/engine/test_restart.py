"""Restart: against the paper's loop with the same draws, evaluations as published, history, moments, and refusals."""

import math

import numpy as np
import pytest
import torch

from tests.engine.interpreter import Gaussian, run_plan
from vivace.bench import oracle
from vivace.engine.interchange.replay import replay
from vivace.engine.noise import normals
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import (
    apply_block_cache,
    apply_guidance,
    apply_mask,
    apply_momentum,
    apply_restart,
    apply_tokens,
)
from vivace.engine.plan import Plan, reads, writes
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm()
FLOW = NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(8, 2)))
LEVELS = [(3, 2, 0.06, 0.30)]


def karras(high, low, nodes):
    roots = np.linspace(high ** (1 / 7), low ** (1 / 7), nodes)
    return [float(root**7) for root in roots]


def heun(x, sigmas):
    """Heun's method of EDM down a list of sigmas."""
    for sigma, end in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - SEVEN.x0(x, 1.0, sigma)) / sigma
        stepped = x + (end - sigma) * slope
        if end:
            stepped = x + (end - sigma) * (slope + (stepped - SEVEN.x0(stepped, 1.0, end)) / end) / 2
        x = stepped
    return x


@pytest.mark.parametrize("s_noise", [1.0, 1.003])
@pytest.mark.parametrize("levels", [LEVELS, [(4, 1, 1.0, 3.0), (3, 3, 0.1, 0.3)]])
def test_it_is_the_loop_of_the_paper(levels, s_noise):
    """Algorithm 1 on EDM: down to t_min, then K times up by fresh noise and down again, then the rest."""
    plan = apply_restart(make_plan(EDM, "heun", 18, prediction="x0"), levels, s_noise=s_noise)
    got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE, seed=4)
    sigmas = [*karras(80.0, 0.002, 18), 0.0]
    drawn = 0

    def fresh():
        nonlocal drawn
        drawn += 1
        return torch.as_tensor(np.stack([normals((2,), 4, picture=j, draw=drawn) for j in range(len(NOISE))])).double()

    x, at = sigmas[0] * NOISE, 0
    for nodes, times, t_min, t_max in levels:
        stop = int(np.abs(np.array(sigmas[:-1]) - t_min).argmin())
        x, at = heun(x, sigmas[at : stop + 1]), stop
        for _ in range(times):
            x = x + s_noise * math.sqrt(t_max**2 - sigmas[stop] ** 2) * fresh()
            x = heun(x, karras(t_max, sigmas[stop], nodes))
    want = heun(x, sigmas[at:])
    assert float((got - want).abs().max()) < 1e-9


def test_it_is_the_loop_on_other_schedules_and_solvers():
    """DDIM on VP with k = alpha_max / alpha_min; rows between as those of a plan on these levels."""
    plan = apply_restart(make_plan(VP, "ddim", 10, prediction="v"), [(4, 2, 0.5, 2.0)])
    got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE, seed=4)
    main = [(step.alpha, step.sigma) for step in make_plan(VP, "ddim", 10, prediction="v").steps] + [(1.0, 0.0)]

    def down(x, levels):
        for (alpha, sigma), (alpha_end, sigma_end) in zip(levels, levels[1:], strict=False):
            x0 = SEVEN.x0(x, alpha, sigma)
            x = alpha_end * x0 + sigma_end * (x - alpha * x0) / sigma
        return x

    stop = int(np.abs(np.array([s / a for a, s in main[:-1]]) - 0.5).argmin())
    rhos = karras(2.0, main[stop][1] / main[stop][0], 4)
    between = [(1 / math.hypot(1, rho), rho / math.hypot(1, rho)) for rho in rhos]
    x = down(NOISE, main[: stop + 1])
    for k in (1, 2):
        z = torch.as_tensor(np.stack([normals((2,), 4, picture=j, draw=k) for j in range(len(NOISE))])).double()
        ratio = between[0][0] / main[stop][0]
        x = down(ratio * x + math.sqrt(between[0][1] ** 2 - (ratio * main[stop][1]) ** 2) * z, between)
    assert float((got - down(x, main[stop:])).abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("steps", "level", "nfe"),
    [
        (18, (3, 2, 0.06, 0.30), 43),
        (18, (3, 5, 0.06, 0.30), 55),
        (18, (3, 10, 0.06, 0.30), 75),
        (18, (3, 20, 0.06, 0.30), 115),
        (20, (9, 30, 0.06, 0.20), 519),
        (18, (3, 2, 0.14, 0.30), 43),
    ],
)
def test_published_settings_have_their_published_evaluations(steps, level, nfe):
    assert (
        apply_restart(make_plan(EDM, "heun", steps), [level]).nfe
        == nfe
        == 2 * steps - 1 + level[1] * 2 * (level[0] - 1)
    )


@pytest.mark.parametrize("solver", "ddim dpmpp_2m dpmpp_3m unipc deis lms ipndm ghvb gradient_estimation".split())
def test_history_begins_anew_behind_every_jump(solver):
    """Between two jumps no slot is read that was not written there, but x; evaluations are counted."""
    plan = apply_restart(make_plan(VP, solver, 10, prediction="v"), [(4, 2, 0.2, 1.0), (3, 1, 1.5, 4.0)])
    assert plan.nfe == 10 + 2 * 3 + 1 * 2
    jumps = [i for i, step in enumerate(plan.steps) if step.variant is None]
    assert len(jumps) == 3 and all(plan.steps[i + 1].restart for i in jumps)
    for first, last in zip([0, *jumps], [*jumps, len(plan.steps)], strict=True):
        written = {"x"}
        for step in plan.steps[first:last]:
            written |= set(step.outs)
            for op in step.ops:
                assert {slot for slot in reads(op) if not slot.startswith("noise:")} <= written
                written.add(writes(op))
    draws = [slot for op in plan.ops() for slot in reads(op) if slot.startswith("noise:")]
    assert draws == [f"noise:{k}" for k in range(4)]
    between = plan.steps[jumps[1] + 2].ops[-1].terms
    assert len(between) == (2 if solver == "ddim" else 3), "orders rise between the levels, the last step included"
    assert bool(torch.isfinite(sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE, seed=2)).all())


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2s", "unipc", "pndm"])
def test_no_repetition_is_the_plan(solver):
    plan = make_plan(VP, solver, 8, prediction="v")
    assert apply_restart(plan, []).steps == plan.steps
    assert apply_restart(plan, [(3, 0, 0.1, 1.0)]).steps == plan.steps


def test_rows_before_the_first_level_stay_and_singlestep_rows_behind_the_last_too():
    plan = make_plan(VP, "heun", 8, prediction="v")
    made = apply_restart(plan, [(3, 1, 1.0, 2.0)])
    jump = next(i for i, step in enumerate(made.steps) if step.variant is None)
    assert made.steps[:jump] == plan.steps[:jump]
    assert made.steps[jump + 5 :] == plan.steps[jump:] and len(plan.steps) > jump + 1


def test_draws_of_stochastic_solvers_are_all_different():
    plan = apply_restart(make_plan(VP, "euler_ancestral", 8, prediction="v"), [(3, 2, 0.5, 1.0)])
    draws = [slot for op in plan.ops() for slot in reads(op) if slot.startswith("noise:")]
    assert len(set(draws)) == len(draws) == 1 + 7 + 2 * (1 + 2)


DATA = Gaussian(np.array([0.4, -1.1]), np.sqrt(np.array([0.3, 1.5])))


def moments(plan):
    """Mean and variance [2] of the result: a linear denoiser makes it affine in the draws."""
    draws = sorted({int(s[6:]) for op in plan.ops() for s in reads(op) if s.startswith("noise:")})
    place = {k: n + 1 for n, k in enumerate(draws)}

    def one_hot(k):
        value = np.zeros((len(draws) + 1, 2))
        value[place[k]] = 1.0
        return value

    out = run_plan(plan, DATA.denoiser(plan), one_hot(0), draw=one_hot)
    return out[0], ((out[1:] - out[0]) ** 2).sum(0)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "ddim"])
def test_samples_have_the_mean_and_variance_of_the_data(solver):
    errors = []
    schedule = NoiseSchedule.edm(0.02, 50.0)
    for steps in (20, 80):
        level = (steps // 4 + 2, 3, 0.2, 2.0)
        plan = apply_restart(make_plan(schedule, solver, steps, prediction="x0", grid="logsnr"), [level])
        mean, variance = moments(plan)
        errors.append(max(np.abs(mean - DATA.mean).max(), np.abs(variance / DATA.std**2 - 1.0).max()))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.07
    plan = apply_restart(make_plan(schedule, solver, 10, prediction="x0"), [(4, 2, 0.2, 2.0)])
    mean, variance = moments(plan)
    data = oracle.Gaussian(torch.as_tensor(DATA.mean), torch.as_tensor(DATA.std**2))
    noise = torch.from_numpy(np.random.default_rng(7).normal(size=(1, 20_000, 2)))
    unit = (sample(oracle.denoiser_for(data, plan), plan, noise, seed=11)[0].numpy() - mean) / np.sqrt(variance)
    bound = 4.5 / math.sqrt(20_000)
    assert np.abs(unit.mean(0)).max() < bound
    assert np.abs((unit**2).mean(0) - 1.0).max() < bound * math.sqrt(2.0)


def test_every_repetition_contracts_what_went_wrong_before():
    """Of a Gaussian a deviation at t_min shrinks by sqrt((v + t_min^2) / (v + t_max^2)) each time."""
    one = oracle.Gaussian(torch.zeros(2).double(), torch.full((2,), 0.5).double())
    gaps = []
    for times in (0, 1, 2):
        plan = apply_restart(make_plan(EDM, "heun", 40, prediction="x0"), [(40, times, 0.3, 2.0)])
        runs = [sample(oracle.denoiser_for(one, plan), plan, NOISE + shift, seed=3) for shift in (0.0, 0.01)]
        gaps.append(float((runs[1] - runs[0]).abs().max()))
        row = min((step.sigma for step in make_plan(EDM, "heun", 40).steps), key=lambda s: abs(s - 0.3))
    want = math.sqrt((0.5 + row**2) / (0.5 + 4.0))
    assert gaps[1] / gaps[0] == pytest.approx(want, rel=0.01) and gaps[2] / gaps[1] == pytest.approx(want, rel=0.01)


def test_guidance_before_or_behind_gives_the_same_rows():
    plan = make_plan(VP, "dpmpp_2m", 8, prediction="v")
    one = apply_restart(apply_guidance(plan, 4.0), [(3, 1, 0.3, 1.0)])
    assert one.steps == apply_guidance(apply_restart(plan, [(3, 1, 0.3, 1.0)]), 4.0).steps
    partly = apply_guidance(apply_restart(plan, [(3, 1, 0.3, 1.0)]), 4.0, interval=(0.2, 0.8))
    assert partly.branch_evals == 10 + (8 - 2)


def test_plans_survive_files_and_other_step_counts(tmp_path):
    plan = apply_momentum(apply_restart(make_plan(VP, "dpmpp_2m", 10, prediction="v"), [(3, 2, 0.3, 1.0)]), 0.9)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert replay(make_plan(VP, "dpmpp_2m", 10, prediction="v"), plan.recipe.passes).steps == plan.steps
    assert plan.again(steps=16).nfe == 16 + 4


def test_tails_keep_the_levels_behind_their_start_and_no_more_noise_than_it():
    plan = apply_restart(make_plan(VP, "ddim", 10, prediction="v"), [(3, 2, 0.3, 2.0), (3, 1, 3.0, 5.0)])
    tail = plan.tail(0.5)
    assert tail.nfe == 5 + 4
    low = plan.tail(0.3)
    start = low.steps[0].sigma / low.steps[0].alpha
    assert low.nfe == 3 + 4 and start < 2.0
    assert max(step.sigma / step.alpha for step in low.steps) == pytest.approx(start)
    cached = apply_block_cache(plan, "fora", interval=2).tail(0.5)
    assert cached.nfe == 9


def test_masks_hold_through_the_jumps():
    plan = apply_mask(apply_restart(make_plan(VP, "ddim", 8, prediction="v"), [(3, 2, 0.3, 1.0)]))
    start, mask = torch.full((8, 2), 0.25).double(), torch.tensor([0.0, 1.0]).double().expand(8, 2)
    got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE, inputs={"start": start, "mask": mask})
    assert bool((got[:, 0] == 0.25).all()) and not bool((got[:, 1] == 0.25).any())


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (3, "levels 3; a list of"),
        ([(3, 2, 0.06)], r"level \(3, 2, 0.06\); \(N, K, t_min, t_max\)"),
        ([(1, 2, 0.06, 0.3)], "whole N >= 2"),
        ([(3, 1.5, 0.06, 0.3)], "whole N >= 2 and K >= 0"),
        ([(3, 2, 0.3, 0.06)], "t_min < t_max"),
        ([(3, 2, "a", 0.3)], "level"),
        ([(3, 2, 0.06, 500.0)], "t_max 500 is not between"),
        ([(3, 2, 0.001, 0.0011)], "t_max 0.0011 is not between 0.23"),
    ],
)
def test_wrong_levels_are_one_clear_line(levels, message):
    with pytest.raises(ArgumentError, match=f"apply_restart: .*{message}"):
        apply_restart(make_plan(VP, "ddim", 15), levels)


def test_what_it_does_not_fit_is_refused():
    plan = make_plan(VP, "dpmpp_2m", 12, prediction="v")
    with pytest.raises(PlanError, match="needs a plan of make_plan"):
        apply_restart(Plan(plan.steps, "v", plan.init), LEVELS)
    with pytest.raises(PlanError, match="went through apply_momentum; this pass comes before it"):
        apply_restart(apply_momentum(plan), LEVELS)
    with pytest.raises(PlanError, match="went through apply_restart; this pass comes before it"):
        apply_restart(apply_restart(plan, LEVELS), LEVELS)
    with pytest.raises(PlanError, match="went through apply_guidance"):
        apply_restart(apply_guidance(plan, 4.0, interval=(0.0, 0.5)), LEVELS)
    with pytest.raises(PlanError, match="heun adds noise of its own"):
        apply_restart(make_plan(EDM, "heun", 12, s_churn=5.0), LEVELS)
    with pytest.raises(PlanError, match="lcm is of distilled models"):
        apply_restart(make_plan(VP, "lcm", 5, prediction="v"), LEVELS)
    with pytest.raises(PlanError, match="lagrange has orders, which is for the rows of its own grid"):
        apply_restart(make_plan(VP, "lagrange", 4, orders=[1, 2, 3, 1]), LEVELS)
    with pytest.raises(PlanError, match="step .* adds noise between evaluations"):
        apply_tokens(apply_restart(plan, [(3, 1, 0.3, 1.0)]), 0.5)
