"""Time alignment against a plain loop of its paper; what it leaves alone; its ratios, tables and recipes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.bench.oracle import Mixture, schedule_denoiser
from vivace.engine.bind import ModelSpec
from vivace.engine.calibrate.alignment import calibrate_time_alignment
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.walk import converged_states
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance, apply_time_alignment
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.timesteps import make_grid
from vivace.errors import ArgumentError, ModelError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
MIXTURE = Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(32, 2)))
RATIOS = [0.98, 0.9, 1.05, 0.93, 1.1, 1.02]
NETWORK = schedule_denoiser(MIXTURE, VP, "eps")  # reads its level from the timestep it is fed


def problem(seed=0):
    return Problem.of_callable(NETWORK, VP, "eps", (2,), seed=seed)


def level(t):
    return float(VP.alpha(t)), float(VP.sigma(t))


def eps_of(x, fed):
    alpha, sigma = level(fed)
    return (x - alpha * MIXTURE.x0(x, alpha, sigma)) / sigma


def ddim_step(x, eps, start, end):
    return end[0] / start[0] * (x - start[1] * eps) + end[1] * eps


def plan_of(solver="ddim", steps=6, **options):
    return make_plan(VP, solver, steps, prediction="eps", **options)


def test_only_the_time_told_changes():
    """DDIM: x' = step(x, eps(x, r t)) with the levels of t."""
    grid, x = make_grid(VP, 6), NOISE
    for i, ratio in enumerate(RATIOS):
        x = ddim_step(x, eps_of(x, ratio * grid.timesteps[i]), grid.level(i), grid.level(i + 1))
    got = sample(NETWORK, apply_time_alignment(plan_of(), ratios=RATIOS), NOISE)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["ddim", "unipc", "dpmpp_3m", "heun"])
def test_coefficients_and_levels_stay(solver):
    plan = plan_of(solver, 3)
    ratios = [0.9 + 0.02 * i for i in range(plan.nfe)]
    aligned = apply_time_alignment(plan, ratios=ratios)
    for one, two, ratio in zip(plan.steps, aligned.steps, ratios, strict=True):
        assert two == replace(one, timestep=ratio * one.timestep)
    neutral = apply_time_alignment(plan, ratios=[1.0] * plan.nfe)
    assert neutral.steps == plan.steps and neutral.init == plan.init


def test_with_guidance_before_or_after_the_plan_is_the_same():
    one = apply_time_alignment(apply_guidance(plan_of(), 3.0), ratios=RATIOS)
    two = apply_guidance(apply_time_alignment(plan_of(), ratios=RATIOS), 3.0)
    assert one.steps == two.steps


# ---------------------------------------------------------------- calibration
def test_each_ratio_is_the_best_for_its_own_step():
    """Against a search on a net of ratios, by a plain loop."""
    table = calibrate_time_alignment(problem(), steps=4, samples=24, evaluations=60, tries=40)
    ratios, grid = table.arrays["ratios"].tolist(), make_grid(VP, 4)
    levels = [grid.level(row + 1) for row in range(4)]
    targets = converged_states(problem(), levels, range(24), evaluations=60)
    x = problem().noise(range(24))
    for i in range(4):

        def loss(ratio, x=x, i=i):
            fed = min(max(ratio * grid.timesteps[i], 0.0), 999.0)
            step = ddim_step(x, eps_of(x, fed), grid.level(i), grid.level(i + 1))
            return float((step - targets[i]).square().mean())

        net = np.linspace(0.8, min(1.2, 999.0 / grid.timesteps[i]), 401)
        losses = [loss(ratio) for ratio in net]
        assert loss(ratios[i]) <= min(losses) * (1 + 1e-3) + 1e-12
        assert loss(ratios[i]) <= loss(1.0)
        x = ddim_step(x, eps_of(x, ratios[i] * grid.timesteps[i]), grid.level(i), grid.level(i + 1))


def test_the_published_objective_is_the_change_of_the_noise():
    table = calibrate_time_alignment(problem(), steps=4, samples=24, objective="prediction", tries=40)
    ratios, grid = table.arrays["ratios"].tolist(), make_grid(VP, 4)
    assert ratios[-1] == 1.0
    x = problem().noise(range(24))
    for i in range(3):
        before = eps_of(x, grid.timesteps[i])

        def loss(ratio, x=x, i=i, before=before):
            step = ddim_step(x, eps_of(x, ratio * grid.timesteps[i]), grid.level(i), grid.level(i + 1))
            return float((eps_of(step, grid.timesteps[i + 1]) - before).square().mean())

        net = np.linspace(0.8, min(1.2, 999.0 / grid.timesteps[i]), 201)
        assert loss(ratios[i]) <= min(loss(ratio) for ratio in net) * (1 + 1e-3) + 1e-12
        x = ddim_step(x, eps_of(x, ratios[i] * grid.timesteps[i]), grid.level(i), grid.level(i + 1))


