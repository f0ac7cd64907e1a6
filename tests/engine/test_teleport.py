"""Gaussian teleportation: the map, the pass, its table; low-rank maps in plans, files and executors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import vivace
from tests.engine.plans import edit, euler, plan_of
from tests.engine.toy import SHAPE, Toy, session
from vivace import NoiseSchedule, passes
from vivace.bench.oracle import Gaussian, Mixture, denoiser_for, schedule_denoiser
from vivace.engine.calibrate.gaussian import calibrate_teleport
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.executors.maps import low_rank
from vivace.engine.lower import Given, lower_plan
from vivace.engine.plan import Affine, Step, TensorRef, Transform
from vivace.engine.plan_io import with_tensors
from vivace.engine.stepper import Stepper
from vivace.errors import ArgumentError, ModelError, PlanError, ShapeError

VP, EDM, FLOW = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000)), NoiseSchedule.edm(), NoiseSchedule.flow()
KINDS = {"eps": VP, "x0": EDM, "v": VP, "flow": FLOW}
TOY = "0" * 64


def table_of(mean, basis, variances, rest, fingerprint="callable", **metadata):
    arrays = {"means": np.asarray(mean)[None], "basis.all": np.asarray(basis), "variances.all": np.asarray(variances)}
    arrays["rest.all"] = np.array([float(rest)])
    shape = list(np.shape(mean))
    return CalibrationTable("solver", fingerprint, arrays, {"method": "teleport", "latent_shape": shape, **metadata})


def diagonal(data, rank):
    """The table of a Gaussian with a diagonal covariance whose variances beyond `rank` are equal."""
    size = len(data.mean)
    return table_of(data.mean, np.eye(size)[:rank], data.variance[:rank], data.variance[-1])


def plan_for(prediction, steps=20, solver="unipc", **options):
    return vivace.make_plan(KINDS[prediction], solver, steps, prediction=prediction, **options)


def noise(size=8, n=5, seed=0, dtype=torch.float64):
    return torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_toy(rank=3, seed=0):
    """A table of the toy's shape."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(192, rank)))[0].T.reshape(rank, *SHAPE)
    return table_of(rng.normal(size=SHAPE), basis, rng.uniform(1.0, 9.0, rank), 0.2, TOY)


# --- the map ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("rank", [8, 3])
def test_the_jump_is_exact_on_gaussian_data(prediction, rank):
    data = Gaussian.narrow(8)
    if rank < 8:
        data = replace(data, variance=torch.cat((data.variance[:rank], data.variance[-1:].expand(8 - rank))))
    plan = passes.apply_teleport(plan_for(prediction), diagonal(data, rank), share=0.3)
    assert plan.nfe == 14 and len(plan.steps) == 15
    states, start, end = [], plan.steps[0], plan.steps[1]
    vivace.sample(denoiser_for(data, plan, lambda k, x: states.append(x.clone())), plan, noise())
    scale = plan.init[0].terms[0][1]
    exact = data.solve(scale * noise(), (start.alpha, start.sigma), (end.alpha, end.sigma))
    assert (states[0] - exact).abs().max() <= 1e-13 * scale


def test_the_jump_is_the_papers_formula():
    """x(s) = mu + (s/S (I - U U^T) + U diag(sqrt((l + s^2)/(l + S^2))) U^T) (x(S) - mu), no variance beyond U."""
    rng = np.random.default_rng(1)
    mean, u = rng.normal(size=8), np.linalg.qr(rng.normal(size=(8, 3)))[0]
    variances = np.array([4.0, 2.0, 0.5])
    plan = passes.apply_teleport(plan_for("x0"), table_of(mean, u.T, variances, 0.0), sigma=10.0)
    big, small = plan.steps[0].sigma, plan.steps[1].sigma
    x = big * noise().numpy()
    inner = u @ np.diag(np.sqrt((variances + small**2) / (variances + big**2))) @ u.T
    want = mean + (x - mean) @ (small / big * (np.eye(8) - u @ u.T) + inner).T
    states = []
    data = Gaussian.narrow(8)
    vivace.sample(denoiser_for(data, plan, lambda k, state: states.append(state.clone())), plan, noise())
    assert small <= 10.0 and np.abs(states[0].numpy() - want).max() <= 1e-12 * big


