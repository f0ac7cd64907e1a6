"""What rows that do not compute everything mean to a multistep solver: the option `history`, and who sets it."""

import math

import numpy as np
import pytest

from tests.engine.interpreter import Gaussian, run_plan
from tests.engine.test_planners import SPEC
from vivace.engine import planners
from vivace.engine.interchange import to_scheduler_config
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_block_cache, apply_guidance
from vivace.engine.plan import Affine, Plan
from vivace.engine.planning import make_plan, replan
from vivace.engine.solvers import SOLVERS, solver_options
from vivace.errors import ArgumentError, PlanError, UnsupportedError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
SOLVER_OPTIONS = [
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"variant": "heun"}),
    ("dpmpp_3m", {}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3, "corrector": False}),
    ("deis", {"order": 3}),
    ("deis", {"order": 2, "variant": "rhoab"}),
    ("dpm_solver", {"order": 2}),
    ("lms", {"order": 3}),
    ("lagrange", {"order": 3, "form": "eps"}),
]
ROWS = 14
CACHED = (2, 3, 5, 6, 8, 9, 11)


def plan_of(solver, **options):
    return make_plan(VP, solver, ROWS, grid="logsnr", final="sigma_min", **options)


def sources(plan):
    """Of every row the rows whose kept values its update of x reads."""
    written, out = {}, []
    for row, step in enumerate(plan.steps):
        *kept, update = [op for op in step.ops if isinstance(op, Affine)]
        for op in kept:
            if op.dst.startswith("m"):
                written[op.dst] = row
        out.append({written[slot] for slot, _ in update.terms if slot.startswith("m")})
    return out


@pytest.mark.parametrize(("solver", "options"), SOLVER_OPTIONS)
def test_own_is_the_plain_solver(solver, options):
    plain = plan_of(solver, **options)
    assert plan_of(solver, **options, history="own", cached=CACHED).steps == plain.steps
    for history in ("lower_order", "computed"):
        assert plan_of(solver, **options, history=history).steps == plain.steps


@pytest.mark.parametrize(("solver", "options"), SOLVER_OPTIONS)
def test_computed_reads_computed_rows_and_the_row_itself(solver, options):
    plan = plan_of(solver, **options, history="computed", cached=CACHED)
    for row, read in enumerate(sources(plan)):
        assert not (read - {row}) & set(CACHED)
    assert any(len(read) > 1 for row, read in enumerate(sources(plan)) if row in CACHED)


@pytest.mark.parametrize(("solver", "options"), [*SOLVER_OPTIONS, ("ipndm", {})])
def test_lower_order_builds_up_anew_after_a_cached_row(solver, options):
    plan = plan_of(solver, **options, history="lower_order", cached=CACHED)
    for row, read in enumerate(sources(plan)):
        last = max((other for other in CACHED if other <= row), default=-1)
        assert min(read) > last or read == {row}
        assert row not in CACHED or read == {row}


def test_history_with_gaps_is_the_published_formula_on_the_gaps_levels():
    """DPM-Solver++ 2M, algorithm 2, with the last computed row in place of the row before."""
    plan = plan_of("dpmpp_2m", history="computed", cached=CACHED)
    for row in (4, 7, 10):
        (before,) = sources(plan)[row] - {row}
        assert before == row - 3
        step, end = plan.steps[row], plan.steps[row + 1]
        h = end.lam - step.lam
        r = (step.lam - plan.steps[before].lam) / h
        whole = end.alpha * -math.expm1(-h)
        kept = [op.dst for op in step.ops][0]
        terms = dict(step.ops[-1].terms)
        assert terms.pop("x") == pytest.approx(end.sigma / step.sigma, rel=1e-12)
        assert terms.pop(kept) == pytest.approx(whole * (1 + 0.5 / r), rel=1e-12)
        assert list(terms.values()) == pytest.approx([-0.5 * whole / r], rel=1e-12)


@pytest.mark.parametrize("history", ["lower_order", "computed"])
@pytest.mark.parametrize(("solver", "options"), SOLVER_OPTIONS)
def test_every_history_is_consistent(solver, options, history):
    """A constant prediction is integrated exactly, whatever is read."""
    point = Gaussian(np.full(3, 0.4), np.zeros(3))
    plan = make_plan(VP, solver, ROWS, **options, history=history, cached=CACHED)
    noise = np.random.default_rng(0).normal(size=(2, 3))
    np.testing.assert_allclose(run_plan(plan, point.denoiser(plan), noise), 0.4, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "options", "order"), [("dpmpp_2m", {}, 2), ("dpmpp_3m", {}, 3), ("deis", {"order": 2}, 2)]
)
def test_uneven_history_keeps_the_order(solver, options, order):
    """With exact outputs everywhere, reading every other row costs a constant, not the order."""
    data = Gaussian.of()
    errors = []
    for rows in (32, 64, 128):
        cached = tuple(range(5, rows - 1, 2))
        options = options | {"lower_order_final": False}
        plan = make_plan(
            VP, solver, rows, grid="logsnr", final="sigma_min", **options, history="computed", cached=cached
        )
        noise = np.random.default_rng(1).normal(size=(4, 4))
        start = (plan.steps[0].alpha, plan.steps[0].sigma)
        exact = data.flow(noise, start, (VP.alpha(0.0), VP.sigma(0.0)))
        errors.append(np.abs(run_plan(plan, data.denoiser(plan), noise) - exact).max())
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert slopes[-1] > order - 0.3


