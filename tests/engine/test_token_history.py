"""History by token: every token moves like a run of its own that sees only the rows which computed it."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from tests.engine.interpreter import Gaussian
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.passes.token_history import token_history
from vivace.engine.plan import Affine, AgeRef, InputRef, Plan
from vivace.engine.planning import make_plan
from vivace.engine.solvers.rows import first_order, first_order_eps
from vivace.engine.stepper import Stepper
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
FLOW = NoiseSchedule.flow()
SHAPE, PATCH, GRID = (2, 6, 8), (2, 4), (3, 2)
TOKENS, PICTURES, ROWS = math.prod(GRID), 2, 12
# solver, its options, those of its rule of second order without a corrector, rows back that it reads, form of history
SOLVERS = [
    ("dpmpp_2m", {}, ("dpmpp_2m", {}), 1, "x0"),
    ("dpmpp_2m", {"variant": "heun", "lower_order_final": False}, ("dpmpp_2m", {"variant": "heun"}), 1, "x0"),
    ("dpmpp_3m", {}, ("dpmpp_2m", {"variant": "heun"}), 2, "x0"),
    ("dpmpp_3m", {"variant": "published", "lower_order_final": False}, ("dpmpp_2m", {"variant": "heun"}), 2, "x0"),
    ("dpmpp_2m_sde", {}, ("dpmpp_2m_sde", {}), 1, "x0"),
    ("dpmpp_2m_sde", {"eta": 0.4, "variant": "heun"}, ("dpmpp_2m_sde", {"eta": 0.4, "variant": "heun"}), 1, "x0"),
    ("dpm_solver", {"order": 2}, ("dpm_solver", {"order": 2}), 1, "eps"),
    ("dpm_solver", {"order": 3, "solver_type": "heun"}, ("dpm_solver", {"order": 2, "solver_type": "heun"}), 2, "eps"),
    ("unipc", {"order": 2}, ("unipc", {"order": 2, "corrector": False}), 2, "x0"),
    ("unipc", {"order": 2, "variant": "bh1", "form": "eps"},
     ("unipc", {"order": 2, "variant": "bh1", "form": "eps", "corrector": False}), 2, "eps"),
    ("unipc", {"order": 1}, ("unipc", {"order": 1, "corrector": False}), 1, "x0"),
    ("deis", {"order": 2}, ("deis", {"order": 2}), 1, "eps"),
    ("deis", {"order": 3, "variant": "rhoab"}, ("deis", {"order": 2, "variant": "rhoab"}), 2, "eps"),
    ("deis", {"order": 4, "variant": "logrho"}, ("deis", {"order": 2, "variant": "logrho"}), 3, "eps"),
    ("lms", {"order": 4}, ("lms", {"order": 2}), 3, "eps"),
    ("lagrange", {"order": 3, "form": "x0", "variable": "rho"}, ("lagrange", {"order": 2, "variable": "rho"}), 2, "x0"),
    ("ddim", {"eta": 0.7}, None, 0, "x0"),
    ("ddpm", {}, None, 0, "x0"),
    ("euler_ancestral", {}, None, 0, "x0"),
]  # fmt: skip
NAMES = [f"{solver} {options}" for solver, options, *_ in SOLVERS]


def plan_of(solver, rows=ROWS, *, schedule=VP, prediction="eps", **options):
    return make_plan(schedule, solver, rows, prediction=prediction, **options)


@dataclass
class Mixture:
    """Every element drawn from its own mixture of two normals: predictions in closed form, elements independent."""

    means: np.ndarray  # [2, *shape]
    stds: np.ndarray

    @classmethod
    def of(cls, seed=0):
        rng = np.random.default_rng(seed)
        return cls(rng.normal(size=(2, *SHAPE)), rng.uniform(0.2, 0.9, size=(2, *SHAPE)))

    def predict(self, kind, x, alpha, sigma):
        spread = alpha**2 * self.stds**2 + sigma**2
        away = x[..., None, :, :, :] - alpha * self.means
        weight = np.exp(-0.5 * away**2 / spread) / np.sqrt(spread)
        weight = weight / weight.sum(axis=-4, keepdims=True)
        x0 = (weight * (self.means + alpha * self.stds**2 / spread * away)).sum(axis=-4)
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[kind]


def wide(tokens):
    """[n, N] -> [n, 1, H, W]."""
    return np.kron(tokens.reshape(-1, *GRID), np.ones((1, *PATCH), tokens.dtype))[:, None]


def some(rng, rows, *, first=2, share=0.5):
    """Which tokens each row computes, [rows, n, N]: all in the first ones and in the last."""
    active = rng.random((rows, PICTURES, TOKENS)) < share
    active[:first] = active[-1:] = True
    return active


def classes_of(active, depth, ages):
    """Class of every token in every row, uint8 [rows, n, N], from the definition."""
    found = np.zeros(active.shape, np.uint8)
    for i, n, p in np.argwhere(active):
        before = active[:i, n, p]
        if before[max(0, i - depth) :].all():
            found[i, n, p] = 1
        else:
            gap = i - np.flatnonzero(before).max()
            found[i, n, p] = 1 + gap if gap <= ages else 2 + ages
    return found


def aged(plan, active, ages):
    """The plan with history by token; it leaves tokens out where `active` does."""
    return token_history(plan, [i for i, row in enumerate(active) if not row.all()], ages)


def run(plan, active, depth, ages, noise, draws, oracle, dtype=torch.float64):
    """States [rows + 1, n, *shape] of a plan whose rows keep the raw prediction of tokens that they leave out."""
    classes = classes_of(active, depth, ages)
    x = torch.from_numpy(noise).to(dtype)
    wanted = iter([draws[k] for k in range(len(plan.steps))])
    drawn = {number: draw for number, draw in enumerate(wanted)}
    noisy = iter([i for i, step in enumerate(plan.steps) if any("noise" in s for op in step.ops for s, _ in op.terms)])
    stepper = Stepper(plan, x, {}, lambda: torch.from_numpy(drawn[next(noisy)]), dtype, patch=PATCH)
    states, x, out = [noise], stepper.start(x), None
    for i, step in enumerate(plan.steps):
        fresh = oracle.predict(plan.prediction, x.double().numpy(), step.alpha, step.sigma)
        out = fresh if out is None else np.where(wide(active[i]), fresh, out)
        x = stepper.advance([torch.from_numpy(out).to(dtype)], torch.from_numpy(classes[i]))
        states.append(x.double().numpy())
    return np.stack(states)


def coefficients(plan, row):
    """(of x, by rows back of history, of noise) in a row's update."""
    owner = {op.dst: i for i, step in enumerate(plan.steps[: row + 1]) for op in step.ops if op.dst[0] == "m"}
    terms = dict(plan.steps[row].ops[-1].terms)
    keep, noise = terms.pop("x", 0.0), sum(terms.pop(slot) for slot in list(terms) if slot.startswith("noise:"))
    return keep, {row - owner[slot]: coef for slot, coef in terms.items()}, noise


