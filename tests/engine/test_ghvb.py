"""GHVB against a transcription of its paper, its full order on equal steps, its stability, and what it refuses."""

import math

import numpy as np
import pytest
import torch

from vivace.bench import oracle
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance, apply_tokens
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.solvers.ghvb import ghvb_weights
from vivace.engine.timesteps import Grid
from vivace.errors import ArgumentError, PlanError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
EDM = NoiseSchedule.edm(0.02, 20.0)
FLOW = NoiseSchedule.flow()
SEVEN = oracle.Mixture.seven()
NOISE = torch.as_tensor(np.random.default_rng(5).normal(size=(16, 2)))


def combined(order, b, v):
    """The printed combinations of the moving averages v, newest last."""
    v0, v1, v2, v3, v4 = ([*v[::-1], *[None] * 5])[:5]
    if order == 1:
        return v0
    if order == 2:
        return ((2 + b) * v0 - (2 - b) * v1) / (2 * b)
    if order == 3:
        return ((18 + 5 * b) * v0 - (24 - 8 * b) * v1 + (6 - b) * v2) / (12 * b)
    if order == 4:
        return ((46 + 9 * b) * v0 - (78 - 19 * b) * v1 + (42 - 5 * b) * v2 - (10 - b) * v3) / (24 * b)
    newer = (1650 + 251 * b) * v0 - (3420 - 646 * b) * v1 + (2880 - 264 * b) * v2
    return (newer - (1380 - 106 * b) * v3 + (270 - 19 * b) * v4) / (720 * b)


