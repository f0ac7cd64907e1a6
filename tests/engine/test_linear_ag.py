"""LinearAG: unconditional predictions that are combined from known ones, their weights by least squares."""

import numpy as np
import pytest
import torch

import vivace
from tests.engine.test_adaptive_guidance import SCHEDULES, Counted, ddim, guided, noise
from vivace.engine.calibrate.linear_ag import calibrate_linear_ag, least_squares
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.passes import (
    apply_adaptive_guidance,
    apply_block_cache,
    apply_guidance,
    apply_linear_ag,
)
from vivace.engine.plan import Plan
from vivace.errors import ArgumentError, ModelError, PlanError

SCALE, STEPS = 3.0, 12


def problem(prediction="flow", seed=0, guidance=SCALE):
    return Problem.of_callable(
        Counted(prediction), SCHEDULES[prediction], prediction, (2,), guidance=guidance, seed=seed
    )


def table(prediction="flow", **options):
    return calibrate_linear_ag(problem(prediction), solver="ddim", steps=STEPS, **{"samples": 24, **options})


def published(prediction, start, weights=None, rows=(), history=2, own=True):
    """A plain loop: DDIM in x0 form, uncond of `rows` combined from lists of all branches so far; fits what is lacking.

    -> (results, weights, branch evaluations). Weights by `numpy.linalg.lstsq` on the columns cond, earlier conds,
    earlier unconds, newest first (Castillo et al. 2023, section 5).
    """
    net, plan = Counted(prediction), ddim(prediction, STEPS).steps
    levels = [*((row.timestep, row.alpha, row.sigma) for row in plan), (0.0, 1.0, 0.0)]
    x, conds, unconds, found = start.clone(), [], [], {}
    for i, ((t, alpha, sigma), (_, after, noise_after)) in enumerate(zip(levels, levels[1:], strict=False)):
        at = torch.full((len(x),), t, dtype=torch.float64)
        cond = net(x, at, "cond")
        used = None
        if i in rows:
            n = min(history, len(conds))
            columns = [cond, *(conds[-k] for k in range(1, n + 1)), *(unconds[-k] for k in range(1, n + 1))]
            if weights is None:
                used = net(x, at, "uncond")
                design = np.stack([column.numpy().ravel() for column in columns], 1)
                found[i] = np.linalg.lstsq(design, used.numpy().ravel(), rcond=None)[0]
            else:
                found[i] = weights[i]
            uncond = sum(float(b) * column for b, column in zip(found[i], columns, strict=True))
        else:
            uncond = net(x, at, "uncond")
        conds.append(cond)
        unconds.append(uncond)
        uncond = uncond if own or used is None else used
        made = uncond + SCALE * (cond - uncond)
        if prediction == "eps":
            eps, data = made, (x - sigma * made) / alpha
        elif prediction == "v":
            eps = (sigma * x + alpha * made) / (alpha**2 + sigma**2)
            data = (alpha * x - sigma * made) / (alpha**2 + sigma**2)
        else:
            eps, data = x + alpha * made, x - sigma * made
        x = after * data + noise_after * eps
    return x, found, net.seen


# ---------------------------------------------------------------- the calibration
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_weights_are_those_of_ordinary_least_squares(prediction, own):
    made = table(prediction, trajectories="own" if own else "guided")
    rows = [2, 4, 5, 7, 8, 10, 11]
    _, want, _ = published(prediction, problem(prediction).noise(range(24)), rows=rows, own=own)
    assert made.metadata["rows"] == rows == sorted(want)
    for row in rows:
        assert np.allclose(made.arrays[f"weights.{row}"], want[row], rtol=1e-6, atol=1e-7)
    assert made.arrays["errors"][[0, 1, 3]].tolist() == [0.0] * 3 and (made.arrays["errors"][rows] > 0).all()


def test_columns_that_repeat_get_the_shortest_weights():
    column = torch.randn(50, dtype=torch.float64)
    assert np.allclose(least_squares([column, column], 3.0 * column), [1.5, 1.5])


def test_it_goes_on_where_it_was_stopped(tmp_path):
    def stop(what, done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table(progress=stop, resume=tmp_path / "work")
    assert table(resume=tmp_path / "work").hash == table().hash


# ---------------------------------------------------------------- the plan
@pytest.mark.parametrize("prediction", list(SCHEDULES))
def test_it_is_the_plain_loop(prediction):
    made, start = table(prediction, samples=8), noise()
    net = Counted(prediction)
    got = vivace.sample(net, apply_linear_ag(guided(prediction, STEPS, SCALE), made), start)
    weights = {row: made.arrays[f"weights.{row}"] for row in made.metadata["rows"]}
    want, _, seen = published(prediction, start, weights, made.metadata["rows"])
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)
    assert net.seen == seen == {"cond": 72, "uncond": 30}


def test_weights_given_by_hand_and_the_difference_of_before():
    start, weights = noise(), {4: [1.0, -1.0, 1.0], 5: [0.4, 0.1, 0.2, -0.3, 0.6]}
    plan = apply_linear_ag(guided(steps=STEPS, scale=SCALE), weights=weights)
    want, _, _ = published("flow", start, {4: [1.0, -1.0, 1.0], 5: weights[5]}, ())
    net = Counted("flow")
    got = vivace.sample(net, plan, start)
    assert net.seen == {"cond": 72, "uncond": 60}
    listed = vivace.sample(Counted("flow"), apply_linear_ag(guided(steps=STEPS, scale=SCALE), rows=[4, 6]), start)
    want, _, _ = published("flow", start, {4: weights[4], 6: weights[4]}, (4, 6), history=1)
    assert torch.allclose(listed, want, rtol=1e-10, atol=1e-10) and not torch.allclose(got, want)