def places(plan, solver, options):
    """Of every row the variable in which the solver extrapolates, up to scale and offset."""
    variable = {"lms": "rho", "lagrange": options.get("variable", "lam"), "deis": options.get("variant", "tab")}
    of = {"lam": lambda s: s.lam, "logrho": lambda s: s.lam, "tab": lambda s: s.timestep}
    return [of.get(variable.get(solver, "lam"), lambda s: s.sigma / s.alpha)(step) for step in plan.steps]


def alone(solver, options, second, depth, form, active, ages, noise, draws, oracle, **arguments):
    """The same states, token by token: runs of solvers that know which rows computed the token.

    Rows that left it out are run once more when it is computed again, on values between the two that are known then.
    """
    own = plan_of(solver, **arguments, **options)
    plain = second and plan_of(second[0], **arguments, **second[1])
    u = places(own, solver, options)
    ends = [(step.alpha, step.sigma) for step in own.steps[1:]] + [(1.0, 0.0)]
    states = np.empty((len(own.steps) + 1, *noise.shape))
    for n, p in np.ndindex(PICTURES, TOKENS):
        mask = np.zeros((PICTURES, TOKENS), bool)
        mask[n, p] = True
        where = np.broadcast_to(wide(mask), noise.shape)
        mine = active[:, n, p]
        x, values = noise[where], {}
        states[0][where] = x
        for i, step in enumerate(own.steps):
            start = step.alpha, step.sigma
            whole = np.zeros(noise.shape)
            whole[where] = x
            if mine[i]:
                values[i] = oracle.predict(form, whole, *start)[where]
            steady = mine[max(0, i - depth) : i + 1].all()
            gap = i - max((j for j in values if j < i), default=0)
            keep, reads, fresh = coefficients(own, i)
            if mine[i] and not steady and second:
                j = i - min(gap, ages + 1)  # what was computed longer ago counts as of then
                values[j] = values[i - gap]
                gapped = plan_of(second[0], **arguments, **second[1], history="computed", cached=list(range(j + 1, i)))
                for r in range(j + 1, i):
                    x = states[r][where] if r == j + 1 else x
                    keep, reads, fresh = coefficients(plain, r)
                    x = keep * x + fresh * draws[r][where]
                    for age, weight in reads.items():
                        share = (u[r - age] - u[j]) / (u[i] - u[j])
                        x = x + weight * ((1.0 - share) * values[j] + share * values[i])
                keep, reads, fresh = coefficients(gapped, i)
            elif not steady:
                if fresh == 0.0:
                    keep, weight = (first_order if form == "x0" else first_order_eps)(start, ends[i])
                else:  # the step on x0 keeps the mean
                    weight = ends[i][0] - keep * start[0]
                reads = {i - max(values): weight}
            x = keep * x + sum(weight * values[i - age] for age, weight in reads.items()) + fresh * draws[i][where]
            states[i + 1][where] = x
    return states


