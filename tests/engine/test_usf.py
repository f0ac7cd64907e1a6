"""Schedules of decisions: against a transcription in Newton's form, integrals in closed form; neutral ones exactly."""

import math

import numpy as np
import pytest
import torch

from tests.engine.solver_grids import EDM, FLOW, VP
from vivace.bench.oracle import EDM as WIDE
from vivace.bench.oracle import Mixture, denoiser_for, even_grid, plan_on
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.solvers import solver_rows
from vivace.engine.timesteps import make_grid
from vivace.errors import ArgumentError

SEVEN = Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(32, 2)))


# ---------------------------------------------------------------- transcription
def powers(nodes):
    """Coefficients, in powers of u - nodes[0], of 1, (u - u0), (u - u0)(u - u1), ..."""
    out, last = [np.array([1.0])], np.array([1.0])
    for node in nodes[:-1]:
        last = np.convolve(last, [nodes[0] - node, 1.0])
        out.append(last)
    return out


def moments(form, variable, base, start, end, count):
    """int (u - base)^k of the form's measure from lam `start` to `end`, k = 0, 1, ..., without quadrature."""
    if variable == "rho":
        a, b = math.exp(-start) - base, (0.0 if end == math.inf else math.exp(-end)) - base
        assert form == "eps"
        return [(b ** (k + 1) - a ** (k + 1)) / (k + 1) for k in range(count)]
    sign = 1.0 if form == "x0" else -1.0
    weight = [math.exp(sign * lam) for lam in (start, end)]
    found = []
    for k in range(count):  # by parts: int v^k e^(s v) = s v^k e^(s v) - s k int v^(k-1) e^(s v)
        edge = sign * ((end - base) ** k * weight[1] - (start - base) ** k * weight[0])
        found.append(edge - sign * k * found[k - 1] if k else edge)
    return [sign * value for value in found]  # d kappa = e^lam d lam, d rho = -e^-lam d lam


def differences(nodes, values):
    """f[u0], f[u0, u1], ..."""
    table, out = list(values), [values[0]]
    for k in range(1, len(nodes)):
        table = [(b - a) / (nodes[i + k] - nodes[i]) for i, (a, b) in enumerate(zip(table, table[1:], strict=False))]
        out.append(table[0])
    return out


def moved(x, levels, form, variable, nodes, values, factors):
    """One step of the integral form with the relaxed Newton polynomial through (nodes, values)."""
    (a, s), (a2, s2) = levels
    start, end = math.log(a / s), math.inf if s2 == 0.0 else math.log(a2 / s2)
    integrals = moments(form, variable, nodes[0], start, end, len(nodes))
    total = 0.0
    for factor, basis, slope in zip((1.0, *factors), powers(nodes), differences(nodes, values), strict=False):
        total = total + factor * slope * sum(c * m for c, m in zip(basis, integrals, strict=False))
    if form == "x0":
        return s2 / s * x + s2 * total
    return a2 / a * x + a2 * total


def transcribed(grid, decided, free=None, fed=None):
    """Liu et al. 2023: a loop over rows; `decided`: (order, form, variable, corrected, factors)."""
    x = math.hypot(*grid.level(0)) * NOISE
    state, history, pending = x, [], None
    for row, (order, form, variable, corrected, factors) in enumerate(decided):
        level, after = grid.level(row), grid.level(row + 1)
        x0 = torch.full_like(state, free) if row == 0 and free is not None else SEVEN.x0(state, *level)
        history.append({"x0": x0, "eps": (state - level[0] * x0) / level[1], "level": level})
        if pending is not None:
            state = pending(history)

        def nodes_of(entries, variable=variable):
            lams = [math.log(e["level"][0] / e["level"][1]) for e in entries]
            return lams if variable == "lam" else [math.exp(-lam) for lam in lams]

        entries = history[::-1][:order]
        factors = (*factors, *[1.0] * 4)
        before = state
        state = moved(before, (level, after), form, variable, nodes_of(entries), [e[form] for e in entries], factors)

        def redo(known, before=before, levels=(level, after), form=form, variable=variable, order=order, of=nodes_of):
            entries = known[::-1][: order + 1]
            return moved_from(before, levels, form, variable, of(entries), [e[form] for e in entries])

        pending = redo if corrected else None
    return state


def moved_from(x, levels, form, variable, nodes, values):
    """A corrected step: the polynomial also goes through the value at the step's end, which is nodes[0]."""
    return moved(x, levels, form, variable, nodes, values, (1.0,) * 4)


DECIDED = [
    (1, "x0", "lam", True, ()),
    (2, "x0", "lam", False, (0.7,)),
    (2, "eps", "lam", True, (1.2,)),
    (3, "x0", "lam", True, (0.9, 0.4)),
    (3, "eps", "rho", False, (1.0, 0.0)),
    (4, "eps", "lam", False, (1.1, 1.0, 0.5)),
    (3, "x0", "lam", False, ()),
    (2, "eps", "rho", False, (0.6,)),
]