def test_inner_stages_are_told_their_own_time():
    table = calibrate_time_alignment(problem(), solver="heun", steps=3, samples=8, evaluations=30)
    ratios = table.arrays["ratios"]
    assert ratios[0] == ratios[2] == 1.0 and (ratios[1::2] != 1.0).any()


def test_ratios_help_samples_that_were_not_measured():
    own, held = problem(), range(64, 128)
    table = calibrate_time_alignment(own, steps=5, samples=64, evaluations=80)
    want = own.run(own.plan("unipc", 300, grid="karras", order=3), held)
    plain = own.run(own.plan("ddim", 5), held)
    aligned = own.run(apply_time_alignment(own.plan("ddim", 5), table), held)
    assert (aligned - want).square().mean() < (plain - want).square().mean()


def test_the_table_is_the_same_each_time_and_goes_on_from_a_file(tmp_path):
    options = {"steps": 4, "samples": 6, "evaluations": 20, "tries": 8}
    one = calibrate_time_alignment(problem(), **options, resume=tmp_path / "work")
    again = calibrate_time_alignment(problem(), **options, resume=tmp_path / "work")
    assert again.hash == one.hash == calibrate_time_alignment(problem(), **options).hash


# ---------------------------------------------------------------- recipes and files
@pytest.fixture(scope="module")
def table():
    return calibrate_time_alignment(problem(), solver="unipc", steps=6, samples=8, evaluations=30, tries=8)


def test_a_plan_reads_back_and_is_made_again(table, tmp_path):
    path = tmp_path / "table.safetensors"
    table.save(path)
    for aligned in (
        apply_time_alignment(plan_of("unipc"), path),
        apply_time_alignment(plan_of("unipc"), ratios=RATIOS),
    ):
        aligned.save(tmp_path / "plan.json")
        back = Plan.load(tmp_path / "plan.json")
        assert back == aligned and back.hash == aligned.hash and back.again() == aligned
    with pytest.raises(ArgumentError, match="one an evaluation"):
        back.again(steps=8)


def test_a_tail_keeps_the_ratios_of_its_rows(table):
    for aligned, ratios in (
        (apply_time_alignment(plan_of("unipc"), table), table.arrays["ratios"]),
        (apply_time_alignment(plan_of("unipc"), ratios=RATIOS), RATIOS),
    ):
        tail = aligned.tail(0.5)
        plain = plan_of("unipc").tail(0.5)
        fed = [ratio * step.timestep for ratio, step in zip(ratios[3:], plain.steps, strict=True)]
        assert [step.timestep for step in tail.steps] == fed
        assert [step.ops for step in tail.steps] == [step.ops for step in plain.steps]
        assert tail.again() == tail
        guided = apply_guidance(aligned, 3.0).tail(0.5)
        assert [step.timestep for step in guided.steps] == fed


def test_a_table_is_of_one_model_one_method_and_one_plan(table):
    aligned = apply_time_alignment(plan_of("unipc"), table)
    with pytest.raises(ModelError, match="apply_time_alignment: measured on model callable"):
        aligned.bind(ModelSpec("other", "f" * 64, "eps", (2,), 1, ()))
    other = ModelSpec("other", "f" * 64, "eps", (2,), 1, ())
    with pytest.raises(ModelError, match="apply_time_alignment: measured on model callable"):
        apply_time_alignment(plan_of("unipc").bind(other), table)  # bound already
    with pytest.raises(ModelError, match="measured for 'time_alignment', not for 'iia'"):
        make_plan(VP, "iia", 6, table=table)
    with pytest.raises(ArgumentError, match="does not have the table's 6 evaluations and timesteps"):
        apply_time_alignment(plan_of("unipc", 8), table)
    with pytest.raises(ArgumentError, match="timesteps; make it with solver='unipc', steps=6"):
        apply_time_alignment(plan_of("unipc", grid="karras"), table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a table, or ratios"),
        ({"ratios": [1.0] * 5}, "a list of 6"),
        ({"ratios": 1.0}, "a list of 6"),
        ({"ratios": [1.0] * 5 + [math.nan]}, r"ratios\[5\] is nan"),
        ({"ratios": [1.0] * 5 + [0.0]}, r"ratios\[5\] is 0.0; a positive"),
        ({"ratios": RATIOS, "first": -1}, "first must be"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ArgumentError, match=message):
        apply_time_alignment(plan_of(), **options)


def test_a_plan_is_aligned_once():
    with pytest.raises(PlanError, match="aligned already"):
        apply_time_alignment(apply_time_alignment(plan_of(), ratios=RATIOS), ratios=RATIOS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"samples": 0}, "samples must be"),
        ({"tries": 3}, "tries must be"),
        ({"objective": "final"}, "objective: unknown"),
        ({"bound": 1.0}, "bound must be"),
        ({"solver": "ddpm"}, "fresh noise"),
    ],
)
def test_bad_calibrations_are_told(options, message):
    with pytest.raises(ArgumentError, match=message):
        calibrate_time_alignment(problem(), **{"evaluations": 20, "samples": 4, **options})
