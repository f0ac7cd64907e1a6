"""Searches on the mixture of seven modes: what they find, that they go on, what they refuse."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch

from vivace.bench.oracle import Mixture, schedule_denoiser
from vivace.engine.calibrate.problem import Problem
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan
from vivace.engine.search import Point, TimestepSpace, UsfSpace, search_timesteps, search_usf
from vivace.engine.search.objective import Objective, converged, errors
from vivace.engine.search.rollout import Rollout
from vivace.engine.search.spaces import shares_of, sticks_of, timesteps_of, warped
from vivace.errors import ArgumentError, BackendError, PlanError

optuna = pytest.importorskip("optuna")
EDM = NoiseSchedule.edm(0.02, 20.0)
SEVEN = Mixture.seven()
SMALL = {"samples": 16, "judged": 8, "trials": 24, "rounds": 2}


@pytest.fixture(scope="module")
def problem():
    return Problem.of_callable(schedule_denoiser(SEVEN, EDM, "eps"), EDM, "eps", (2,), seed=1)


@pytest.fixture(scope="module")
def found(problem):
    return search_usf(problem, 6, **SMALL)


@pytest.fixture(scope="module")
def judged(problem):
    samples = range(200, 232)
    want = converged(problem, samples)
    return lambda plan: float(errors(problem.run(plan, samples), want).mean())


# ---------------------------------------------------------------- what is found
def test_a_searched_schedule_beats_the_rules_it_began_with_on_samples_it_never_saw(problem, found, judged):
    assert found.plan.nfe == 6 and isinstance(found.plan, Plan)
    error = judged(found.plan)
    for solver, options in (("dpmpp_2m", {}), ("unipc", {}), ("dpmpp_2m", {"grid": "logsnr"})):
        assert error < judged(problem.plan(solver, 6, **options))


def test_no_round_that_was_kept_is_worse_on_the_judging_samples(found):
    assert found.judged == min(least for _, least in found.history) <= found.history[0][1]
    assert found.rows > 0


def test_the_same_search_finds_the_same_plan(problem, found):
    again = search_usf(problem, 6, **SMALL)
    assert again.plan.hash == found.plan.hash and again.history == found.history


def test_searched_timesteps_beat_the_even_grid(problem, judged, tmp_path):
    made = search_timesteps(problem, "dpmpp_2m", 6, fixed={"lower_order_final": False}, **SMALL)
    assert made.plan.nfe == 6
    assert judged(made.plan) < judged(problem.plan("dpmpp_2m", 6, grid="uniform"))
    made.plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read.hash == made.plan.hash
    arguments = read.recipe.arguments.to_dict()
    assert arguments["solver"] == "dpmpp_2m" and len(arguments["timesteps"]) == 6


def test_guided_problems_give_guided_plans():
    data = {"cond": Mixture(SEVEN.means[:3], SEVEN.weights[:3] / SEVEN.weights[:3].sum(), SEVEN.deviations[:3])}
    nets = {name: schedule_denoiser(data.get(name, SEVEN), EDM, "eps") for name in ("cond", "uncond")}
    guided = Problem.of_callable(lambda x, t, branch: nets[branch](x, t), EDM, "eps", (2,), guidance=3.0)
    made = search_usf(guided, 4, samples=8, judged=4, trials=6, rounds=1)
    assert made.plan.branch_evals == 8 and made.plan.recipe.passes[0][0] == "apply_guidance"


def test_a_metric_is_searched_for_by_an_evolution_strategy(problem):
    pytest.importorskip("cma")
    calls = []

    def spread(latents):
        calls.append(len(latents))
        return float(abs(latents.std() - 1.2))

    made = search_timesteps(
        problem,
        "ddim",
        4,
        metric=spread,
        weight=2.0,
        samples=8,
        judged=4,
        trials=6,
        rounds=1,
        reference=torch.zeros(12, 2),
    )
    assert set(calls) == {8, 4} and made.judged <= made.history[0][1]


# ---------------------------------------------------------------- going on
@pytest.mark.parametrize("stage", ["reference", "survey", "refine"])
def test_a_stopped_search_goes_on_to_the_same_plan(problem, found, tmp_path, stage):
    def stop(what, done, total):
        if what == stage and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_usf(problem, 6, **SMALL, resume=tmp_path / "work", progress=stop)
    seen = []
    again = search_usf(
        problem,
        6,
        **SMALL,
        resume=tmp_path / "work",
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert again.plan.hash == found.plan.hash and again.history == found.history
    assert again.rows < found.rows or stage == "reference"  # whose evaluations are not counted
    assert ("survey", 24, 24) in seen and {what for what, _, _ in seen} == {"reference", "survey", "refine"}


def test_more_trials_go_on_and_another_seed_is_refused(problem, tmp_path):
    short = {"samples": 8, "judged": 4, "rounds": 1}
    first = search_usf(problem, 4, trials=5, resume=tmp_path / "work", **short)
    more = search_usf(problem, 4, trials=8, resume=tmp_path / "work", **short)
    assert more.plan.hash == search_usf(problem, 4, trials=8, **short).plan.hash
    assert more.history[0][0] <= first.history[0][0]
    with pytest.raises(ArgumentError, match="seed 0, now 1"):
        search_usf(problem, 4, trials=5, seed=1, resume=tmp_path / "work", **short)


# ---------------------------------------------------------------- points
class Blind:
    """A trial that draws by chance."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def suggest_categorical(self, name, choices):
        return choices[self.random.integers(len(choices))]

    def suggest_int(self, name, low, high):
        return int(self.random.integers(low, high + 1))

    def suggest_float(self, name, low, high, log=False):
        return float(self.random.uniform(low, high))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("schedule", [EDM, NoiseSchedule.flow(3.0), NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))])