@pytest.mark.parametrize("ages", [1, 3])
@pytest.mark.parametrize(("solver", "options", "second", "depth", "form"), SOLVERS, ids=NAMES)
def test_each_token_moves_like_a_run_of_the_rows_that_computed_it(solver, options, second, depth, form, ages):
    rng = np.random.default_rng(ages)
    active, oracle = some(rng, ROWS), Mixture.of()
    noise, draws = rng.normal(size=(PICTURES, *SHAPE)), rng.normal(size=(ROWS, PICTURES, *SHAPE))
    plan = plan_of(solver, **options)
    got = run(aged(plan, active, ages), active, depth, ages, noise, draws, oracle)
    want = alone(solver, options, second, depth, form, active, ages, noise, draws, oracle)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    assert not np.allclose(got[-1], run(plan, active | True, 0, ages, noise, draws, oracle)[-1])


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "dpmpp_2m_sde"])
def test_it_does_not_matter_what_the_network_predicts(solver, prediction):
    rng = np.random.default_rng(7)
    active, oracle = some(rng, ROWS, share=0.4), Mixture.of(1)
    noise, draws = rng.normal(size=(PICTURES, *SHAPE)), rng.normal(size=(ROWS, PICTURES, *SHAPE))
    depth = 2 if solver == "unipc" else 1
    arguments = {"schedule": FLOW if prediction == "flow" else VP, "prediction": prediction}
    plan = plan_of(solver, **arguments)
    second = solver, {"corrector": False} if solver == "unipc" else {}
    got = run(aged(plan, active, 2), active, depth, 2, noise, draws, oracle)
    want = alone(solver, {}, second, depth, "x0", active, 2, noise, draws, oracle, **arguments)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "options", "second", "depth", "form"), SOLVERS, ids=NAMES)
def test_steady_tokens_have_the_plans_own_coefficients_and_full_rows_end_them(solver, options, second, depth, form):
    plan = plan_of(solver, **options)
    made = token_history(plan, [4, 5], 2)
    for i, (old, new) in enumerate(zip(plan.steps, made.steps, strict=True)):
        ages = [coef for op in new.ops for _, coef in op.terms if isinstance(coef, AgeRef)]
        assert all(len(coef.values) == 5 for coef in ages) and (bool(ages) or not 4 <= i <= 5)
        steady = [tuple((s, c.values[1] if isinstance(c, AgeRef) else c) for s, c in op.terms) for op in new.ops]
        assert [tuple(t for t in terms if t[1]) for terms in steady] == [op.terms for op in old.ops]
        if i < 4 or i > 5 + depth:
            assert new == old


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc", "deis", "lms", "ddpm"])
def test_a_run_that_computes_all_tokens_has_the_plans_bits(solver):
    rng = np.random.default_rng(3)
    active, oracle = np.ones((ROWS, PICTURES, TOKENS), bool), Mixture.of()
    noise, draws = rng.normal(size=(PICTURES, *SHAPE)), rng.normal(size=(ROWS, PICTURES, *SHAPE)).astype(np.float32)
    plan = plan_of(solver)
    made = token_history(plan, list(range(4, 9)), 3)
    assert made.steps != plan.steps
    if solver in ("lms", "ddpm"):  # what a row hands on is in memory now, and rounded: in float64 that is all
        one, two = (run(p, active, 3, 3, noise, draws.astype(float), oracle) for p in (plan, made))
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)
        return
    one, two = (run(p, active, 3, 3, noise, draws, oracle, torch.float32) for p in (plan, made))
    assert np.array_equal(one, two)


