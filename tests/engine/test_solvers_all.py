"""What holds for every solver: a point mass is reached exactly, evaluations are counted, plans survive all passes."""

import math

import numpy as np
import pytest
import torch

from tests.engine.interpreter import Gaussian, run_plan
from tests.engine.solver_grids import FLOW, LAMS, VP, edm_grid, plan_on, vp_grid
from vivace.bench import oracle
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes.guidance import apply_guidance
from vivace.engine.plan import Plan, Transform
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.solvers import SOLVERS, solver_options
from vivace.engine.solvers.ddim import ddim_rows, ddpm_rows
from vivace.engine.solvers.dpmpp import dpmpp_rows
from vivace.engine.solvers.heun import churned_rows
from vivace.engine.solvers.lcm import lcm_rows
from vivace.engine.solvers.quadrature import lagrange_rows
from vivace.engine.solvers.singlestep import singlestep_rows
from vivace.engine.solvers.unipc import unipc_rows
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError, PlanError

EDM = NoiseSchedule.edm(0.01, 20.0)
NOISE = np.random.default_rng(3).normal(size=(4, 8))
POINT = Gaussian(np.full(8, 0.7), np.zeros(8))
VARIED = [(name, {}) for name in SOLVERS] + [
    ("dpm_solver", {"variant": "singlestep", "order": 3}),
    ("dpmpp_2s", {"variant": "heun", "r1": 0.4}),
    ("deis", {"variant": "rhoab", "order": 4}),
    ("pndm", {"skip_prk": True}),
    ("heun", {"s_churn": 4.0}),
    ("lagrange", {"form": "eps", "variable": "t"}),
]


def for_schedule(schedule, solver, options):
    """The options that make sense there; None when the solver does not."""
    if solver.startswith("flow_") and schedule.kind != "flow":
        return None
    return {**options, "original_steps": None, "sigma_data": 0.0} if solver == "lcm" else options


@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize(("solver", "options"), VARIED)
def test_a_point_mass_is_reached_exactly(schedule, solver, options):
    """A constant x0 prediction is integrated without error, noise or not, from and to infinite log-SNR."""
    options = for_schedule(schedule, solver, options)
    if options is None:
        return
    rng = np.random.default_rng(0)
    kinds = {"vp": ("eps", "x0", "v", "flow"), "edm": ("eps", "x0"), "flow": ("x0", "v", "flow")}[schedule.kind]
    for kind in kinds:
        for steps in (1, 2, 5):
            plan = make_plan(schedule, solver, steps, prediction=kind, **options)
            got = run_plan(plan, POINT.denoiser(plan), NOISE, draw=lambda k: rng.normal(size=NOISE.shape))
            np.testing.assert_allclose(got, 0.7, atol=1e-10)


@pytest.mark.parametrize(("solver", "options"), VARIED)
def test_eps_from_pure_noise_is_refused(solver, options):
    with pytest.raises(PlanError, match="pure noise.*predicts v, x0 or flow"):
        make_plan(FLOW, solver, 5, **options)


NFE = {
    ("heun", ()): 13,
    ("flow_heun", ()): 13,
    ("dpmpp_2s", ()): 13,
    ("dpm_solver", (("variant", "singlestep"), ("order", 3))): 19,
    ("dpm_solver", (("variant", "singlestep"), ("order", 1))): 7,
    ("pndm", ()): 16,
    ("pndm", (("skip_prk", True),)): 8,
}


@pytest.mark.parametrize(("case", "nfe"), NFE.items())
def test_evaluations_are_counted(case, nfe):
    """7 steps to sigma = 0: the last one is always of one evaluation."""
    solver, options = case
    schedule = FLOW if solver.startswith("flow_") else VP
    kind = "flow" if schedule is FLOW else "eps"
    assert make_plan(schedule, solver, 7, prediction=kind, **dict(options)).nfe == nfe


def test_one_evaluation_a_step_otherwise():
    several = {"heun", "flow_heun", "dpmpp_2s", "pndm"}
    for solver in set(SOLVERS) - several:
        schedule = FLOW if solver.startswith("flow_") else VP
        assert make_plan(schedule, solver, 7, prediction="v").nfe == 7