def test_no_rows_are_guidance_bit_for_bit():
    plan = guided(steps=STEPS)
    for made in (
        apply_linear_ag(plan, rows=[]),
        apply_linear_ag(plan, table(), rows=[]),
        apply_linear_ag(plan, weights={}),
    ):
        assert made.steps == plan.steps


def test_weights_of_cond_alone_are_rows_without_guidance():
    start = noise()
    rows = range(6, 12)
    made = apply_linear_ag(guided(steps=STEPS), weights={row: [1.0, 0.0, 0.0] for row in rows})
    interval = apply_guidance(ddim(steps=STEPS), SCALE, interval=(0.0, 0.5))
    got, want = (vivace.sample(Counted("flow"), plan, start) for plan in (made, interval))
    assert torch.allclose(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "heun"])
def test_solvers_with_history_and_stages_take_it(solver):
    plan = apply_guidance(vivace.make_plan(SCHEDULES["flow"], solver, 6, prediction="flow"), SCALE)
    net = Counted("flow")
    result = vivace.sample(net, apply_linear_ag(plan, rows=[2, 3, 4]), noise())
    assert bool(torch.isfinite(result).all())
    assert net.seen["cond"] - net.seen["uncond"] == 18


# ---------------------------------------------------------------- recipes and files
def test_recipe_tail_and_again():
    made = table()
    plan = apply_linear_ag(guided(steps=STEPS, scale=SCALE), made)
    assert plan.again().steps == plan.steps
    tail = plan.tail(0.5)  # evaluations 6 .. 11: 7 has one guided before it, needs two
    assert [len(step.branches) for step in tail.steps] == [2, 2, 1, 2, 1, 1]
    by_hand = apply_linear_ag(guided(steps=STEPS), weights={4: [1.0, -1.0, 1.0], 7: [1.0, -1.0, 1.0]}).tail(0.5)
    assert [len(step.branches) for step in by_hand.steps] == [2, 1, 2, 2, 2, 2]
    listed = apply_linear_ag(guided(steps=STEPS), rows=[5, 6, 9])
    assert [len(step.branches) for step in listed.tail(0.5).steps] == [2, 2, 2, 1, 2, 2]
    assert listed.again(steps=11).branch_evals == 19


def test_files_keep_it_and_carry_all_it_needs(tmp_path):
    made = table()
    made.save(tmp_path / "table.safetensors")
    plan = apply_linear_ag(guided(steps=STEPS, scale=SCALE), tmp_path / "table.safetensors")
    plan.save(tmp_path / "plan.json")
    (tmp_path / "table.safetensors").unlink()
    again, start = Plan.load(tmp_path / "plan.json"), noise()
    assert again == plan
    assert torch.equal(vivace.sample(Counted("flow"), again, start), vivace.sample(Counted("flow"), plan, start))


def test_caches_come_behind_it():
    plan = apply_block_cache(apply_linear_ag(guided(steps=STEPS), rows=[4, 6]), "fora", interval=2)
    assert plan.branch_evals == 22


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give a table, rows or weights"),
        ({"rows": [0]}, "reads 1 guided evaluations"),
        ({"rows": [12]}, "the plan has 12"),
        ({"rows": [1.5]}, "numbers of evaluations"),
        ({"rows": "2"}, "numbers of evaluations"),
        ({"weights": {3: [1.0, 2.0]}}, "2n \\+ 1 finite numbers"),
        ({"weights": {3: [1.0, float("nan"), 2.0]}}, "2n \\+ 1 finite numbers"),
        ({"weights": {"a": [1.0, 1.0, 2.0]}}, "2n \\+ 1 finite numbers"),
        ({"weights": [1.0]}, "evaluation ->"),
        ({"weights": {3: [1.0, 1.0, 2.0]}, "rows": [3, 4]}, "no weights for evaluation 4"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ArgumentError, match=match):
        apply_linear_ag(guided(steps=STEPS), **options)


def test_plans_that_cannot_be_estimated_are_refused():
    with pytest.raises(PlanError, match="cond and uncond are needed"):
        apply_linear_ag(ddim(steps=STEPS), weights={3: [1.0, 0.0, 0.0]})
    estimated = apply_linear_ag(guided(steps=STEPS), rows=[3])
    with pytest.raises(PlanError, match="estimates branches already"):
        apply_linear_ag(estimated, rows=[5])
    with pytest.raises(PlanError, match="estimate uncond"):
        apply_adaptive_guidance(estimated)
    with pytest.raises(PlanError, match="before caches and guards"):
        apply_linear_ag(apply_adaptive_guidance(guided(steps=STEPS)), rows=[3])


def test_tables_of_other_plans_and_methods_are_refused():
    made = table()
    with pytest.raises(ArgumentError, match="does not have the table's 12 evaluations"):
        apply_linear_ag(guided(steps=11), made)
    other = CalibrationTable(made.kind, made.fingerprint, made.arrays, {**made.metadata, "method": "iia"})
    with pytest.raises(ModelError, match="measured for 'iia'"):
        apply_linear_ag(guided(steps=STEPS), other)


@pytest.mark.parametrize(
    "options", [{"every": 1}, {"first": 0}, {"history": 9}, {"history": 0}, {"rows": [0]}, {"trajectories": "both"}]
)
def test_bad_options_of_the_calibration_are_refused(options):
    with pytest.raises(ArgumentError, match="calibrate linear_ag"):
        table(**options)
    with pytest.raises(ArgumentError, match="guidance 1"):
        calibrate_linear_ag(problem(guidance=1.0))