def test_a_table_without_structure_is_the_scaling_of_unit_gaussian_data():
    """With no mean, no direction of its own and variance 1, VP marginals stay what they are: x' = x to rounding."""
    plan = passes.apply_teleport(plan_for("eps"), table_of(np.zeros(8), np.eye(8)[:1], [1.0], 1.0), share=0.5)
    states = []
    vivace.sample(denoiser_for(Gaussian.narrow(8), plan, lambda k, x: states.append(x.clone())), plan, noise())
    assert (states[0] - noise()).abs().max() <= 1e-14


def test_the_other_rows_are_those_of_the_tail():
    full = passes.apply_guidance(plan_for("v", 10), 3.0, interval=(0.0, 0.5))
    plan = passes.apply_teleport(full, on_toy(), share=0.25)
    assert plan.steps[1:] == full.tail(0.8).steps and plan.init == full.init
    guided = [i for i, step in enumerate(plan.steps) if len(step.branches) == 2]
    assert guided == [1, 2, 3]  # rows 2 to 4 of the full plan


@pytest.mark.parametrize(("solver", "options"), [("heun", {}), ("dpmpp_2s", {}), ("bdia", {}), ("euler_ancestral", {})])
def test_every_kind_of_solver_follows_a_jump(solver, options):
    data, prediction = Gaussian.narrow(8), "x0"
    plan = passes.apply_teleport(plan_for(prediction, 12, solver, **options), diagonal(data, 8), share=0.25)
    assert torch.isfinite(vivace.sample(denoiser_for(data, plan), plan, noise())).all()


# --- recipes, files, binding -----------------------------------------------------------------------------------------
def test_recipes_make_it_again_from_the_file(tmp_path):
    on_toy().save(tmp_path / "table.safetensors")
    plan = passes.apply_teleport(plan_for("v", 10), tmp_path / "table.safetensors", share=0.25)
    assert plan.again() == plan and plan.again(steps=20).nfe == 15
    tail = plan.tail(0.5)
    assert tail.steps == plan_for("v", 10).tail(0.5).steps
    assert [name for name, _ in tail.recipe.passes] == ["apply_teleport"]


def test_plans_with_maps_are_saved_and_loaded_whole(tmp_path):
    plan = passes.apply_teleport(plan_for("v", 10), on_toy())
    plan.save(tmp_path / "plan.json")
    again = vivace.Plan.load(tmp_path / "plan.json")
    assert again == plan and again.hash == plan.hash
    assert "low=low_rank(low;gains=[teleport.gains],basis=[teleport.basis])" in str(plan)


def test_plans_fit_the_tables_model_only():
    plan = passes.apply_teleport(plan_for("v", 10), on_toy())
    assert plan.bind(Toy("v").spec).nfe == 8
    with pytest.raises(ModelError, match="measured on model"):
        plan.bind(replace(Toy("v").spec, fingerprint="1" * 64))
    with pytest.raises(ModelError, match="latent shape"):
        plan.bind(replace(Toy("v").spec, latent_shape=(3, 12, 12)))


def test_a_callable_of_another_shape_is_refused():
    plan = passes.apply_teleport(plan_for("eps", 10), table_of(np.zeros(8), np.eye(8), np.ones(8), 1.0))
    with pytest.raises((PlanError, ShapeError)):
        vivace.sample(lambda x, t: x, plan, noise(6))


# --- executing -------------------------------------------------------------------------------------------------------
def test_the_map_is_the_sum_over_directions_and_no_neighbour_matters():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 50, 50, generator=rng)
    gains, basis = torch.randn(1, generator=rng), torch.randn(1, 4, 50, 50, generator=rng)
    want = [(gains[0] * (basis[0].double() * one.double()).sum() * basis[0]) for one in x]
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found = [low_rank(one, gains, basis) for one in x]
        assert all(torch.allclose(a, b.float(), rtol=1e-4, atol=1e-4) for a, b in zip(found, want, strict=True))
        if count == 1:
            alone = found
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_results_do_not_depend_on_batch_or_neighbours():
    plan = passes.apply_teleport(plan_for("v", 10), on_toy())
    other = passes.apply_teleport(plan_for("v", 6), on_toy(5, seed=2), share=0.5)
    run = session(plan, other, plan_for("v", 9))
    alone = run("abc", seed=3, index=1).latents
    states = [
        run.begin(vivace.Request("abc", None, n=3, seed=3)),
        run.begin(vivace.Request("wide", other, n=2)),
        run.begin(vivace.Request("wide", plan_for("v", 9))),
    ]
    while going := [state for state in states if not state.done]:
        run.step(going)
    together = [run.finish(state).latents for state in states]
    assert torch.equal(together[0][1:2], alone)
    assert torch.equal(together[1], run("wide", plan=other, n=2).latents)


