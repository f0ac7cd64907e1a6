"""BDIA, inversion of DDIM and BDIA, and the way back, against loops written from the papers."""

import numpy as np
import pytest
import torch

import vivace
from tests.engine.plans import edit, plan_of
from tests.engine.toy import SHAPE, Toy, session
from vivace import NoiseSchedule, passes
from vivace.bench.oracle import Gaussian, Mixture, denoiser_for, prediction_of
from vivace.engine.plan import Affine, Step, Transform
from vivace.engine.stepper import Stepper
from vivace.errors import ArgumentError, PlanError, UnsupportedError

VP, EDM, FLOW = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000)), NoiseSchedule.edm(), NoiseSchedule.flow()
KINDS = {"eps": VP, "x0": EDM, "v": VP, "flow": FLOW}
DATA = Mixture.seven()
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


def plan_for(prediction, solver="bdia", steps=12, **options):
    return vivace.make_plan(KINDS[prediction], solver, steps, prediction=prediction, **options)


def noise(dtype=torch.float64, n=16, seed=0):
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def levels(plan):
    """(alpha, sigma) of every row, and of the result."""
    return [(step.alpha, step.sigma) for step in plan.steps] + [(1.0, 0.0)]


def ddim(x, x0, start, end):
    """alpha' x0 + sigma' eps with eps = (x - alpha x0) / sigma (Song et al. 2020, eq. 12)."""
    return end[0] * x0 + end[1] * (x - start[0] * x0) / start[1]


def bdia_loop(plan, start, gamma):
    """Zhang et al. 2023: z <- gamma z_before + DDIM(forward) - gamma DDIM(back); the trajectory."""
    level, states = levels(plan), [start]
    for i in range(len(level) - 1):
        x = states[-1]
        x0 = DATA.x0(x, *level[i])
        ahead = ddim(x, x0, level[i], level[i + 1])
        if i:
            ahead = gamma * states[-2] + ahead - gamma * ddim(x, x0, level[i], level[i - 1])
        states.append(ahead)
    return states


# --- BDIA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_bdia_is_the_papers_rule(prediction, gamma):
    plan, slots = plan_for(prediction, gamma=gamma), {}
    x = vivace.sample(denoiser_for(DATA, plan), plan, noise(), slots=slots)
    states = bdia_loop(plan, plan.init[0].terms[0][1] * noise(), gamma)
    for got, want in ((x, states[-1]), (slots["before"], states[-2])):
        assert (got - want).abs().max() <= 1e-10 * max(1.0, float(states[0].abs().max()))


@pytest.mark.parametrize("prediction", KINDS)
def test_bdia_with_gamma_zero_has_the_rows_of_ddim(prediction):
    zero, base = plan_for(prediction, gamma=0.0), plan_for(prediction, "ddim")
    assert zero.steps == base.steps and zero.results == base.results == ("x",)


def test_bdia_of_one_step_is_ddim():
    assert plan_for("eps", steps=1).steps == plan_for("eps", "ddim", 1).steps


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan"), "1", True])
def test_bad_gamma_is_named(gamma):
    with pytest.raises(ArgumentError, match="bdia: gamma"):
        plan_for("eps", gamma=gamma)


def test_bdia_rows_are_one_pass_over_memory():
    plan = plan_for("eps").bind(vivace.ModelSpec("toy", "0" * 64, "eps", SHAPE, 4, (4, 4)))
    from vivace.engine.lower import Given, lower_plan

    lowered = lower_plan(plan, Given({}))
    assert all(last - first == 1 for first, last in lowered.spans)


# --- results ---------------------------------------------------------------------------------------------------------
def test_results_are_kept_in_files_and_left_out_when_there_is_one(tmp_path):
    plan = plan_for("eps")
    plan.save(tmp_path / "plan.json")
    assert vivace.Plan.load(tmp_path / "plan.json") == plan and plan.results == ("x", "before")
    plan_for("eps", "ddim").save(tmp_path / "ddim.json")
    assert "results" not in (tmp_path / "ddim.json").read_text()


