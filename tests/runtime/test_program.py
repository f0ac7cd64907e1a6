"""Composed rows do what the engine's fused steps do: every solver, guidance, transforms, tensors, noise."""

import numpy as np
import pytest
import torch

import vivace
from tests.engine.test_transforms import network as torch_network
from tests.engine.test_transforms import thresholded
from tests.runtime.stand_in import SHAPE, SPEC, run_plan, step_runner
from vivace.engine.noise import normals
from vivace.engine.passes import apply_guidance, apply_mask, apply_momentum
from vivace.engine.plan import Affine, AgeRef, InputRef, Plan, Step, TensorRef, Transform
from vivace.engine.plan_io import with_tensors
from vivace.engine.solvers import SOLVERS
from vivace.errors import UnsupportedError
from vivace.runtime.program import NET, Combine, Given, program_of
from vivace.runtime.transforms import cfg_rescale, clamp, dynamic_threshold, low_rank, quantile

SCHEDULE = vivace.NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
TABLED = {"dpm_solver_v3", "dc_solver", "iia", "usf"}  # need a table
ROUNDOFF = 2.0**-24
FIRST = (Affine("x", (("noise:0", 1.0),)),)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    return step_runner(tmp_path_factory.mktemp("step"))


def drawn(n=2, seed=0):
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plan_for(solver="unipc", steps=7, **options):
    return vivace.make_plan(SCHEDULE, solver, steps, prediction="v", **options)


def error(found, exact):
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def holds(plan, step, *, inputs=None, values=None, n=2, seed=3):
    """e(runtime) <= 2 e(engine) + one unit roundoff a row, against the engine in float64."""
    noise, tensors = drawn(n), {name: torch.as_tensor(value) for name, value in (inputs or {}).items()}
    wide = {name: value.double() for name, value in tensors.items()} | (values or {})
    exact = vivace.sample(torch_network, plan, noise, seed=seed, inputs=wide).numpy()
    narrow = {name: value.float() for name, value in tensors.items()} | (values or {})
    eager = vivace.sample(torch_network, plan, noise.float(), seed=seed, inputs=narrow).numpy()
    given = {name: value.numpy() for name, value in tensors.items()}
    got, run = run_plan(plan.bind(SPEC), noise.numpy(), step, seed=seed, values=values, tensors=given)
    allowed = 2 * error(eager, exact) + len(plan.steps) * ROUNDOFF
    assert error(got, exact) <= allowed
    return run


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - TABLED))
def test_every_solver_gives_what_the_engine_gives(solver, step):
    prediction = "flow" if solver.startswith("flow") else "v"
    schedule = vivace.NoiseSchedule.flow() if prediction == "flow" else SCHEDULE
    try:
        plan = vivace.make_plan(schedule, solver, 6, prediction=prediction)
    except vivace.VivaceError as refused:
        pytest.skip(str(refused))
    spec = vivace.ModelSpec("stand-in", "5" * 64, prediction, SHAPE, 4, (4, 4))
    noise = drawn()
    exact = vivace.sample(torch_network, plan, noise, seed=3).numpy()
    eager = vivace.sample(torch_network, plan, noise.float(), seed=3).numpy()
    got, _ = run_plan(plan.bind(spec), noise.numpy(), step, seed=3)
    assert error(got, exact) <= 2 * error(eager, exact) + len(plan.steps) * ROUNDOFF


@pytest.mark.parametrize(
    "make",
    [
        lambda: apply_guidance(plan_for(), 4.0),
        lambda: apply_guidance(plan_for(), 4.0, interval=(0.3, 0.8)),
        lambda: apply_guidance(plan_for(), 5.0, rescale=0.7),
        lambda: apply_momentum(apply_guidance(plan_for(), 2.0), 0.5),
        lambda: thresholded(0.9, 1.5, steps=4),
    ],
    ids=["guidance", "interval", "rescale", "momentum", "threshold"],
)
def test_passes_and_transforms_give_what_the_engine_gives(make, step):
    holds(make(), step)


def test_a_request_may_override_the_guidance_scale(step):
    holds(apply_guidance(plan_for(), 4.0), step, values={"guidance_scale": 1.5})


def test_a_tail_starts_at_the_given_latent(step):
    holds(plan_for("ddim").tail(0.6), step, inputs={"start": drawn(2, 5)})


def test_a_mask_leaves_the_bits_of_the_start_outside(step):
    plan = apply_mask(plan_for("ddim", 5)).bind(SPEC)
    start, mask = drawn(2, 5).float().numpy(), np.zeros((2, *SHAPE), np.float32)
    mask[..., :4, :4] = 1.0
    got, _ = run_plan(plan, drawn().numpy(), step, tensors={"start": start, "mask": mask})
    outside = mask == 0
    assert np.array_equal(got[outside], start[outside])
    assert not np.array_equal(got[~outside], start[~outside])