def options_of(decided):
    names = ("orders", "forms", "variables", "corrected", "relaxation")
    columns = [list(column) for column in zip(*decided, strict=True)]
    columns[4] = [list(values) for values in columns[4]]
    return dict(zip(names, columns, strict=True))


@pytest.mark.parametrize("free", [None, 0.0, 0.3])
def test_rows_agree_with_the_transcription(free):
    grid = even_grid(WIDE, len(DECIDED))
    plan = plan_on(grid, "usf", "eps", options_of(DECIDED) | {"afs": free})
    got = sample(denoiser_for(SEVEN, plan), plan, NOISE)
    want = transcribed(grid, DECIDED, free)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert plan.nfe == len(DECIDED) - (free is not None)


def test_a_last_row_in_eps_and_rho_goes_to_no_noise():
    grid = make_grid(EDM, len(DECIDED))
    plan = plan_on(grid, "usf", "x0", options_of(DECIDED))
    assert grid.level(grid.steps) == (1.0, 0.0) and len(plan.steps[-1].ops[-1].terms) > 2
    got = sample(denoiser_for(SEVEN, plan), plan, NOISE)
    torch.testing.assert_close(got, transcribed(grid, DECIDED), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- neutral
@pytest.mark.parametrize("schedule", [VP, EDM, FLOW], ids=lambda s: s.kind)
@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("variable", ["lam", "t"])
def test_neutral_rows_are_those_of_lagrange(schedule, form, variable):
    for order in (1, 2, 3, 4):
        known = {"order": order, "form": form, "variable": variable, "lower_order_final": False}
        base = make_plan(schedule, "lagrange", 7, prediction="v", **known)
        plan = make_plan(schedule, "usf", 7, prediction="v", orders=order, forms=form, variables=variable)
        assert plan.steps == base.steps
        ones = [[1.0] * 3] * 7
        same = make_plan(
            schedule,
            "usf",
            7,
            prediction="v",
            orders=[order] * 7,
            forms=[form] * 7,
            variables=variable,
            relaxation=ones,
        )
        assert same.steps == base.steps


def test_the_midpoint_rule_is_a_relaxation():
    grid = even_grid(WIDE, 6)
    base = plan_on(grid, "dpmpp_2m", "eps", {"lower_order_final": False})
    h = grid.lam(1) - grid.lam(0)
    factor = 0.5 * h * (1 - math.exp(-h)) / (h + math.exp(-h) - 1)
    plan = plan_on(grid, "usf", "eps", {"orders": 2, "relaxation": [[factor]] * 6})
    for one, two in zip(plan.steps, base.steps, strict=True):
        assert [s for s, _ in one.ops[-1].terms] == [s for s, _ in two.ops[-1].terms]
        np.testing.assert_allclose([c for _, c in one.ops[-1].terms], [c for _, c in two.ops[-1].terms], rtol=1e-12)


# ---------------------------------------------------------------- plans
def test_a_tail_takes_the_decisions_of_its_rows_and_evaluates_its_first():
    plan = make_plan(VP, "usf", 8, afs=0.1, fed=[float(t) for t in range(900, 100, -100)], **options_of(DECIDED))
    tail = plan.tail(0.5)
    assert tail.nfe == 4 and [step.timestep for step in tail.steps] == [500.0, 400.0, 300.0, 200.0]
    cut = solver_rows("usf", make_grid(VP, 8).tail(4), "eps", options_of(DECIDED[4:])).steps
    assert [step.ops for step in tail.steps] == [step.ops for step in cut]


def test_plans_are_written_and_made_again(tmp_path):
    plan = make_plan(VP, "usf", 8, prediction="v", afs=-0.2, **options_of(DECIDED))
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan and read.hash == plan.hash
    assert read.again().steps == plan.steps
    assert plan.again(afs=None).nfe == 8 and plan.nfe == 7
    with pytest.raises(ArgumentError, match="orders holds 8 values, the plan 9 rows"):
        plan.again(steps=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orders": 5}, "order must be an integer in 1..4"),
        ({"orders": [1, 2]}, "orders holds 2 values, the plan 4 rows"),
        ({"forms": "v"}, "usf: forms: unknown 'v'"),
        ({"variables": ["lam", "lam", "rho", "u"]}, "unknown 'u'"),
        ({"corrected": 1}, "corrected must be True or False"),
        ({"relaxation": [0.5] * 4}, r"relaxation\[0\] is 0.5; a list of at most 3"),
        ({"relaxation": [[1.0] * 4] * 4}, "a list of at most 3"),
        ({"relaxation": [[], [math.inf], [], []]}, r"relaxation\[1\] must be a number"),
        ({"fed": [1.0, 2.0]}, "fed holds 2 values"),
        ({"afs": "x"}, "afs must be a number"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_plan(EDM, "usf", 4, **options)


def test_a_single_free_row_is_refused():
    with pytest.raises(ArgumentError, match="two rows or more"):
        make_plan(EDM, "usf", 1, afs=0.0)