@pytest.mark.parametrize("results", [(), ("before",), ("x", "x"), ("x", "nothing")])
def test_results_name_filled_slots_x_first(results):
    from dataclasses import replace

    with pytest.raises(PlanError, match="results"):
        vivace.verify(replace(plan_for("eps"), results=results))


# --- exact inversion -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("prediction", KINDS)
def test_a_run_of_bdia_is_taken_back_to_its_noise(prediction, dtype):
    plan, given, slots, back = plan_for(prediction, steps=20), noise(dtype), {}, {}
    denoiser = denoiser_for(DATA, plan)
    x = vivace.sample(denoiser, plan, given, slots=slots)
    inverse = passes.invert(plan, start="pair")
    assert inverse.nfe == plan.nfe - 1
    start = vivace.sample(denoiser, inverse, given, inputs={"start": x, "before": slots["before"]}, slots=back)
    scale = plan.init[0].terms[0][1]
    assert (start / scale - given).abs().max() < ROUNDING[dtype]
    if scale == 1.0 or dtype == torch.float64:  # EDM's rounding is that of states as large as its first sigma
        again = vivace.sample(denoiser, passes.retrace(plan), given, inputs={"start": start, **back})
        assert (again - x).abs().max() < ROUNDING[dtype] * scale


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("prediction", KINDS)
def test_any_picture_comes_back(prediction, dtype):
    plan, pair, slots = plan_for(prediction), {}, {}
    denoiser, picture = denoiser_for(DATA, plan), 0.7 * noise(dtype, seed=3)
    inverse = passes.invert(plan)
    state = vivace.sample(denoiser, inverse, picture, inputs={"start": picture}, slots=pair)
    assert inverse.nfe == plan.nfe
    there = vivace.sample(denoiser, passes.retrace(plan), picture, inputs={"start": state, **pair}, slots=slots)
    assert (there - picture).abs().max() < ROUNDING[dtype] * plan.init[0].terms[0][1]


def test_inversion_of_bdia_is_the_papers_rule():
    """z_before = (z_after - DDIM(forward)) / gamma + DDIM(back)."""
    gamma, plan = 0.8, plan_for("eps", gamma=0.8)
    level, found = levels(plan), bdia_loop(plan, noise(seed=5), 0.8)
    after, x = found[-1], found[-2]
    for i in range(len(level) - 2, 0, -1):
        x0 = DATA.x0(x, *level[i])
        forward, back = ddim(x, x0, level[i], level[i + 1]), ddim(x, x0, level[i], level[i - 1])
        after, x = x, (after - forward) / gamma + back
    given, slots = {"start": found[-1], "before": found[-2]}, {}
    inverse = passes.invert(plan, start="pair")
    got = vivace.sample(denoiser_for(DATA, plan), inverse, noise(), inputs=given, slots=slots)
    assert (got - x).abs().max() <= 1e-10 and (slots["before"] - after).abs().max() <= 1e-10


# --- DDIM ------------------------------------------------------------------------------------------------------------
def ddim_inversion(plan, picture, evaluations):
    """Mokady et al. 2022 and, with more than one evaluation, Pan et al. 2023, on eps."""
    level, x = levels(plan), picture
    for i in range(len(level) - 2, -1, -1):
        (a, s), (b, r) = level[i], level[i + 1]
        estimate = x
        for _ in range(evaluations):
            eps = prediction_of(DATA, "eps", estimate, a, s)
            estimate = a * (x - r * eps) / b + s * eps
        x = estimate
    return x


@pytest.mark.parametrize("evaluations", [1, 3])
def test_inversion_of_ddim_is_the_papers_loop(evaluations):
    plan, picture = plan_for("eps", "ddim"), noise(seed=1)
    inverse = passes.invert(plan, evaluations=evaluations)
    got = vivace.sample(denoiser_for(DATA, plan), inverse, picture, inputs={"start": picture})
    assert inverse.nfe == evaluations * plan.nfe and inverse.results == ("x",)
    assert (got - ddim_inversion(plan, picture, evaluations)).abs().max() <= 1e-10