def test_a_knob_changes_no_row_before_its_own(seed, schedule):
    problem = Problem.of_callable(schedule_denoiser(SEVEN, schedule, "v"), schedule, "v", (2,))
    space = UsfSpace(schedule, 5)
    objective = Objective(problem, space, [0], reference=torch.zeros(1, 2))
    point = space.suggest(Blind(seed))
    base, knobs = objective.plan(point), space.knobs(point)
    assert len(knobs) == len(point.values) and base.nfe == 5
    run = Rollout(problem, [0, 1])
    run.run(base)
    for i, knob in enumerate(knobs):
        values = list(point.values)
        values[i] += 0.1 * knob.scale
        plan = objective.plan(dataclasses.replace(point, values=tuple(values)))
        assert plan.steps[: knob.first] == base.steps[: knob.first]
        assert plan != base or knob.name.startswith(("factor", "shift"))  # a factor of history that there is not
        again = run.rerun(plan, knob.first)
        assert torch.equal(again, Rollout(problem, [0, 1]).run(plan))


@pytest.mark.parametrize("solver", ["heun", "unipc", "dpm_solver", "dpmpp_2s", "pndm", "deis", "lms", "euler"])
def test_a_time_changes_no_row_before_its_own(solver):
    schedule = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
    problem = Problem.of_callable(schedule_denoiser(SEVEN, schedule, "eps"), schedule, "eps", (2,))
    fixed = {"variant": "singlestep", "order": 3} if solver == "dpm_solver" else {}
    space = TimestepSpace(solver, schedule, 5, fixed)
    objective = Objective(problem, space, [0], reference=torch.zeros(1, 2))
    point = space.suggest(Blind(3))
    base = objective.plan(point)
    objective.check(point)
    for i, knob in enumerate(space.knobs(point)):
        values = list(point.values)
        values[i] += 0.1
        plan = objective.plan(dataclasses.replace(point, values=tuple(values)))
        assert plan.steps[: knob.first] == base.steps[: knob.first] and plan != base


def test_a_rollout_is_the_run_of_the_session(problem, found):
    unguided = found.plan
    got, want = Rollout(problem, range(8)).run(unguided), problem.run(unguided, range(8))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_sticks_are_shares_and_any_numbers_are_a_grid():
    shares = warped(7, 1.3, 0.6)
    np.testing.assert_allclose(shares_of(sticks_of(shares)), shares, rtol=1e-12)
    np.testing.assert_allclose(warped(4, 1.0, 1.0), [0.0, 0.25, 0.5, 0.75])
    for schedule in (EDM, NoiseSchedule.flow(3.0), NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))):
        times = timesteps_of(schedule, shares_of([-3.0, 0.5, 4.0, -1.0]))
        assert all(a > b for a, b in zip(times, times[1:], strict=False))


# ---------------------------------------------------------------- refusals
def test_solvers_with_noise_are_refused_before_any_run(problem):
    calls = []
    watched = Problem.of_callable(lambda x, t: calls.append(1) or x, EDM, "eps", (2,))
    with pytest.raises(PlanError, match="search deterministic solvers"):
        search_timesteps(watched, "dpmpp_2m_sde", 4, reference=torch.zeros(6, 2), samples=4, judged=2)
    assert not calls


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"trials": True}, "trials is True"),
        ({"rounds": -1}, "rounds is -1"),
        ({"reference": torch.zeros(3, 2)}, "need their latents"),
        ({"seed": 1 << 32}, "seed is 4294967296; an integer from 0"),
    ],
)
def test_wrong_arguments_are_refused(problem, wrong, message):
    with pytest.raises(ArgumentError, match=message):
        search_usf(problem, 4, **({"samples": 4, "judged": 2, "trials": 2} | wrong))


def test_wrong_spaces_are_refused():
    with pytest.raises(ArgumentError, match="highest order 7"):
        UsfSpace(EDM, 4, highest=7)
    with pytest.raises(ArgumentError, match="highest order 2.5"):
        UsfSpace(EDM, 4, highest=2.5)
    with pytest.raises(ArgumentError, match="free is true or false, got 1"):
        UsfSpace(EDM, 4, free=1)
    with pytest.raises(ArgumentError, match="no option 'ordr'"):
        TimestepSpace("unipc", EDM, 4, {"ordr": 2})
    with pytest.raises(ArgumentError, match="fed belongs to given timesteps"):
        TimestepSpace("usf", EDM, 4, {"fed": [1.0]})


def test_a_missing_library_is_named(problem, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BackendError, match=r"pip install 'vivace\[search\]'"):
        search_usf(problem, 4, samples=4, judged=2, trials=2, reference=torch.zeros(6, 2))


def test_points_are_compared_by_value():
    assert Point({"a": [1]}, (1.0,)) == Point({"a": [1]}, (1.0,))
