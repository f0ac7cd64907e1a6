"""The generic rule against closed forms: golden rows, exactness for polynomials, the sum of the weights."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

from tests.engine.interpreter import row
from tests.engine.solver_grids import FLOW, edm_grid, flow_grid, plan_on, vp_grid
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.solvers.dpmpp import dpmpp_rows
from vivace.engine.solvers.quadrature import lagrange_rows, lagrange_weights
from vivace.engine.solvers.unipc import unipc_rows
from vivace.engine.timesteps import Grid, make_grid
from vivace.errors import ArgumentError

GOLDEN = (-2.0, -1.0, 0.2, 1.5)  # VP; the row from 0.2 to 1.5
KEEP = {"x0": 0.343768762529499727, "eps": 1.26138957478108466}
# Integrals to 18 digits, newest value first.
EXACT = [
    ("x0", "lam", [0.710008271905670636]),
    ("x0", "lam", [1.175667005729141, -0.46565873382347036]),
    ("x0", "lam", [1.63112382155166147, -1.4676637286330154, 0.546548178987024565]),
    ("x0", "rho", [0.923760074869538345, -0.23683879510509129, 0.0230869921412235805]),
    ("eps", "lam", [-0.58130560714892623]),
    ("eps", "lam", [-1.05184787130638194, 0.736994642837553723, -0.266452378680098017]),
    ("eps", "rho", [-0.6724392357147489, 0.0911336285658226708]),
    ("eps", "rho", [-0.704294453419828203, 0.135944003070220293, -0.0129551567993183199]),
    ("eps", "t", [-1.07190958865821331, 0.959586945670556671, -0.468982964161269589]),  # t of a flow
]


@pytest.mark.parametrize(("form", "variable", "weights"), EXACT)
def test_weights_of_the_generic_rule_are_exact_to_rounding(form, variable, weights):
    grid = vp_grid(GOLDEN)
    levels = [grid.level(index) for index in (2, 1, 0)][: len(weights)]
    keep, got = lagrange_weights(form, variable, levels, grid.level(3), FLOW.t_of_lam)
    assert keep == pytest.approx(KEEP[form], rel=1e-14)
    assert got == pytest.approx(weights, rel=1e-14)


SOLVERS = [
    ("ddim", {}, "x0", [0.71000827]),
    ("euler", {}, "x0", [0.71000827]),
    ("dpmpp_2m", {}, "x0", [1.09459609, -0.38458781]),
    ("dpmpp_2m", {"variant": "heun"}, "x0", [1.17566701, -0.46565873]),
    ("dpmpp_3m", {}, "x0", [1.63112382, -1.46766373, 0.54654818]),
    ("dpmpp_3m", {"variant": "published"}, "x0", [1.53039325, -1.24605647, 0.42567149]),
    ("lagrange", {}, "x0", [1.63112382, -1.46766373, 0.54654818]),
    ("deis", {"variant": "rhoab", "order": 2}, "eps", [-0.67243924, 0.09113363]),
    ("deis", {"variant": "rhoab", "order": 3}, "eps", [-0.70429445, 0.13594400, -0.01295516]),
    ("deis", {"variant": "logrho", "order": 3}, "eps", [-1.05184787, 0.73699464, -0.26645238]),
    ("lms", {}, "eps", [-0.70429445, 0.13594400, -0.01295516]),
    ("dpm_solver", {"order": 1}, "eps", [-0.58130561]),
    ("dpm_solver", {"order": 3}, "eps", [-1.05184787, 0.73699464, -0.26645238]),
    ("ipndm", {"order": 2}, "eps", [-0.58130561 * 1.5, 0.58130561 / 2]),
]


@pytest.mark.parametrize(("solver", "options", "form", "weights"), SOLVERS)
def test_golden_rows(solver, options, form, weights):
    final = {} if solver in ("ddim", "euler", "ipndm") else {"lower_order_final": False}
    got = row(plan_on(vp_grid(GOLDEN), solver, form, **options, **final), 2)
    want = {"x": KEEP[form]} | {f"m:{age}": weight for age, weight in enumerate(weights)}
    assert got == pytest.approx(want, abs=1.01e-8)


def test_golden_row_of_the_sde():
    plan = plan_on(vp_grid(GOLDEN), "dpmpp_2m_sde", lower_order_final=False)
    want = {"x": 0.09368792, "m:0": 1.39290832, "m:1": -0.48940022, "noise:3": 0.20953134}
    assert row(plan, 2) == pytest.approx(want, abs=1.01e-8)


steps = st.lists(st.floats(0.05, 1.5), min_size=4, max_size=8)
VARIABLES = [(form, variable) for form in ("x0", "eps") for variable in ("lam", "rho", "t")]


def integral(form, variable, polynomial, start, end):
    """int P(u) d kappa or d rho over lam from start to end, by integration by parts or in closed form."""
    if variable == "lam":
        terms = [polynomial.deriv(k) for k in range(polynomial.degree() + 1)]
        if form == "x0":
            return [math.exp(s) * sum((-1) ** k * term(s) for k, term in enumerate(terms)) for s in (start, end)]
        return [math.exp(-s) * sum(term(s) for term in terms) for s in (start, end)]
    if variable == "rho" and form == "eps":
        return [polynomial.integ()(math.exp(-s)) for s in (start, end)]
    if variable == "rho":  # d kappa = -d rho / rho^2
        c, (a, b) = [*polynomial.coef, 0, 0, 0], (math.exp(-start), math.exp(-end))
        return [c[0] / r - c[1] * math.log(r) - c[2] * r - c[3] * r**2 / 2 for r in (a, b)]
    nodes, masses = np.polynomial.legendre.leggauss(60)
    a, b = 1 / (1 + math.exp(start)), 1 / (1 + math.exp(end))
    t = a + 0.5 * (b - a) * (nodes + 1)
    density = (1 - t) ** -2 if form == "eps" else -(t**-2.0)
    return [0.0, float(0.5 * (b - a) * masses @ (polynomial(t) * density))]


@settings(deadline=None, max_examples=30)
@given(steps, st.sampled_from(VARIABLES), st.integers(1, 4))
def test_polynomial_predictions_are_integrated_exactly(lengths, rule, order):
    """A value that is a polynomial of degree < order in u gives the exact solution, row after row."""
    form, variable = rule
    lams = np.cumsum([-2.0, *lengths])
    grid = flow_grid(lams)
    value = Polynomial(np.array([0.7, -0.4, 0.3, 0.1])[:order])
    at = {"lam": lams, "rho": np.exp(-lams), "t": np.array(grid.sigmas)}[variable]
    steps = lagrange_rows(grid, form, [order] * grid.steps, form=form, variable=variable)
    held = {}
    for index, step in enumerate(steps):
        held[step.ops[0].dst] = value(at[index])
        if index + 1 < order:
            continue
        terms = dict(step.ops[1].terms)
        x = 0.3
        got = sum(coef * (x if slot == "x" else held[slot]) for slot, coef in terms.items())
        start, end = grid.level(index), grid.level(index + 1)
        unit = 0 if form == "eps" else 1
        before, after = integral(form, variable, value, lams[index], lams[index + 1])
        want = end[unit] / start[unit] * x + end[unit] * (after - before)
        scale = sum(abs(coef) for coef in terms.values())
        assert got == pytest.approx(want, abs=1e-12 * scale)


@settings(deadline=None, max_examples=30)
@given(steps, st.sampled_from(["x0", "eps"]), st.integers(1, 4))
def test_weights_sum_to_those_of_the_first_order(lengths, form, order):
    """A constant prediction is integrated exactly by every rule."""
    grid = flow_grid(np.cumsum([-2.0, *lengths]))
    made = [lagrange_rows(grid, form, [order] * grid.steps, form=form, variable=u) for u in ("lam", "rho", "t")]
    if order < 4:
        for third in ("third_order", "published"):
            made.append(dpmpp_rows(grid, form, [order] * grid.steps, "midpoint", form=form, third=third))
        made.append(unipc_rows(grid, form, [order] * grid.steps, "bh2", [True] * grid.steps, form=form))
    for steps in made:
        for index, step in enumerate(steps):
            terms = dict(step.ops[1].terms)
            start, end = grid.level(index), grid.level(index + 1)
            keep = end[1] / start[1] if form == "x0" else end[0] / start[0]
            total = end[0] - keep * start[0] if form == "x0" else end[1] - keep * start[1]
            assert terms.pop("x") == pytest.approx(keep, rel=1e-13)
            assert sum(terms.values()) == pytest.approx(total, abs=1e-12 * sum(map(abs, terms.values())))


def test_one_rule_has_many_names():
    """DPM-Solver++ heun and 3M, UniP-3, DPM-Solver-3 and DEIS logrho are rows of the generic rule."""
    grid = vp_grid()
    asked = [3] * grid.steps

    def same(one, two):
        for a, b in zip(one, two, strict=True):
            got, want = dict(a.ops[-1].terms), dict(b.ops[-1].terms)
            assert got == pytest.approx(want, abs=1e-13 * max(map(abs, want.values())))

    lam = {form: lagrange_rows(grid, form, asked, form=form, variable="lam") for form in ("x0", "eps")}
    for form in ("x0", "eps"):
        same(dpmpp_rows(grid, form, asked, "heun", form=form, third="third_order"), lam[form])
    two = lagrange_rows(grid, "x0", [2] * grid.steps, form="x0", variable="lam")
    same(dpmpp_rows(grid, "x0", [2] * grid.steps, "heun"), two)
    for variant in ("bh1", "bh2"):  # from the row on that has three values
        same(unipc_rows(grid, "x0", asked, variant, [False] * grid.steps)[2:], lam["x0"][2:])
        same(unipc_rows(grid, "eps", asked, variant, [False] * grid.steps, form="eps")[2:], lam["eps"][2:])
    tab = plan_on(edm_grid(), "deis", "eps", lower_order_final=False)
    rho = plan_on(edm_grid(), "deis", "eps", variant="rhoab", lower_order_final=False)
    same(tab.steps, rho.steps)  # t is rho in EDM


def test_rows_stay_finite_at_both_infinite_ends():
    """From pure noise and to sigma = 0 the rule drops to first order; rho rows may keep their order to sigma = 0."""
    grid = Grid((1.0, 0.6, 0.3, 0.1), (0.0, 0.4, 0.7, 0.9, 1.0), (1.0, 0.6, 0.3, 0.1, 0.0), FLOW)
    for form, variable in VARIABLES:
        steps = lagrange_rows(grid, "v", [3] * 4, form=form, variable=variable)
        assert all(math.isfinite(coef) for step in steps for op in step.ops for _, coef in op.terms)
        assert len(steps[-1].ops[-1].terms) <= 2
    kept = lagrange_rows(grid, "v", [3] * 4, form="eps", variable="rho", to_zero=True)
    assert len(kept[-1].ops[-1].terms) == 4  # x and the three rows below pure noise
    first = dict(lagrange_rows(grid, "v", [3] * 4, form="eps", variable="lam")[0].ops[-1].terms)
    assert first == pytest.approx({"x": 0.6, "out": -0.4})  # x0 = -v, eps = x


def test_repeated_levels_in_history_are_not_interpolated():
    grid = Grid((3.0, 2.0, 2.0, 1.0), (1.0,) * 5, (3.0, 2.0, 2.0, 1.0, 0.5), None)
    for steps in (
        lagrange_rows(grid, "eps", [3] * 4, form="eps", variable="rho"),
        dpmpp_rows(grid, "eps", [3] * 4, "midpoint"),
    ):
        assert all(math.isfinite(coef) for step in steps for op in step.ops for _, coef in op.terms)


@pytest.mark.parametrize("train_steps", [50, 1000])
def test_time_of_a_discrete_schedule_is_integrated_across_its_kinks(train_steps):
    """t of lam has a kink at every training timestep; the rule is exact all the same: against trapezoids."""
    schedule = NoiseSchedule.vp(np.linspace(0.1, 20.0, train_steps) / train_steps)
    grid = make_grid(schedule, 6)
    terms = dict(plan_on(grid, "deis", "eps", lower_order_final=False).steps[3].ops[-1].terms)
    nodes = np.array(grid.timesteps[1:4])[::-1]
    lam = np.linspace(grid.lam(3), grid.lam(4), 400_001)
    t = schedule.t_of_lam(lam)
    rho = np.exp(-lam)
    for age, slot in enumerate(("m0", "m2", "m1")):
        others = np.delete(nodes, age)
        basis = np.prod([(t - other) / (nodes[age] - other) for other in others], axis=0)
        want = grid.alphas[4] * 0.5 * (basis[1:] + basis[:-1]) @ np.diff(rho)
        assert terms[slot] == pytest.approx(want, rel=2e-9)


def test_rules_in_time_need_a_schedule():
    bare = Grid((3.0, 2.0), (1.0,) * 3, (3.0, 2.0, 1.0))
    with pytest.raises(ArgumentError, match="use a grid of make_grid or give it a schedule"):
        plan_on(bare, "deis", "eps")
    with pytest.raises(ArgumentError, match="variable: unknown 'tau'"):
        plan_on(bare, "lagrange", variable="tau")