def error_of(plan, active, depth, noise, history=True):
    """Largest error at the end, of a deterministic solver on normal data. history: by token, or of all at once."""
    data = Gaussian(np.full(SHAPE, 0.3), np.full(SHAPE, 0.8))
    first = plan.steps[0]
    exact = data.flow(noise, (first.alpha, first.sigma), (VP.alpha(0.0), VP.sigma(0.0)))
    none = np.zeros((len(plan.steps), 1, *SHAPE))
    made = aged(plan, active, 3) if history else plan
    return np.abs(run(made, active, depth, 3, noise, none, data)[-1] - exact).max()


@pytest.mark.parametrize(("solver", "depth"), [("dpmpp_2m", 1), ("unipc", 2), ("deis", 2), ("dpmpp_3m", 2), ("lms", 3)])
def test_order_of_convergence(solver, depth):
    """Tokens left out a few times, and in half of all rows: both of second order, and far better than raw reuse."""
    noise = np.random.default_rng(5).normal(size=(PICTURES, *SHAPE))
    few, half, raw = [], [], []
    for rows in (20, 40, 80):
        plan = plan_of(solver, rows, grid="logsnr", final="sigma_min")
        active = np.ones((rows, PICTURES, TOKENS), bool)
        for place in (0.3, 0.5, 0.7):  # each token once near each place, some in two rows running
            at = int(place * rows)
            active[at, :, ::2] = active[at + 1, :, 1:] = False
        few.append(error_of(plan, active, depth, noise))
        active = np.ones((rows, PICTURES, TOKENS), bool)
        active[4 : rows - 1 : 2, :, ::2] = active[5 : rows - 1 : 2, :, 1::2] = False
        half.append(error_of(plan, active, depth, noise))
        raw.append(error_of(plan, active, depth, noise, history=False))
    slopes = {name: np.log2(errors[-2] / errors[-1]) for name, errors in (("few", few), ("half", half), ("raw", raw))}
    assert slopes["few"] > 1.7 and slopes["half"] > 1.7 and slopes["raw"] < 1.3
    assert few[-1] < half[-1] < 0.5 * raw[-1]