def test_inner_stages_live_in_a_slot_of_their_own_and_nothing_is_copied():
    plan = make_plan(EDM, "heun", 3)
    assert [step.x for step in plan.steps] == ["x", "u", "x", "u", "x"]
    assert [step.ops[-1].dst for step in plan.steps] == ["u", "x", "u", "x", "x"]
    assert [step.sigma for step in plan.steps] == [20.0, *[plan.steps[2].sigma] * 2, 0.01, 0.01]
    for solver, options in VARIED:
        if solver == "bdia":  # its state moves on to the slot of the one before
            continue
        schedule = FLOW if solver.startswith("flow_") else VP
        for op in make_plan(schedule, solver, 9, prediction="v", **options).ops():
            slots = [slot for slot, _ in op.terms]
            assert op.dst in ("x", "u") or not any(slot[0] == "m" for slot in slots), "history is written once"
            assert slots not in (["x"], ["u"])


def test_churn_raises_the_noise_in_the_row_before():
    plan = make_plan(EDM, "heun", 4, s_churn=1.0)
    first = plan.steps[0]
    assert first.variant is None and first.sigma == 20.0 and plan.nfe == 7 and len(plan.steps) == 8
    assert (
        plan.steps[1].restart
        and plan.steps[1].sigma == pytest.approx(25.0)
        and plan.steps[1].timestep == plan.steps[1].sigma
    )
    assert [step.restart for step in plan.steps] == [False, True, False, True, False, True, False, True]
    draws = [slot for op in plan.ops() for slot, _ in op.terms if slot.startswith("noise:")]
    assert draws == [f"noise:{k}" for k in range(5)]
    limited = make_plan(EDM, "heun", 4, s_churn=1.0, s_tmax=5.0)
    assert limited.steps[0].variant is not None and not limited.steps[0].restart


def test_churned_plans_run_in_the_engine_as_in_the_interpreter():
    """The row without evaluation, the raised levels and the noise of the request, through `sample`."""
    data = oracle.Gaussian.narrow()
    twin = Gaussian(data.mean.numpy(), data.variance.sqrt().numpy())
    for solver in ("heun", "euler", "dpmpp_2s", "pndm", "dpmpp_3m"):
        plan = make_plan(EDM, solver, 6, **({"s_churn": 2.0} if solver in ("heun", "euler") else {}))
        noise = torch.as_tensor(NOISE)
        got = sample(oracle.denoiser_for(data, plan), plan, noise, seed=5)
        if solver in ("heun", "euler"):
            again = sample(oracle.denoiser_for(data, plan), plan, noise, seed=6)
            assert (got - again).abs().max() > 1e-3
        else:
            np.testing.assert_allclose(got, run_plan(plan, twin.denoiser(plan), NOISE), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "options"), VARIED)
def test_plans_survive_files_tails_and_guidance(tmp_path, solver, options):
    schedule = FLOW if solver.startswith("flow_") else VP
    plan = make_plan(schedule, solver, 8, prediction="v", **options)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    tail = plan.tail(0.5)
    assert 4 <= tail.nfe <= 4 + 9 and str(tail)
    guided = apply_guidance(plan, 3.0)
    assert guided.branch_evals == 2 * plan.nfe


@pytest.mark.parametrize("kind", ["clamp", "dynamic_threshold"])
def test_transforms_act_on_x0_in_every_form(kind):
    """History of eps is that of the changed x0: with a clamp to the point itself every solver ends there."""
    grid = vp_grid([*LAMS[:7]])
    change = Transform("clamp", "m0", params=(("low", 0.4), ("high", 0.4)))
    if kind == "dynamic_threshold":
        change = Transform(kind, "m0", params=(("ratio", 0.9), ("max", 1.0)))
    makers = [
        lagrange_rows(grid, "eps", [3] * 6, form="eps", variable="rho", transform=change),
        dpmpp_rows(grid, "eps", [3] * 6, "heun", change, form="eps"),
        unipc_rows(grid, "eps", [2] * 6, "bh2", [True] * 6, change, form="eps"),
        singlestep_rows(grid, "eps", [3, 3], "midpoint", change, form="eps"),
        churned_rows(grid, "eps", [0.0] * 6, [True] * 5 + [False], transform=change),
    ]
    for rows in makers:
        plan = Plan(rows, "eps", plan_on(grid, "ddim").init)
        got = run_plan(plan, lambda x, t, i: np.tanh(x), NOISE)
        assert np.isfinite(got).all()
        if kind == "clamp":  # x0 constant: x' = alpha' 0.4 + (sigma'/sigma)(x - alpha 0.4)
            keep = grid.sigmas[6] / grid.sigmas[0]
            want = grid.alphas[6] * 0.4 + keep * (NOISE - grid.alphas[0] * 0.4)
            np.testing.assert_allclose(got, want, atol=1e-12)