@pytest.mark.parametrize("prediction", KINDS)
def test_more_evaluations_bring_the_picture_of_ddim_back(prediction):
    plan, data = plan_for(prediction, "ddim", 40, grid="logsnr"), Gaussian.narrow(2)
    denoiser, picture, errors = denoiser_for(data, plan), data.mean + 0.5 * noise(seed=2), []
    for evaluations in (1, 3, 12):
        inverse = passes.invert(plan, evaluations=evaluations)
        state = vivace.sample(denoiser, inverse, picture, inputs={"start": picture})
        back = vivace.sample(denoiser, passes.retrace(plan), picture, inputs={"start": state})
        errors.append(float((back - picture).abs().max()))
    assert errors[0] > 5.0 * errors[1] > 100.0 * errors[2]


def test_an_inversion_of_a_tail_goes_as_far_as_the_tail():
    plan = passes.invert(plan_for("eps", "ddim", 10)).tail(0.4)
    assert plan == passes.invert(plan_for("eps", "ddim", 10).tail(0.4)) and plan.nfe == 4
    assert plan.init[0].terms == (("input:start", 1.0),)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.25, 0.75), (0.8, 1.0)])
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_a_tail_guides_the_rows_that_the_whole_inversion_guides(strength, interval):
    full = passes.apply_guidance(passes.invert(plan_for("eps", "ddim")), 2.0, interval=interval)
    told = {step.timestep: step.branches for step in full.steps}
    tail = full.tail(strength)
    assert len(tail.steps) < len(full.steps) and tail.steps[0].timestep == full.steps[0].timestep
    assert all(step.branches == told[step.timestep] for step in tail.steps)


def test_recipes_remember_inversion_and_make_it_again():
    plan = passes.invert(passes.apply_guidance(plan_for("v"), 3.0), start="pair")
    assert plan.again() == plan and plan.again(steps=7).nfe == 6
    assert [name for name, _ in plan.recipe.passes] == ["apply_guidance", "invert"]
    back = passes.retrace(passes.apply_guidance(plan_for("v"), 3.0))
    assert back.again() == back


# --- guidance, sessions, executors -----------------------------------------------------------------------------------
def test_guided_rows_are_taken_back_with_their_guidance():
    toy = Toy("v")
    plan = passes.apply_guidance(vivace.make_plan(VP, "bdia", 8, prediction="v"), 3.0, interval=(0.0, 0.5))
    run = session(plan, toy=toy)
    done = run("abc", seed=4)
    back = run("abc", plan=passes.invert(plan, start="pair"), inputs={"start": done.latents, **done.slots})
    start = run("abc", seed=4, latents=None).latents
    assert torch.equal(start, done.latents)
    first = torch.from_numpy(vivace.engine.noise.normals(SHAPE, 4))
    assert (back.latents[0] - first).abs().max() < 1e-5
    assert back.receipt.branch_evals == 7 + 3  # rows 1 to 3 of 8 are guided


def test_pictures_are_inverted_in_sessions_and_receipts_say_so():
    plan = vivace.make_plan(VP, "bdia", 8, prediction="v")
    run, picture = session(plan), torch.zeros(SHAPE)
    state = run(plan=passes.invert(plan), image=picture, n=2)
    back = run(plan=passes.retrace(plan), inputs={"start": state.latents, **state.slots}, n=2)
    assert (back.latents - picture).abs().max() < 1e-5
    assert "exact to rounding" in str(state.receipt) and "retraced" in back.receipt.to_dict()["details"]
    ddim = vivace.make_plan(VP, "ddim", 8, prediction="v")
    told = run(plan=passes.invert(ddim, evaluations=2), image=picture).receipt.details["inverted"]
    assert told == "8 steps from a picture, estimated (2 evaluations each)"


