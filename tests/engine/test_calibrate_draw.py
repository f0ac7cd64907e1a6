"""The calibration set: the law of its timesteps, and states that belong to the timesteps they carry."""

import math
from dataclasses import replace

import pytest
import torch

from tests.engine.toy import SHAPE, Toy, session
from vivace.engine.calibrate.draw import (
    MEAN,
    SPREAD,
    collect,
    draw_evaluations,
    evaluations_of,
    full_precision,
    group_edges,
    group_of,
    points_of,
)
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Rule
from vivace.engine.planning import make_plan
from vivace.errors import ArgumentError

SCHEDULE = NoiseSchedule.from_diffusers({"num_train_timesteps": 1000, "beta_schedule": "linear"})


def plan_of(steps=8, **options):
    return make_plan(SCHEDULE, steps=steps, prediction="v", **options)


def normal_share(low, high):
    """Probability of the law between two shares of the trajectory, counted from the clean end."""
    return 0.5 * (math.erf((high - MEAN) / SPREAD / math.sqrt(2)) - math.erf((low - MEAN) / SPREAD / math.sqrt(2)))


def test_ndtc_is_a_clamped_normal_law_counted_from_the_clean_end():
    count, rows = 20000, 10
    drawn = draw_evaluations("ndtc", count, rows, seed=5)
    for evaluation in range(rows):
        clean = rows - 1 - evaluation
        low = -math.inf if clean == 0 else clean / rows
        high = math.inf if clean == rows - 1 else (clean + 1) / rows
        expected = normal_share(low, high)
        spread = math.sqrt(expected * (1 - expected) / count)
        assert abs(drawn.count(evaluation) / count - expected) < 5 * spread
    assert sum(e >= rows // 2 for e in drawn) > count / 2  # biased to the clean end, the last rows


def test_a_draw_depends_on_its_seed_alone():
    assert draw_evaluations("ndtc", 64, 20, seed=1) == draw_evaluations("ndtc", 64, 20, seed=1)
    assert draw_evaluations("ndtc", 64, 20, seed=1) != draw_evaluations("ndtc", 64, 20, seed=2)
    assert draw_evaluations("ndtc", 64, 20, seed=1)[:10] == draw_evaluations("ndtc", 10, 20, seed=1)


def test_uniform_spreads_evenly_whatever_the_seed():
    assert draw_evaluations("uniform", 5, 5) == (0, 1, 2, 3, 4)
    assert draw_evaluations("uniform", 2, 8) == (2, 6)
    assert draw_evaluations("uniform", 8, 2, seed=9) == (0,) * 4 + (1,) * 4


def test_bad_draws_are_refused():
    with pytest.raises(ArgumentError, match="law 'gamma' is unknown"):
        draw_evaluations("gamma", 4, 4)
    with pytest.raises(ArgumentError, match="0 samples"):
        draw_evaluations("ndtc", 0, 4)


def test_groups_are_runs_of_timesteps_of_nearly_equal_length():
    edges = group_edges([900.0, 700.0, 500.0, 300.0, 100.0, 0.0], 3)
    assert edges == (200.0, 600.0)
    assert [group_of(edges, t) for t in (0.0, 100.0, 200.0, 300.0, 599.9, 600.0, 5000.0)] == [0, 0, 1, 1, 1, 2, 2]
    assert group_edges([10.0, 20.0], 8) == (15.0,)  # no more groups than timesteps
    assert group_edges([10.0, 20.0, 20.0], 1) == ()
    with pytest.raises(ArgumentError):
        group_edges([1.0], 0)


def test_every_group_gets_a_sample_and_added_ones_are_marked():
    plan = plan_of(12)
    edges = group_edges([step.timestep for _, step, _ in evaluations_of(plan)], 6)
    points = points_of(plan, "ndtc", 2, edges, seed=0)
    drawn = [point for point in points if not point.added]
    assert len(drawn) == 2 and len(points) > 2
    found = {group_of(edges, plan.steps[point.evaluation].timestep) for point in points}
    assert found == set(range(6))


def test_one_trajectory_gives_different_states():
    points = points_of(plan_of(4), "ndtc", 32, (), seed=0, per_picture=4)
    assert len(points) == 32
    assert len({(point.picture, point.evaluation) for point in points}) == 32


class Remembering(Toy):
    """Keeps every x that it is given, by timestep and condition."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def evaluate(self, x, timesteps, conditions, variant):
        self.seen += [(t, c, sample.clone()) for t, c, sample in zip(timesteps, conditions, x, strict=True)]
        return super().evaluate(x, timesteps, conditions, variant)


@pytest.mark.parametrize("solver", ["unipc", "ddpm"])
def test_a_state_is_what_the_network_read_at_the_timestep_it_carries(solver):
    plan = apply_guidance(plan_of(6, solver=solver), 3.0)
    toy = Remembering()
    running = session(plan, toy=toy)
    points = points_of(plan, "ndtc", 9, (), seed=4)
    prompts = ["a", "bb", "ccc"]
    samples = collect(running, running.plans[0], points, prompts, seed=11, batch=4)
    assert len(samples) == 9
    whole = Remembering()
    for sample in samples:
        assert sample.timestep == plan.steps[sample.row].timestep and sample.branches == ("cond", "uncond")
        whole.seen.clear()
        session(plan, toy=whole)(prompts[sample.prompt], seed=11, index=sample.picture)
        read = next(x for t, _, x in whole.seen if t == sample.timestep)
        assert torch.equal(read, sample.x) and sample.x.shape == SHAPE
    assert running.pool.state.shape[1] == len(running.pool._free)  # nothing is left running


def test_states_do_not_depend_on_the_batch():
    plan = plan_of(5)
    points = points_of(plan, "ndtc", 7, (), seed=2)
    one, many = (collect(session(plan), plan.bind(Toy().spec, SHAPE), points, ["x"], batch=b) for b in (1, 16))
    assert all(torch.equal(a.x, b.x) and a.timestep == b.timestep for a, b in zip(one, many, strict=True))


def test_progress_reaches_its_end():
    plan, told = plan_of(5), []
    running = session(plan)
    collect(running, running.plans[0], points_of(plan, "ndtc", 3, ()), ["x"], progress=lambda *now: told.append(now))
    assert told[-1][1] == told[-1][2] and all(name == "trajectories" for name, _, _ in told)


def test_full_precision_takes_precisions_out_and_leaves_the_rest():
    plan = plan_of(3)
    keep = Rule((0, 2), "mlp", order=1, precision="int8")
    steps = [
        replace(step, variant=replace(step.variant, rules=(Rule((0, 4), precision="int8"), keep)))
        for step in plan.steps
    ]
    ruled = full_precision(replace(plan, steps=tuple(steps)))
    assert all(step.variant.rules == (replace(keep, precision=None),) for step in ruled.steps)
    assert full_precision(plan) == plan