def test_side_car_tensors_are_coefficients_of_elements(step):
    rows = (Step(0.5, 0.5, 0.5, (Affine("x", (("x", TensorRef("a")), ("out", -0.5), ("one", TensorRef("a")))),)),) * 2
    plan = Plan(rows, "v", FIRST)
    array = np.linspace(-1, 1, int(np.prod(SHAPE))).reshape(SHAPE)
    holds(with_tensors(plan, {"a": array}), step)


def test_products_of_tensors_are_taken_element_by_element(step):
    ops = (Affine("h", (("x", TensorRef("a")),)), Affine("x", (("h", InputRef("w")), ("out", 0.25))))
    plan = Plan((Step(0.5, 0.5, 0.5, ops),), "v", FIRST)
    array = np.linspace(-1, 1, int(np.prod(SHAPE))).reshape(SHAPE)
    holds(with_tensors(plan, {"a": array}), step, inputs={"w": drawn(2, 9)})


def test_low_rank_maps_run_between_sums(step):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((int(np.prod(SHAPE)), 3)))[0].T.reshape(3, *SHAPE)
    lowered = Transform("low_rank", "x", params=(("gains", TensorRef("g")), ("basis", TensorRef("b"))))
    ops = (Affine("x", (("x", 0.5), ("out", 0.5))), lowered, Affine("x", (("x", 2.0), ("noise:1", 0.1))))
    plan = Plan((Step(0.5, 0.5, 0.5, ops),) * 2, "v", FIRST)
    holds(with_tensors(plan, {"g": np.array([2.0, -1.0, 0.5]), "b": basis}), step)


def test_noise_of_a_row_has_the_bits_of_the_generator(step):
    plan = Plan((Step(0.5, 0.5, 0.5, (Affine("x", (("noise:3", 1.0),)),), variant=None),), "v", FIRST)
    got, _ = run_plan(plan.bind(SPEC), drawn().numpy(), step, seed=11)
    assert np.array_equal(got, np.stack([normals(SHAPE, 11, picture=j, draw=3) for j in range(2)]))


def test_only_what_later_rows_read_is_written():
    plan = apply_guidance(plan_for("ddim", 3), 4.0).bind(SPEC)
    program = program_of(plan, Given({"guidance_scale": 4.0}))
    assert [stage.outs for stages in program.rows for stage in stages] == [(NET, "x"), (NET, "x"), ("x",)]
    (stage,) = program.rows[0]
    assert isinstance(stage, Combine) and {slot for slot, _ in stage.terms} == {"x", "cond", "uncond"}


def test_coefficients_are_composed_in_float64():
    ops = (Affine("a", (("x", 1.0), ("out", 1e-9))), Affine("x", (("a", 1e9), ("x", -1e9))))
    plan = Plan((Step(0.5, 0.5, 0.5, ops),), "v", FIRST)
    (stage,) = program_of(plan, Given({})).rows[0]
    assert dict(zip(stage.terms, stage.coefficients[0], strict=True)) == {("out", ()): np.float32(1.0)}


def test_coefficients_by_age_become_fields_of_classes():
    ops = (Affine("x", (("x", 1.0), ("out", AgeRef((0.0, 2.0, 3.0))))),)
    plan = Plan((Step(0.5, 0.5, 0.5, ops),), "v", FIRST)
    (stage,) = program_of(plan, Given({})).rows[0]
    assert stage.terms == (("x", ()), ("out", ("class:1",)), ("out", ("class:2",)))
    assert stage.coefficients.tolist() == [[1.0, 2.0, 3.0]]


def test_a_transform_by_a_tensor_is_refused_with_its_row():
    ops = (Transform("clamp", "x", params=(("low", -1.0), ("high", InputRef("w")))),)
    plan = Plan((Step(0.5, 0.5, 0.5, ops),), "v", FIRST)
    with pytest.raises(UnsupportedError, match=r"step 0: clamp of 'x' takes numbers"):
        program_of(plan, Given({}, frozenset({"w"})))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.995, 1.0])
def test_quantiles_are_those_of_torch(ratio):
    values = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    assert quantile(values, ratio) == torch.quantile(torch.from_numpy(values), ratio).item()


def test_nan_passes_through_transforms():
    x = np.array([[np.nan, 5.0, -5.0]], np.float32)
    assert np.isnan(clamp(x, -1.0, 1.0)[0, 0]) and clamp(x, -1.0, 1.0)[0, 1:].tolist() == [1.0, -1.0]
    assert np.isnan(dynamic_threshold(x, 0.5, 10.0)).all()
    assert np.isnan(cfg_rescale(x, x, 0.5)).all()
    assert np.isnan(low_rank(x, np.ones(1, np.float32), np.ones((1, 3), np.float32))).all()