def test_a_stepper_goes_back_as_a_session_does():
    toy, plan = Toy("v"), vivace.make_plan(VP, "bdia", 6, prediction="v")
    run = session(plan, toy=toy)
    picture = 0.1 * torch.ones(1, *SHAPE)
    inverse = passes.invert(plan)
    want = run("abc", plan=inverse, image=picture[0])
    stepper = Stepper(inverse, picture, {}, lambda: picture)
    x = stepper.start(picture)
    while not stepper.done:
        x = stepper.advance(toy.evaluate(x, (stepper.step.timestep,), (3.0,), stepper.step.variant))
    assert torch.equal(x, want.latents) and torch.equal(stepper.results["before"], want.slots["before"])


def test_a_stepper_starts_from_the_pair_or_not_at_all():
    toy, plan = Toy("v"), vivace.make_plan(VP, "bdia", 6, prediction="v")
    run = session(plan, toy=toy)
    made, inverse = run("abc", seed=1), passes.invert(plan, start="pair")
    want = run("abc", plan=inverse, inputs={"start": made.latents, **made.slots})
    stepper = Stepper(inverse, made.latents, {}, lambda: made.latents)
    with pytest.raises(UnsupportedError, match="slot 'before'"):
        stepper.start(made.slots["before"])
    x = stepper.start(made.slots["before"], {"before": made.latents})
    while not stepper.done:
        x = stepper.advance(toy.evaluate(x, (stepper.step.timestep,), (3.0,), stepper.step.variant))
    assert torch.equal(x, want.latents)


def test_pictures_of_one_number_are_inverted_like_columns():
    plan, x = passes.invert(plan_for("eps", "ddim")), torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    want = vivace.sample(lambda x, t: torch.tanh(x), plan, x[:, None], inputs={"start": x[:, None]})
    for seed in (0, [1, 2, 3, 4, 5]):
        made = vivace.sample(lambda x, t: torch.tanh(x), plan, x, seed=seed, inputs={"start": x})
        assert torch.equal(made, want[:, 0])


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (lambda: plan_for("eps", "dpmpp_2m"), "reads 'm0'"),
        (lambda: plan_for("eps", "ddim", eta=0.5), "reads 'noise:1'"),
        (lambda: plan_for("x0", "heun"), "stage"),
        (lambda: passes.invert(plan_for("eps")), "goes to more noise"),
        (lambda: passes.apply_mask(plan_for("eps", "ddim")), "taken back|no number|reads"),
        (lambda: edit(plan_for("eps", "ddim"), 3, variant=None, ops=(Affine("x", (("x", 1.0),)),)), "no evaluation"),
        (
            lambda: plan_of(Step(1.0, 0.5, 0.5, (Affine("x", (("out", 1.0),)), Transform("clamp", "x", (), CLAMP)))),
            "clamp of 'x'",
        ),
        (lambda: passes.apply_adaptive_guidance(passes.apply_guidance(plan_for("eps", "ddim"), 2.0)), "has a guard"),
        (lambda: plan_of(Step(1.0, 0.5, 0.5, (Affine("x", (("out", 1.0),)),))), "does not show"),
    ],
)
def test_rows_that_cannot_be_taken_back_are_named(plan, why):
    with pytest.raises(PlanError, match=why):
        passes.invert(plan())


CLAMP = (("low", -1.0), ("high", 1.0))


def test_bad_arguments_are_named():
    plan = plan_for("eps")
    with pytest.raises(ArgumentError, match="invert: start"):
        passes.invert(plan, start="noise")
    for evaluations in (0, 1.0, True, 101):
        with pytest.raises(ArgumentError, match="invert: evaluations"):
            passes.invert(plan, evaluations=evaluations)
    with pytest.raises(PlanError, match="use 'picture'"):
        passes.invert(plan_for("eps", "ddim"), start="pair")


def test_a_run_without_its_pair_is_refused_before_any_work():
    plan = vivace.make_plan(VP, "bdia", 8, prediction="v")
    with pytest.raises(ArgumentError, match="needs input 'before'"):
        session(plan)(plan=passes.invert(plan, start="pair"), image=torch.zeros(SHAPE))