# ---------------------------------------------------------------- through the pass
@pytest.mark.parametrize("history", ["lower_order", "computed"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "deis"])
def test_the_pass_plans_the_solver_anew_for_the_rows_it_caches(solver, history, tmp_path):
    plan = apply_guidance(make_plan(VP, solver, 12), 3.0, interval=(0.0, 0.75))
    made = apply_block_cache(plan, planners.Fora(3), history=history)
    cached = [1, 2, 4, 5, 7, 10]
    want = apply_guidance(make_plan(VP, solver, 12, history=history, cached=cached), 3.0, interval=(0.0, 0.75))
    assert [step.ops for step in made.steps] == [step.ops for step in want.steps]
    bound = apply_block_cache(plan.bind(SPEC_EPS), planners.Fora(3), history=history)
    assert bound.steps == made.bind(SPEC_EPS).steps
    assert replan(made.recipe) == made and made.recipe.arguments == plan.recipe.arguments
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    tail = made.tail(0.5)
    assert replan(tail.recipe) == tail
    rows = [row - 6 for row in cached if row > 6]
    short = make_plan(VP, solver, 12, history=history, cached=[row + 6 for row in rows]).tail(0.5)
    again = apply_guidance(short, 3.0, interval=(0.0, 3.5 / 6))
    assert [step.ops for step in tail.steps] == [step.ops for step in again.steps]


SPEC_EPS = type(SPEC)("toy", "0" * 64, "eps", (2, 4, 4), 6, (1, 1), width=8)


CLASSES = [
    {"_class_name": "DPMSolverMultistepScheduler"},
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    {"_class_name": "DEISMultistepScheduler"},
    {"_class_name": "UniPCMultistepScheduler", "solver_order": 2},
    {"_class_name": "EDMDPMSolverMultistepScheduler"},
]


@pytest.mark.parametrize("history", ["lower_order", "computed"])
@pytest.mark.parametrize("config", CLASSES, ids=lambda config: config["_class_name"])
def test_plans_from_diffusers_have_histories_too(config, history):
    plan = apply_guidance(Plan.from_diffusers(config, 12), 3.0)
    made = apply_block_cache(plan, planners.Fora(3), history=history)
    cached = {1, 2, 4, 5, 7, 8, 10}
    for made_of, lost in ((made, 0), (made.tail(0.5), 6)):
        rows = {row - lost for row in cached if row > lost}
        for row, read in enumerate(sources(made_of)):
            assert not (read - {row}) & rows and (history == "computed" or row not in rows or read == {row})
    assert replan(made.recipe) == made and sources(made) != sources(plan)
    assert [step.lam for step in made.steps] == [step.lam for step in plan.steps]


def test_a_scheduler_config_holds_no_history_and_leaves_other_caches_alone():
    plan = Plan.from_diffusers({"_class_name": "DPMSolverMultistepScheduler"}, 12)
    mask = planners.StepMask([1, 0] * 6)
    for made in (apply_block_cache(plan, mask), apply_block_cache(plan, mask).tail(0.5)):
        assert to_scheduler_config(made)[0] == to_scheduler_config(plan)[0]
    with pytest.raises(UnsupportedError, match="the rows were changed"):
        to_scheduler_config(apply_block_cache(plan, mask, history="computed"))


def test_histories_of_the_sde_read_computed_rows_and_keep_its_noise():
    plain, made = (plan_of("dpmpp_2m_sde", history=history, cached=CACHED) for history in ("own", "computed"))
    for row, read in enumerate(sources(made)):
        assert not (read - {row}) & set(CACHED)
        noise = [dict(plan.steps[row].ops[-1].terms).get(f"noise:{row + 1}") for plan in (plain, made)]
        assert noise[0] == noise[1]
    with pytest.raises(ArgumentError, match="dpm_solver: history 'computed' is of variant 'multistep'"):
        plan_of("dpm_solver", variant="singlestep", history="computed", cached=(3,))


def test_a_cache_that_gives_nothing_again_leaves_the_solver_alone():
    plan = make_plan(VP, "unipc", 12)
    assert apply_block_cache(plan, planners.Fora(1), history="computed").steps == plan.steps


def test_solvers_without_history_and_plans_without_recipe_say_so():
    with pytest.raises(PlanError, match="again: ddim has no option history; .*dpmpp_2m"):
        apply_block_cache(make_plan(VP, "ddim", 6), planners.Fora(2), history="lower_order")
    bare = Plan(make_plan(VP, "unipc", 6).steps, "eps", make_plan(VP, "unipc", 6).init)
    with pytest.raises(PlanError, match="the plan has no recipe; use 'own'"):
        apply_block_cache(bare, planners.Fora(2), history="computed")
    config = {"_class_name": "DDIMScheduler"}
    with pytest.raises(PlanError, match="DDIMScheduler has no option history; DPMSolverMultistepScheduler"):
        apply_block_cache(Plan.from_diffusers(config, 6), planners.Fora(2), history="computed")
    third = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    with pytest.raises(UnsupportedError, match="keeps every row in its history"):
        apply_block_cache(Plan.from_diffusers(third, 9), planners.Fora(2), history="computed")
    with pytest.raises(ArgumentError, match="ipndm: history 'computed' leaves gaps"):
        make_plan(VP, "ipndm", 6, history="computed", cached=(2,))


@pytest.mark.parametrize("solver", [name for name in SOLVERS if "history" in solver_options(name)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": "older"}, "history: unknown 'older'"),
        ({"history": "lower_order", "cached": (-1,)}, "cached must be row numbers"),
        ({"history": "lower_order", "cached": (1.0,)}, "cached must be row numbers"),
    ],
)
def test_wrong_options_name_the_solver(solver, options, message):
    with pytest.raises(ArgumentError, match=f"{solver}: {message}|{solver}: .*{message}"):
        make_plan(VP, solver, 6, **options)