# ---------------------------------------------------------------- every solver there is
ALL = [
    *((solver, options) for solver, options, *_ in SOLVERS),
    ("ipndm", {}), ("pndm", {"skip_prk": True}), ("lcm", {}), ("heun", {}), ("dpmpp_2s", {}), ("ddim", {}),
    ("euler", {"s_churn": 4.0}), ("dpm_solver", {"order": 3, "variant": "singlestep"}),
    *((name, {}) for name in ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
      "LMSDiscreteScheduler", "DDPMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler",
      "HeunDiscreteScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "options"), ALL, ids=lambda value: str(value))
def test_tokens_left_out_of_a_constant_x0_move_like_the_others(solver, options):
    """Every class of every row is consistent: where x0 is one number, what is kept is what would be computed."""
    plan = Plan.from_diffusers({"_class_name": solver, **options}, 16) if solver[0].isupper() else None
    plan = plan or plan_of(solver, 16, **options)
    number, steps = -1, []  # a step of several evaluations computes the same tokens in all of them
    for step in plan.steps:
        number += step.variant is not None and step.x == "x"
        steps.append(max(number, 0))
    by_step = some(np.random.default_rng(0), number + 1, first=6)
    made = token_history(plan, [i for i, k in enumerate(steps) if not by_step[k].all()], 3)
    ends = []
    for chosen, one in ((by_step | True, plan), (by_step, made)):
        rng = np.random.default_rng(1)
        x, classes = torch.from_numpy(rng.normal(size=(PICTURES, *SHAPE))), classes_of(chosen, 3, 3)
        draw = rng.normal
        stepper = Stepper(one, x, {}, lambda: torch.from_numpy(draw(size=x.shape)), torch.float64, patch=PATCH)  # noqa: B023 - used in this turn
        state, out = stepper.start(x * one.init[0].terms[0][1]), None
        while not stepper.done:
            k, fresh = steps[stepper.row], out_of(plan, stepper.row, state.numpy())
            out = fresh if out is None else np.where(wide(chosen[k]), fresh, out)
            state = stepper.advance([torch.from_numpy(out)], torch.from_numpy(classes[k]))
        ends.append(state.numpy())
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-9, atol=1e-9)


def out_of(plan, row, x):
    """What the network returns at a row where x0 is 0.4, in the words of the row."""
    step = plan.steps[row]
    if step.x_scale != 1.0 and plan.prediction == "v":  # an EDM scheduler: its own conversion to x0
        terms = dict(step.ops[0].terms)
        return (0.4 - terms["x"] * x) / terms["out"]
    eps = (x - step.alpha * 0.4) / step.sigma
    return {"eps": eps, "flow": eps - 0.4, "v": step.alpha * eps - step.sigma * 0.4}[plan.prediction]


@pytest.mark.parametrize(
    ("solver", "options"),
    [("ddim", {}), ("euler", {}), ("heun", {}), ("dpmpp_2s", {}), ("dpmpp_2m", {"order": 1}), ("ddpm", {})],
)
def test_steps_without_history_and_noise_stay_as_they_are(solver, options):
    plan = plan_of(solver, **options)
    assert (token_history(plan, [4, 5]) is plan) == (solver != "ddpm")
    assert token_history(plan, []) is plan
    flow = plan_of("flow_euler", schedule=FLOW, prediction="flow")
    assert token_history(flow, [4, 5]) is flow


def sde_eps():
    config = {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}
    return Plan.from_diffusers({"_class_name": "DPMSolverMultistepScheduler", **config}, ROWS)


def thresholded(name):
    return Plan.from_diffusers({"_class_name": name, "thresholding": True}, ROWS)


def by_hand():
    return replace(plan_of("dpmpp_2m"), recipe=None)


def per_element():
    plan = plan_of("dpmpp_2m")
    ops = (*plan.steps[5].ops[:-1], Affine("x", (("x", 0.5), ("m1", InputRef("w", 0.5)))))
    return replace(plan, steps=(*plan.steps[:5], replace(plan.steps[5], ops=ops), *plan.steps[6:]))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: plan_of("heun", s_churn=4.0), "step 5 of heun is one of several evaluations of a step beside"),
        (lambda: plan_of("pndm"), "step 5 of pndm is one of several evaluations"),
        (sde_eps, "DPMSolverMultistepScheduler adds fresh noise to a history of eps"),
        (lambda: thresholded("DPMSolverMultistepScheduler"), "step 5 of .* runs dynamic_threshold on its history"),
        (lambda: thresholded("DEISMultistepScheduler"), "runs dynamic_threshold on its history"),
        (lambda: plan_of("dpmpp_2m", history="computed", cached=(4,)), r"reads values of \[0, 2\] steps ago"),
        (by_hand, "the plan reads history, and in which variable it extrapolates is not known"),
        (per_element, "step 5 of dpmpp_2m has a coefficient of 'm1' that is no number"),
    ],
)
def test_what_has_no_history_by_token_is_refused_by_name(plan, message):
    with pytest.raises(PlanError, match=message):
        token_history(plan(), [5, 6])


@pytest.mark.parametrize("ages", [-1, 33, 2.0, True])
def test_ages_are_a_small_integer(ages):
    with pytest.raises(ArgumentError, match="ages .*; an integer from 0 to 32"):
        token_history(plan_of("dpmpp_2m"), [5], ages)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_guidance_and_tails_keep_their_history_by_token(solver):
    """History holds the guided prediction; a tail is planned anew and treated like any other plan."""
    plan = plan_of(solver)
    guided = token_history(apply_guidance(plan, 3.0), [5, 6], 2)
    bare = token_history(plan, [5, 6], 2)
    for one, two in zip(guided.steps, bare.steps, strict=True):
        *_, kept, update = one.ops
        assert update == two.ops[-1]
        assert [(s, c) for s, c in kept.terms if s != "g"] == [(s, c) for s, c in two.ops[0].terms if s != "out"]
    tail = plan.tail(0.75)
    assert len(token_history(tail, [4, 5], 2).steps) == len(tail.steps) != len(plan.steps)


def test_ages_are_printed():
    line = str(token_history(plan_of("dpmpp_2m"), [5], 2)).splitlines()[8]
    assert "age(1,0,0,0,0)*m0; x=" in line