def test_rows_may_step_to_levels_of_their_own():
    grid = edm_grid(LAMS[:4])
    ends = [(1.0, 0.5 * sigma) for sigma in grid.sigmas[:3]]
    for rows in (ddim_rows(grid, "eps", ends, eta=0.5), ddpm_rows(grid, "eps", ends), lcm_rows(grid, "eps", ends)):
        assert len(rows) == 3
    plain = dict(ddim_rows(grid, "x0", ends)[1].ops[-1].terms)
    assert plain == pytest.approx({"x": 0.5, "m0": 0.5})


def test_lcm_moves_to_the_timesteps_of_distillation():
    assert [step.timestep for step in make_plan(VP, "lcm", 2).steps] == [999.0, 499.0]
    kept = make_plan(VP, "lcm", 3, original_steps=None)
    assert kept.steps[1].timestep == make_plan(VP, "ddim", 3).steps[1].timestep
    with pytest.raises(ArgumentError, match="share one of the 50"):
        make_plan(VP, "lcm", 3, timesteps=[999.0, 995.0, 10.0])


def test_lagrange_takes_an_order_a_row():
    plan = make_plan(VP, "lagrange", 5, orders=[1, 1, 3, 2, 1], form="eps", variable="rho", final="sigma_min")
    assert [len(step.ops[-1].terms) - 1 for step in plan.steps] == [1, 1, 3, 2, 1]
    assert make_plan(VP, "lagrange", 4, orders=[1, 2, 3, 4]).recipe is not None


def test_many_terms_of_history_still_fit_the_fused_step():
    plan = make_plan(VP, "lagrange", 12, order=4, lower_order_final=False)
    data = oracle.Gaussian.narrow()
    assert torch.isfinite(sample(oracle.denoiser_for(data, plan), plan, torch.as_tensor(NOISE))).all()


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("ddpm", {"variance": "learned"}, "ddpm: variance: unknown 'learned'; known: fixed_small, fixed_large"),
        ("euler", {"s_churn": -1.0}, "euler: s_churn must be a number >= 0"),
        ("heun", {"s_noise": math.inf}, "heun: s_noise"),
        ("heun", {"s_tmax": "5"}, "heun: s_tmax"),
        ("euler_ancestral", {"eta": 1.5}, r"eta must be a number in \[0, 1\]"),
        ("dpm_solver", {"order": 4}, "dpm_solver: order must be an integer in 1..3"),
        ("dpm_solver", {"variant": "fast"}, "known: multistep, singlestep"),
        ("dpm_solver", {"solver_type": "taylor"}, "known: midpoint, heun"),
        ("dpmpp_2s", {"r1": 0.0}, "r1 must be above 0"),
        ("dpmpp_2s", {"r1": 1.5}, "dpmpp_2s: r1"),
        ("dpmpp_3m", {"variant": "exact"}, "known: third_order, published"),
        ("dpmpp_2m_sde", {"eta": -0.5}, "dpmpp_2m_sde: eta"),
        ("deis", {"order": 5}, "1..4"),
        ("deis", {"variant": "rhoab3"}, "did you mean 'rhoab'"),
        ("ipndm", {"order": 0}, "1..4"),
        ("pndm", {"skip_prk": 1}, "skip_prk must be True or False"),
        ("lcm", {"original_steps": 3}, "original_steps must be None or an integer of at least the 5 steps"),
        ("lcm", {"sigma_data": -1}, "lcm: sigma_data"),
        ("lagrange", {"form": "v"}, "known: x0, eps"),
        ("lagrange", {"orders": [1, 2]}, r"one order a row \(5\)"),
        ("lagrange", {"orders": [1, 2, 3, 4, 5]}, "orders: order must be an integer in 1..4"),
        ("flow_heun", {}, "flow_heun: needs a flow schedule"),
    ],
)
def test_wrong_options_are_one_clear_line(solver, options, message):
    with pytest.raises(ArgumentError, match=message) as raised:
        make_plan(VP, solver, 5, **options)
    assert "\n" not in str(raised.value)


def test_interface_names_are_registered():
    names = "ddim ddpm euler euler_ancestral heun dpmpp_2s dpmpp_2m dpmpp_3m dpmpp_2m_sde unipc deis pndm ipndm lms "
    names += "flow_euler flow_heun lcm"
    assert set(names.split()) <= set(SOLVERS)
    assert solver_options("dpmpp_3m")["variant"] == "third_order" and solver_options("heun")["s_churn"] == 0.0


def test_levels_between_rows_need_a_schedule():
    bare = Grid((3.0, 2.0), (1.0,) * 3, (3.0, 2.0, 1.0))
    for solver, options in (("dpmpp_2s", {}), ("pndm", {}), ("heun", {"s_churn": 1.0})):
        with pytest.raises(ArgumentError, match="levels between rows"):
            plan_on(bare, solver, "eps", **options)