def transcribed(levels, order, b, noise):
    """The paper's loop in y = x / alpha and rho = sigma / alpha."""
    x, v = noise, []
    for (alpha, sigma), (alpha_end, sigma_end) in zip(levels, levels[1:], strict=False):
        eps = (x - alpha * SEVEN.x0(x, alpha, sigma)) / sigma
        v.append((1 - b) * v[-1] + b * eps if v else eps)
        rise = sigma_end / alpha_end - sigma / alpha
        step = combined(min(order, len(v)), b, v) if sigma_end else eps
        x = alpha_end * (x / alpha + rise * step)
    return x


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("momentum", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_it_is_the_loop_of_the_paper(order, momentum, final):
    for schedule, prediction in ((VP, "v"), (VP, "eps"), (EDM, "x0")):
        plan = make_plan(schedule, "ghvb", 9, prediction=prediction, order=order, momentum=momentum, final=final)
        got = sample(oracle.denoiser_for(SEVEN, plan), plan, NOISE)
        end = (1.0, 0.0) if final == "zero" else (schedule.alpha(schedule.data_end), schedule.sigma(schedule.data_end))
        levels = [*((step.alpha, step.sigma) for step in plan.steps), end]
        start = NOISE * (levels[0][1] if schedule is EDM else 1.0)
        want = transcribed(levels, order, momentum, start)
        if momentum == 1.0 and final == "zero":
            continue  # the last row of `ipndm`: the same number, other rounding, checked below
        assert float((got - want).abs().max()) < 1e-9 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_without_damping_it_is_ipndm_bit_for_bit(order):
    for schedule, prediction in ((VP, "eps"), (EDM, "x0"), (FLOW, "flow")):
        plain = make_plan(schedule, "ipndm", 8, prediction=prediction, order=order)
        assert make_plan(schedule, "ghvb", 8, prediction=prediction, order=order, momentum=1.0).steps == plain.steps


def test_the_fifth_order_without_damping_is_adams_bashforth():
    want = np.array([1901.0, -2774.0, 2616.0, -1274.0, 251.0]) / 720.0
    np.testing.assert_allclose(ghvb_weights(5, 1.0), want, rtol=1e-15)


@pytest.mark.parametrize("momentum", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_weights_integrate_polynomials_once_the_average_has_settled(order, momentum):
    """eps = tau^k, k < order, steps of length 1: v is the settled average, the step int_n^{n+1} tau^k."""
    weights = ghvb_weights(order, momentum)
    for power in range(order):
        settled = [
            math.fsum(momentum * (1 - momentum) ** j * (-age - j) ** power for j in range(800)) for age in range(order)
        ]
        got = math.fsum(w * v for w, v in zip(weights, settled, strict=True))
        assert got == pytest.approx(1.0 / (power + 1.0), rel=1e-9)


@pytest.mark.parametrize(("order", "steps"), [(1, 400), (2, 400), (3, 400), (4, 800)])
def test_it_has_its_order_on_equal_steps(order, steps):
    """Steps equal in rho from 20, where eps hardly changes, so that the average starts settled."""
    errors = []
    for count in (steps, 2 * steps):
        sigmas = np.linspace(20.0, 0.5, count + 1)
        grid = Grid(tuple(sigmas[:-1].tolist()), (1.0,) * (count + 1), tuple(sigmas.tolist()), oracle.EDM)
        data = oracle.Gaussian(torch.zeros(8, dtype=torch.float64), torch.linspace(1.0, 3.0, 8, dtype=torch.float64))
        plan = oracle.plan_on(grid, "ghvb", "eps", {"order": order, "momentum": 0.8})
        noise = torch.as_tensor(np.random.default_rng(3).normal(size=(1, 8)))
        got = sample(oracle.denoiser_for(data, plan), plan, noise)
        start = math.hypot(1.0, 20.0) * noise
        errors.append(float((got - data.solve(start, (1.0, 20.0), (1.0, 0.5))).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


def stable_to(order, momentum):
    """The largest |z|, z < 0, up to which y' = lambda y with z = h lambda is damped: roots of the recursion."""
    weights = ghvb_weights(order, momentum)
    for z in np.arange(0.01, 4.0, 0.01):
        # y_{n+1} = y_n - z s_n, s = sum w_j v_{n-j}, v_n = (1 - b) v_{n-1} + b y_n, as one step of (y, v...).
        size = order + 1
        matrix = np.zeros((size, size))
        matrix[1, 0], matrix[1, 1] = momentum, 1.0 - momentum
        for k in range(2, size):
            matrix[k, k - 1] = 1.0
        matrix[0] = -z * np.array([0.0, *weights]) @ matrix
        matrix[0, 0] += 1.0
        if np.abs(np.linalg.eigvals(matrix)).max() > 1.0 + 1e-9:
            return z - 0.01
    return 4.0


@pytest.mark.parametrize("order", [2, 3, 4])
def test_damping_enlarges_the_region_of_stability(order):
    reach = [stable_to(order, momentum) for momentum in (1.0, 0.8, 0.5)]
    assert reach[0] < reach[1] < reach[2]
    assert stable_to(2, 1.0) == pytest.approx(1.0, abs=0.011)  # Adams-Bashforth of order 2


def test_averages_live_in_slots_of_their_own_and_begin_anew_behind_pure_noise():
    plan = make_plan(FLOW, "ghvb", 6, prediction="flow", order=2)
    assert [step.ops[0].dst for step in plan.steps] == ["v0", "v1", "v0", "v1", "v0", "v1"]
    assert plan.steps[0].alpha == 0.0
    assert [len(step.ops[0].terms) for step in plan.steps] == [1, 2, 3, 3, 3, 3]
    assert "v1" not in dict(plan.steps[-1].ops[1].terms), "a row to sigma = 0 takes its own eps"


def test_plans_survive_files_tails_and_other_step_counts(tmp_path):
    plan = apply_guidance(make_plan(VP, "ghvb", 10, prediction="v", order=3, momentum=0.7), 4.0)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    tail = plan.tail(0.5)
    assert tail.nfe == 5 and len(tail.steps[0].ops[2].terms) == 2, "the average begins anew"
    assert plan.again(steps=12, momentum=1.0).nfe == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 6}, "ghvb: order must be an integer in 1..5, got 6"),
        ({"order": 3.8}, "ghvb: order must be an integer"),
        ({"momentum": 0.0}, "ghvb: momentum must be above 0"),
        ({"momentum": 1.5}, r"ghvb: momentum must be a number in \[0, 1\]"),
        ({"beta": 0.5}, "ghvb: option: unknown 'beta'"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(ArgumentError, match=message):
        make_plan(VP, "ghvb", 5, **options)


def test_tokens_left_out_would_lack_the_average():
    with pytest.raises(PlanError, match="reads slot 'v0' of an earlier row, which tokens left out would lack"):
        apply_tokens(make_plan(VP, "ghvb", 12, prediction="v"), 0.5)