def test_a_stepper_jumps_as_a_session_does():
    toy = Toy("v")
    plan = passes.apply_teleport(plan_for("v", 10), on_toy())
    want = session(plan, toy=toy)("abc", seed=1)
    start = torch.from_numpy(vivace.engine.noise.normals(SHAPE, 1))[None]
    stepper = Stepper(plan, start, {}, lambda: start)
    x = stepper.start(start)
    while not stepper.done:
        x = stepper.advance(toy.evaluate(x, (stepper.step.timestep,), (3.0,), stepper.step.variant))
    assert torch.equal(x, want.latents)


def test_receipts_tell_what_was_closed():
    told = session(passes.apply_teleport(plan_for("v", 10), on_toy()))("abc").receipt.details["teleport"]
    assert told.startswith("closed form down to sigma") and "rank 3" in told and "8 evaluations" in told


def test_a_map_is_no_launch_and_everything_around_it_is():
    lowered = lower_plan(
        passes.apply_teleport(plan_for("v", 10), on_toy()), Given({}), dict.fromkeys(("teleport.shift",), 0) | NUMBERS
    )
    (first, last), (made,) = lowered.spans[0], lowered.maps
    assert (first, made, last) == (1, 2, 4)
    assert lowered.launches(lowered.spans[0]) == range(1, 4)


NUMBERS = {"teleport.gains": 0, "teleport.basis": 1}


# --- legality --------------------------------------------------------------------------------------------------------
def mapped(gains=(2,), basis=(2, *SHAPE), slot="y", **also):
    """A flow Euler row, then a row with a map."""
    arrays = {"gains": np.ones(gains), "basis": np.ones(basis), **also}
    op = Transform("low_rank", slot, params=(("gains", TensorRef("gains")), ("basis", TensorRef("basis"))))
    ops = (Affine("y", (("x", 1.0),)), op, Affine("x", (("x", 1.0), ("y", 1.0))))
    steps = (*euler(2).steps, Step(0.1, 0.9, 0.1, ops))
    return with_tensors(replace(plan_of(*steps), steps=steps[:1] + steps[2:]), arrays)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (lambda: mapped(gains=(3,)), "has shape"),
        (lambda: mapped(gains=(2, 1)), "has shape"),
        (lambda: mapped(basis=(2,)), "has shape"),
        (lambda: mapped(slot="out"), "output of the network"),
        (lambda: mapped(slot="empty"), "empty slot"),
        (
            lambda: edit(mapped(), 0, ops=(Affine("x", (("x", 1.0), ("out", TensorRef("basis")))),)),
            "both of a low_rank map and a coefficient",
        ),
        (
            lambda: edit(mapped(), 1, ops=(Transform("low_rank", "x", params=(("gains", 1.0), ("basis", 1.0))),)),
            "tensors of the side-car",
        ),
        (lambda: edit(mapped(), 1, ops=(Transform("low_rank", "x"),)), "takes parameters"),
    ],
)
def test_illegal_maps_are_named(plan, why):
    with pytest.raises(PlanError, match=why):
        vivace.verify(plan())


def test_a_map_of_another_latent_is_refused_at_binding():
    assert mapped().bind(Toy("flow").spec).binding is not None
    with pytest.raises(PlanError, match="has shape"):
        mapped(basis=(2, 3, 4, 4)).bind(Toy("flow").spec)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"share": 0.0}, "leaves out 0"),
        ({"share": 1.0}, "leaves out 10"),
        ({"share": 0.05}, "leaves out 0"),
        ({"share": 1.5}, "share must be a number"),
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"sigma": 1e9}, "no step of the plan"),
        ({"sigma": 1e-9}, "no step of the plan"),
        ({"prompt": "red heart"}, "no mean of prompt"),
    ],
)
def test_bad_arguments_are_named(options, why):
    with pytest.raises(ArgumentError, match=why):
        passes.apply_teleport(plan_for("v", 10), on_toy(), **options)


