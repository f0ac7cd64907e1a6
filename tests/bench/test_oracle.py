"""The oracle is right, and every deterministic solver has the order of its theory on it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vivace.bench import oracle
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.engine.solvers import SOLVERS
from vivace.errors import ArgumentError

VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
FLOW = NoiseSchedule.flow()
LEVELS = [(1.0, 3.0), (0.6, 0.8), (0.3, 0.7), (1.0, 0.1), (0.05, 1.0)]


def states(size, count=40, seed=0):
    return torch.as_tensor(np.random.default_rng(seed).normal(size=(count, size)))


@pytest.mark.parametrize("level", LEVELS)
def test_the_mixture_denoiser_is_tweedie_of_its_density(level):
    """E[x0 | x] = (x + sigma^2 grad log p_t(x)) / alpha, the gradient taken by autograd of the density."""
    alpha, sigma = level
    data, x = oracle.Mixture.seven(), 2.0 * states(2)
    x.requires_grad_()
    spread = alpha**2 * data.deviations**2 + sigma**2
    square = ((x[:, None, :] - alpha * data.means) ** 2).sum(-1)
    density = torch.logsumexp(torch.log(data.weights / spread) - square / (2.0 * spread), dim=1)
    (score,) = torch.autograd.grad(density.sum(), x)
    want = (x + sigma**2 * score) / alpha
    torch.testing.assert_close(data.x0(x.detach(), alpha, sigma), want.detach(), rtol=1e-10, atol=1e-10)


def test_the_gaussian_is_a_mixture_of_one():
    data = oracle.Gaussian(torch.tensor([0.4, -1.0]).double(), torch.tensor([0.5, 0.5]).double())
    one = oracle.Mixture(data.mean[None], torch.ones(1).double(), data.variance[:1].sqrt())
    x = states(2)
    for alpha, sigma in LEVELS:
        torch.testing.assert_close(data.x0(x, alpha, sigma), one.x0(x, alpha, sigma), rtol=1e-13, atol=1e-13)
    for start, end in (((0.0, 1.0), (1.0, 0.0)), ((1.0, 20.0), (1.0, 0.02)), ((0.1, 0.9), (0.8, 0.2))):
        torch.testing.assert_close(one.solve(x, start, end), data.solve(x, start, end), rtol=0, atol=2e-9)


def test_the_exact_solution_solves_the_equation():
    """dx/d lam by differences equals that of dy/d rho = eps, y = x/alpha."""
    data, x = oracle.Gaussian.narrow(), states(8)
    h, lam = 1e-4, 0.3
    levels = [oracle._unit(lam + k * h) for k in (-1, 0, 1)]
    before, after = (data.solve(x, levels[1], level) / level[0] for level in (levels[0], levels[2]))
    rho = [sigma / alpha for alpha, sigma in levels]
    eps = oracle.prediction_of(data, "eps", x, *levels[1])
    torch.testing.assert_close((after - before) / (rho[2] - rho[0]), eps, rtol=1e-6, atol=1e-6)


def test_predictions_are_consistent():
    data, x = oracle.Mixture.seven(), states(2)
    for alpha, sigma in LEVELS:
        x0, eps, v, flow = (oracle.prediction_of(data, kind, x, alpha, sigma) for kind in ("x0", "eps", "v", "flow"))
        torch.testing.assert_close(alpha * x0 + sigma * eps, x)
        torch.testing.assert_close(v, alpha * eps - sigma * x0)
        torch.testing.assert_close(flow, eps - x0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_denoisers_of_plan_and_schedule_agree(prediction):
    data, x = oracle.Mixture.seven(), states(2)
    plan = make_plan(VP, "unipc", 8, prediction=prediction)
    by_plan, by_schedule = oracle.denoiser_for(data, plan), oracle.schedule_denoiser(data, VP, prediction)
    for step in plan.steps:
        t = torch.full((len(x),), step.timestep, dtype=torch.float64)
        torch.testing.assert_close(by_plan(x, t), by_schedule(x, t), rtol=1e-12, atol=1e-12)


def test_a_plan_with_two_levels_at_one_timestep_is_refused():
    plan = make_plan(VP, "ddim", 2)
    odd = replace(plan, steps=(plan.steps[0], replace(plan.steps[1], timestep=plan.steps[0].timestep)))
    with pytest.raises(ArgumentError, match="different levels"):
        oracle.denoiser_for(oracle.Gaussian.narrow(), odd)


def test_solvers_converge_to_the_reference_of_the_mixture():
    data, noise = oracle.Mixture.seven(), states(2, 64)
    want = data.solve(noise, (0.0, 1.0), (1.0, 0.0))
    for solver, bound in (("unipc", 0.02), ("dpmpp_2m", 0.05), ("dpmpp_3m", 0.02), ("flow_heun", 0.02)):
        errors = []
        for steps in (40, 160):
            plan = make_plan(FLOW, solver, steps, prediction="flow", grid="logsnr")
            got = sample(oracle.denoiser_for(data, plan), plan, noise)
            errors.append(float(torch.sqrt(((got - want) ** 2).mean())))
        assert errors[1] < bound and errors[1] < errors[0]


def test_unipc_3_beats_ddim_by_far_at_20_steps():
    grid = oracle.even_grid(oracle.EDM, 20)
    ddim = oracle.trajectory_error(grid, "ddim", "eps", {})
    unipc = oracle.trajectory_error(grid, "unipc", "eps", {"order": 3})
    assert ddim / unipc > 5.0


def test_every_deterministic_solver_has_its_order():
    table = oracle.order_table()
    wrong = [(solver, options, theory, measured) for solver, options, theory, measured in table]
    wrong = [line for line in wrong if not abs(line[3] - line[2]) <= 0.25]
    assert not wrong
    missing = set(SOLVERS) - {line[0] for line in table}
    assert missing == {"ddpm", "euler_ancestral", "lcm"}, "solvers without a measured order"


def test_the_published_third_order_row_is_of_second_order():
    orders = {
        options.get("variant", "third_order"): theory for s, options, theory, _ in oracle.ORDERS if s == "dpmpp_3m"
    }
    assert orders == {"third_order": 3, "published": 2}
    measured = oracle.measured_order("dpmpp_3m", {"variant": "published", **oracle.FINAL}, warm_up=3, steps=(80, 160))
    assert measured == pytest.approx(2.0, abs=0.25)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_equal_step_weights_reach_their_full_order_on_equal_steps(order):
    """iPNDM's weights are of order p where rho falls in equal steps: then they are those of Adams-Bashforth."""
    steps = 12
    sigmas = np.linspace(3.0, 1.0, steps + 1)
    grid = oracle.Grid(tuple(sigmas[:-1].tolist()), (1.0,) * (steps + 1), tuple(sigmas.tolist()), oracle.EDM)
    one = oracle.plan_on(grid, "ipndm", "eps", {"order": order})
    two = oracle.plan_on(grid, "lms", "eps", {"order": order, **oracle.FINAL})
    for a, b in zip(one.steps, two.steps, strict=True):
        assert dict(a.ops[-1].terms) == pytest.approx(dict(b.ops[-1].terms), rel=1e-11)


def test_the_grid_of_the_measurement():
    grid = oracle.even_grid(oracle.EDM, 10)
    np.testing.assert_allclose([grid.lam(i) for i in range(11)], np.linspace(-4, 4, 11), atol=1e-12)
    graded = oracle.even_grid(oracle.FLOW, 40, 4)
    lengths = np.diff([graded.lam(i) for i in range(graded.steps + 1)])
    assert graded.steps == 43
    np.testing.assert_allclose(lengths[:3], [0.2**2.5, 0.2 ** (5 / 3), 0.2**1.25], rtol=1e-9)
    np.testing.assert_allclose(lengths[3:], lengths[3], rtol=1e-9)
    assert math.isclose(graded.lam(43), 4.0)