def test_plans_that_do_not_start_from_noise_alone_are_refused():
    once = passes.apply_teleport(plan_for("v", 10), on_toy())
    with pytest.raises(PlanError, match="teleported already"):
        passes.apply_teleport(once, on_toy())
    with pytest.raises(PlanError, match="is bound"):
        passes.apply_teleport(plan_for("v", 10).bind(Toy("v").spec), on_toy())
    with pytest.raises(PlanError, match="no recipe"):
        passes.apply_teleport(euler(), on_toy())
    with pytest.raises(PlanError, match="no evaluation"):
        passes.invert(passes.apply_teleport(plan_for("v", 10, "ddim"), on_toy()))
    with pytest.raises(ModelError, match="measured for 'iia'"):
        passes.apply_teleport(plan_for("v", 10), CalibrationTable("solver", TOY, {}, {"method": "iia"}))


# --- calibration -----------------------------------------------------------------------------------------------------
def problem(data=None, prompts=None):
    made = Problem.of_callable(schedule_denoiser(data or Mixture.seven(), VP, "eps"), VP, "eps", (2,), seed=5)
    return made if prompts is None else replace(made, prompts=prompts)


def test_the_gaussian_of_data_is_its_mean_and_covariance():
    data = np.random.default_rng(0).normal(size=(50, 2)) @ np.array([[2.0, 0.3], [0.0, 0.5]]) + 1.0
    table = calibrate_teleport(problem(), samples=50, rank=2, data=data)
    basis, variances = table.arrays["basis.all"], table.arrays["variances.all"]
    assert np.allclose(table.arrays["means"][0], data.mean(0), atol=1e-6)
    assert np.allclose(basis.T @ np.diag(variances) @ basis, np.cov(data.T), atol=1e-6)
    less = calibrate_teleport(problem(), samples=50, rank=1, data=data)
    assert np.isclose(less.arrays["rest.all"][0], variances[1]) and table.arrays["rest.all"][0] == 0.0


def test_means_of_prompts_have_the_covariance_within():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(60, 2)) * 0.1 + np.array([[5.0, 0.0], [-5.0, 0.0]])[np.arange(60) % 2]
    given = problem(prompts=("left", "right"))
    table = calibrate_teleport(given, samples=60, rank=1, per_prompt=True, data=data)
    assert np.allclose(table.arrays["means"][1:], [data[::2].mean(0), data[1::2].mean(0)], atol=1e-6)
    assert table.arrays["variances.all"][0] > 20.0 > 0.1 > table.arrays["variances.within"][0]
    plan = passes.apply_teleport(plan_for("eps"), table, prompt="right")
    assert plan != passes.apply_teleport(plan_for("eps"), table) and plan.again() == plan


def test_runs_stand_for_data_and_the_table_is_the_same_each_time(tmp_path):
    seen = []
    one = calibrate_teleport(problem(), samples=70, rank=2, progress=lambda *told: seen.append(told))
    two = calibrate_teleport(problem(), samples=70, rank=2, resume=tmp_path / "work")
    three = calibrate_teleport(problem(), samples=70, rank=2, resume=tmp_path / "work")
    assert one.hash == two.hash == three.hash and seen == [("pictures", 64, 70), ("pictures", 70, 70)]
    assert one.metadata["of"] == "runs" and one.metadata["method"] == "teleport"


def test_on_gaussian_data_a_calibrated_jump_costs_less_than_the_steps_it_replaces():
    data = Gaussian.narrow(2)
    table = calibrate_teleport(problem(data), samples=4096, rank=2)
    plan, short = plan_for("eps", 10, "ddim"), plan_for("eps", 7, "ddim")
    jump = passes.apply_teleport(plan, table, share=0.3)
    exact = data.solve(noise(2, 64), (plan.steps[0].alpha, plan.steps[0].sigma), (1.0, 0.0))
    errors = [(vivace.sample(denoiser_for(data, p), p, noise(2, 64)) - exact).square().mean() for p in (jump, short)]
    assert jump.nfe == short.nfe and errors[0] < errors[1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"samples": 1}, "samples"),
        ({"rank": 0}, "rank"),
        ({"rank": 3}, "at most 2"),
        ({"samples": 2, "rank": 2}, "at most 1"),
    ],
)
def test_bad_options_of_the_calibrator_are_named(options, why):
    with pytest.raises(ArgumentError, match=why):
        calibrate_teleport(problem(), **{"samples": 10, "rank": 1, "data": np.zeros((10, 2)), **options})
