"""Sources of steps: against plain loops over x, and what holds for all of them."""

import math

import numpy as np
import pytest
import torch

import vivace
from tests.engine.toy import SHAPE, Toy, session
from vivace.bench.oracle import Mixture, prediction_of, schedule_denoiser
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.executors.picard import PicardExecutor
from vivace.engine.noise import normals
from vivace.engine.passes import apply_guidance
from vivace.engine.request import Request
from vivace.engine.sources import AdaptiveODE, AdaptiveSDE, StepSource, TimeShift
from vivace.engine.timesteps import make_grid
from vivace.errors import ArgumentError, ShapeError, StateError, UnsupportedError

BETAS = np.linspace(1e-4, 2e-2, 1000)
LOGS = 0.5 * np.log(np.cumprod(1.0 - BETAS))
VP = vivace.NoiseSchedule.vp(BETAS)
EDM = vivace.NoiseSchedule.edm(0.01, 20.0)
FLOW = vivace.NoiseSchedule.flow(train_steps=100)
DATA = Mixture.seven()
LOOSE = {"rtol": 0.3, "atol": 0.1}


def noises(count, seed=5):
    return torch.from_numpy(np.stack([normals((2,), seed, picture=j) for j in range(count)])).double()


def run(source, count=3, seed=5, denoiser=None):
    plans = []
    call = denoiser or schedule_denoiser(DATA, source.schedule, source.prediction)
    return vivace.sample(call, source, noises(count, seed), seed=seed, plans=plans), plans


def draw(seed, j, k):
    return torch.from_numpy(normals((2,), seed, picture=j, draw=k)).double()


def rms(value):
    return math.sqrt(float((value**2).mean()))


# ---------------------------------------------------------------- plain transcriptions
def vp_level(t):
    """(alpha, sigma) of the betas, log alpha linear in t."""
    log = float(np.interp(t, np.arange(1000), LOGS))
    return math.exp(log), math.sqrt(-math.expm1(2.0 * log))


def gotta_go_fast(kind, x, seed, j, rtol, atol, first):
    """Algorithm 1 of Jolicoeur-Martineau et al. 2021, fresh noise a try, then the denoised mean."""
    if kind == "vp":
        t, end, level = 999.0, 0.0, vp_level

        def drift(t):  # f = -beta/2, g^2 = beta, of the piece of the discrete chain that ends at ceil(t)
            f = 0.5 * math.log(1.0 - BETAS[max(math.ceil(t), 1)])
            return f, -2.0 * f
    elif kind == "edm":
        t, end, level, x = 20.0, 0.01, (lambda t: (1.0, t)), 20.0 * x

        def drift(t):
            return 0.0, 2.0 * t
    else:
        t, end, level = 0.99, 0.01, (lambda t: (1.0 - t, t))

        def drift(t):
            return -1.0 / (1.0 - t), 2.0 * t / (1.0 - t)

    def score(x, t):
        return -prediction_of(DATA, "eps", x[None], *level(t))[0] / level(t)[1]

    def increment(x, t, h, z):
        f, g2 = drift(t)
        return -h * f * x + h * g2 * score(x, t) + math.sqrt(h * g2) * z

    h, before, tries, accepted = first * (t - end), x, 0, 0
    while t > end:
        tries += 1
        z = draw(seed, j, tries)
        euler = x + increment(x, t, h, z)
        improved = 0.5 * (euler + x + increment(euler, t - h, h, z))
        bound = torch.maximum(torch.maximum(euler.abs(), before.abs()) * rtol, torch.tensor(atol, dtype=x.dtype))
        error = rms((improved - euler) / bound)
        if error <= 1.0:
            x, t, before, accepted = improved, (end if h >= t - end else t - h), euler, accepted + 1
        h = min(t - end, 0.9 * h * error**-0.9)
    return DATA.x0(x, *level(end)), tries, accepted


def dpm_adaptive(x, order, form, rtol, atol):
    """DPM-Solver-12 and -23 of Lu et al. 2022 with r1 = 1/2, or 1/3 and 2/3; x0 form: DPM-Solver++."""

    def level(lam):
        return 1.0 / math.sqrt(1.0 + math.exp(-2.0 * lam)), 1.0 / math.sqrt(1.0 + math.exp(2.0 * lam))

    def model(x, lam):
        return prediction_of(DATA, form, x[None], *level(lam))[0]

    def stepped(x, lam, end, m, d1=0.0, halved=None):
        """From lam to end with m, and a difference: `halved` weights it by half the first weight, else by phi_2."""
        (a, s), (b, q) = level(lam), level(end)
        h = end - lam
        if form == "eps":
            keep, one, two = b / a, -q * math.expm1(h), -q * (math.expm1(h) / h - 1.0)
        else:
            keep, one, two = q / s, -b * math.expm1(-h), b * (math.expm1(-h) / h + 1.0)
        return keep * x + one * m + (0.5 * one if halved else two) * d1

    lam = math.log(vp_level(999.0)[0] / vp_level(999.0)[1])
    end = math.log(vp_level(0.0)[0] / vp_level(0.0)[1])
    h, before, tries, rejected = 0.05, x, 0, 0
    while lam < end - 1e-12:
        tries += 1
        m0 = model(x, lam)
        if order == 2:
            m1 = model(stepped(x, lam, lam + h / 2, m0), lam + h / 2)
            low, high = stepped(x, lam, lam + h, m0), stepped(x, lam, lam + h, m0, (m1 - m0) / 0.5, halved=True)
        else:
            m1 = model(stepped(x, lam, lam + h / 3, m0), lam + h / 3)
            m2 = model(stepped(x, lam, lam + h * 2 / 3, m0, (m1 - m0) * 2.0), lam + h * 2 / 3)
            low = stepped(x, lam, lam + h, m0, (m1 - m0) * 3.0, halved=True)
            high = stepped(x, lam, lam + h, m0, (m2 - m0) * 1.5)
        bound = torch.maximum(torch.maximum(low.abs(), before.abs()) * rtol, torch.tensor(atol, dtype=x.dtype))
        error = rms((high - low) / bound)
        if error <= 1.0:
            x, lam, before = high, lam + h, low
        else:
            rejected += 1
        h = min(0.9 * h * error ** (-1.0 / order), end - lam)
    return DATA.x0(x, *vp_level(0.0)), tries, rejected


def shifted_ddim(x, times, window, cutoff):
    """Algorithm 2 of Li et al. 2023 with DDIM; times: of the grid, the last step goes to no noise."""
    targets, fed, used = [*times[1:], None], times[0], []
    for i, target in enumerate(targets):
        used.append(fed)
        alpha, sigma = vp_level(fed)
        eps = prediction_of(DATA, "eps", x[None], alpha, sigma)[0]
        x0 = (x - sigma * eps) / alpha
        b, q = (1.0, 0.0) if target is None else vp_level(target)
        x = b * x0 + q * eps
        fed = target
        if target is not None and target > cutoff:
            after = times[i + 2] if i + 2 < len(times) else 0.0
            around = [target + k for k in range(-(window // 2), window // 2 + 1)]
            around = [t for t in around if after < t < used[-1] and t <= 999.0]
            fed = min(around, key=lambda t: (abs(vp_level(t)[1] ** 2 - float(x.var())), abs(t - target)))
    return x, used


@pytest.mark.parametrize(("kind", "schedule"), [("vp", VP), ("edm", EDM), ("flow", FLOW)])
def test_adaptive_sde_is_gotta_go_fast(kind, schedule):
    source = AdaptiveSDE(schedule, "eps", **LOOSE)
    got, plans = run(source)
    for j, x in enumerate(noises(3)):
        want, tries, accepted = gotta_go_fast(kind, x, 5, j, 0.3, 0.1, 0.01)
        assert plans[j].nfe == 2 * accepted + 1 and tries > accepted
        torch.testing.assert_close(got[j], want, rtol=0.0, atol=1e-10)
    assert len({plan.nfe for plan in plans}) > 1  # steps of their own


@pytest.mark.parametrize(("order", "form"), [(2, "eps"), (2, "x0"), (3, "eps"), (3, "x0")])
def test_adaptive_ode_is_dpm_solver_12_and_23(order, form):
    calls = []
    inner = schedule_denoiser(DATA, VP, "eps")
    source = AdaptiveODE(VP, "eps", order=order, form=form)
    for x in noises(2):
        calls.clear()
        plans = []
        call = lambda x, t: calls.append(0) or inner(x, t)  # noqa: E731
        got = vivace.sample(call, source, x[None], plans=plans)
        want, tries, rejected = dpm_adaptive(x, order, form, 0.05, 0.0078)
        torch.testing.assert_close(got[0], want, rtol=0.0, atol=1e-10)
        assert rejected and plans[0].nfe == order * (tries - rejected) + 1
        assert len(calls) == order * tries + 1 - rejected  # a second try has the first one's evaluation of x


def test_time_shift_is_its_algorithm_on_ddim():
    source = TimeShift(VP, "eps", "ddim", 10, window=80, cutoff=250)
    got, plans = run(source)
    for j, x in enumerate(noises(3)):
        want, used = shifted_ddim(x, list(make_grid(VP, 10).timesteps), 80, 250.0)
        assert [step.timestep for step in plans[j].steps] == pytest.approx(used, abs=1e-9)
        torch.testing.assert_close(got[j], want, rtol=0.0, atol=1e-10)
    assert plans[0].steps != plans[1].steps


# ---------------------------------------------------------------- neutral numbers
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "ddpm"])
def test_time_shift_without_a_window_is_the_solver(solver):
    plan = vivace.make_plan(VP, solver, 6)
    for source in (TimeShift(VP, "eps", solver, 6, window=0), TimeShift(VP, "eps", solver, 6, cutoff=1000)):
        got, plans = run(source)
        assert all(taken.steps == plan.steps and taken.init == plan.init for taken in plans)
        assert torch.equal(got, vivace.sample(schedule_denoiser(DATA, VP, "eps"), plan, noises(3), seed=5))


@pytest.mark.parametrize("order", [2, 3])
def test_steps_taken_are_those_of_the_singlestep_solver(order):
    _, (taken, *_) = run(AdaptiveODE(VP, "eps", order=order))
    starts = [step for step in taken.steps if step.x == "x"]
    rhos = [step.sigma / step.alpha for step in starts]
    plan = vivace.make_plan(VP, "dpm_solver", len(rhos), sigmas=rhos, order=order, variant="singlestep")
    assert len(plan.steps) == len(taken.steps)
    for mine, theirs in zip(taken.steps[:-1], plan.steps[:-1], strict=True):
        assert (mine.alpha, mine.sigma) == pytest.approx((theirs.alpha, theirs.sigma), rel=1e-9)
        for ours, other in zip(mine.ops, theirs.ops, strict=True):
            assert [c for _, c in ours.terms] == pytest.approx([c for _, c in other.terms], rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------- what holds for all
def toy_sources(**options):
    return [
        AdaptiveSDE(VP, "v", **LOOSE, **options),
        AdaptiveODE(VP, "v", rtol=0.5, atol=0.2, **options),
        AdaptiveODE(VP, "v", order=3, rtol=0.5, atol=0.2, **options),
        TimeShift(VP, "v", "unipc", 6, window=120, cutoff=100, **options),
    ]


@pytest.mark.parametrize("source", toy_sources(guidance=3.0), ids=lambda source: source.name)
def test_a_picture_has_the_same_bits_with_others_and_from_its_plan(source, tmp_path):
    s = session(source)
    got = s("abc", n=3, seed=7)
    assert len(set(got.plans)) == 3
    with pytest.raises(StateError, match="plans of their own"):
        _ = got.plan
    alone = s("abc", index=2, seed=7)
    assert torch.equal(alone.latents[0], got.latents[2]) and alone.plan == got.plans[2]
    for j, plan in enumerate(got.plans):
        plan.save(tmp_path / "taken.json")
        assert vivace.Plan.load(tmp_path / "taken.json") == plan
        again = s("abc", plan=plan, index=j, seed=7)
        assert torch.equal(again.latents[0], got.latents[j]) and again.plan == plan


@pytest.mark.parametrize("source", toy_sources(), ids=lambda source: source.name)
def test_receipts_say_what_ran(source):
    toy = Toy()
    s = session(source, toy=toy)
    toy.calls.clear()
    result = s(n=2, seed=1)
    receipt, told = result.receipt, result.receipt.details["source"]
    assert told["name"] == source.name and receipt.n == 2
    assert told["rows"] == [len(plan.steps) for plan in result.plans]
    assert told["plans"] == [plan.hash[:12] for plan in result.plans]
    assert receipt.nfe == max(told["evaluations"]) == len(toy.calls)
    assert sum(n for n, _ in toy.calls) == sum(told["evaluations"])
    longest = told["evaluations"].index(receipt.nfe)
    stages = {"adaptive_sde": 2, "adaptive_ode": getattr(source, "order", 0)}.get(source.name)
    if stages:
        for tries, rejected, evaluations, rows in zip(
            told["tries"], told["rejected"], told["evaluations"], told["rows"], strict=True
        ):
            assert rows == stages * (tries - rejected) + 1 and evaluations == rows + (stages - 1) * rejected
    assert receipt.plan_hash == result.plans[longest].hash and len(receipt.rows) == told["rows"][longest]
    assert all(row.branches and row.batch for row in receipt.rows)
    assert source.name in str(receipt) and receipt.to_dict()["details"]["source"]["tries"] == told["tries"]


def test_a_source_steps_beside_plans_and_other_sources():
    sources, plan = toy_sources(), vivace.make_plan(VP, "unipc", 9, prediction="v")
    s = session(plan)
    requests = [Request("ab", source, n=2, seed=k) for k, source in enumerate(sources)] + [Request("ab", plan, seed=9)]
    want = [s(r.prompt, plan=r.plan, n=r.n, seed=r.seed).latents for r in requests]
    states = [s.begin(request) for request in requests]
    while running := [state for state in states if not state.done]:
        reports = s.step(running)
        assert [report.done for report in reports] == [state.done for state in running]
    for state, latents in zip(states, want, strict=True):
        assert torch.equal(s.finish(state).latents, latents)
    assert len(s.pool._free) == s.pool.state.shape[1]


def test_numbers_of_the_request_reach_a_source():
    source = AdaptiveODE(VP, "v", guidance=3.0, rtol=0.5, atol=0.2)
    s = session(source)
    one = s("abcd", seed=3, guidance_scale=5.0)
    assert torch.equal(one.latents, s("abcd", seed=3, guidance_scale=5.0, plan=one.plan).latents)
    assert not torch.equal(one.latents, s("abcd", seed=3).latents)
    drawn = torch.from_numpy(np.stack([normals(SHAPE, 3, picture=j) for j in range(2)]))
    both = s("abcd", n=2, latents=drawn, guidance_scale=5.0).latents
    assert torch.equal(both[0], one.latents[0])
    start = torch.full((2, *SHAPE), 0.5)
    moved = session(source)
    state = moved.begin(Request("a", n=2, inputs={"x_init": start}))
    assert torch.equal(state.runs[1].x, start[1])


def test_rescaled_guidance_runs():
    result = session(AdaptiveODE(VP, "v", guidance=3.0, rescale=0.7, rtol=0.5, atol=0.2))("ab")
    assert torch.equal(session(result.plan)("ab").latents, result.latents)
    assert any(row.branches == ("cond", "uncond") for row in result.receipt.rows)


def test_failures_leave_nothing_behind():
    source, toy = AdaptiveSDE(VP, "v", **LOOSE), Toy()
    s = session(source, toy=toy)
    want = s("pizza", n=2, seed=8).latents
    state = s.begin(Request("pizza", n=2, seed=8))
    s.step([state])
    evaluate, toy.evaluate = toy.evaluate, lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        s.step([state])
    toy.evaluate = evaluate
    while not state.done:
        s.step([state])
    assert torch.equal(s.finish(state).latents, want)
    toy.evaluate = lambda x, *rest: tuple(out * math.nan for out in evaluate(x, *rest))
    with pytest.raises(StateError, match="try 1 is nan"):
        s("pizza", n=2)
    assert len(s.pool._free) == s.pool.state.shape[1]
    toy.evaluate = evaluate
    state = s.begin(Request("pizza", n=2))
    s.abort(state)
    s.abort(state)
    with pytest.raises(StateError, match="aborted"):
        s.step([state])
    assert len(s.pool._free) == s.pool.state.shape[1]


@pytest.mark.parametrize(
    ("make", "error", "fragment"),
    [
        (lambda: AdaptiveSDE("vp"), ArgumentError, "NoiseSchedule"),
        (lambda: AdaptiveSDE(VP, "eps", rtol=0.0), ArgumentError, "rtol"),
        (lambda: AdaptiveSDE(VP, "eps", atol=math.nan), ArgumentError, "atol"),
        (lambda: AdaptiveSDE(VP, "eps", first=2.0), ArgumentError, "first"),
        (lambda: AdaptiveSDE(VP, "eps", safety=1.0), ArgumentError, "safety"),
        (lambda: AdaptiveSDE(VP, "epsilon"), ArgumentError, "prediction"),
        (lambda: AdaptiveSDE(VP, "eps", final="none"), ArgumentError, "final"),
        (lambda: AdaptiveSDE(VP, "eps", guidance=math.inf), ArgumentError, "scale"),
        (lambda: AdaptiveSDE(VP, "eps", rescale=0.7), ArgumentError, "rescale"),
        (lambda: AdaptiveODE(VP, "eps", order=1), ArgumentError, "order 1"),
        (lambda: AdaptiveODE(VP, "eps", order=4), ArgumentError, "order"),
        (lambda: AdaptiveODE(VP, "eps", form="v"), ArgumentError, "form"),
        (lambda: TimeShift(EDM, "eps"), UnsupportedError, "VP"),
        (lambda: TimeShift(VP, "eps", "heun"), UnsupportedError, "heun"),
        (lambda: TimeShift(VP, "eps", "ddim", window=-1), ArgumentError, "window"),
        (lambda: TimeShift(VP, "eps", "ddim", options={"order": 3}), ArgumentError, "order"),
        (lambda: TimeShift(VP, "eps", steps=0), ArgumentError, "steps"),
    ],
)
def test_bad_options_are_refused(make, error, fragment):
    with pytest.raises(error, match=fragment):
        make()


def test_bad_requests_are_refused_before_anything_is_taken():
    s = session(AdaptiveODE(VP, "v"))
    for bad, error in (({"n": 0}, ArgumentError), ({"latents": torch.zeros(1, *SHAPE), "n": 2}, ShapeError)):
        with pytest.raises(error):
            s(**bad)
    assert s.pool.state.shape[1] == 0
    with pytest.raises(ArgumentError, match="no plan"):
        session("ddim")
    assert isinstance(AdaptiveODE(VP, "v"), StepSource) and not isinstance(vivace.make_plan(VP), StepSource)


def test_a_source_is_not_run_in_parallel():
    toy, plan = Toy(), vivace.make_plan(VP, "ddim", 3, prediction="v")
    s = session(plan, toy=toy)
    s.executor = PicardExecutor(EagerExecutor(toy))
    with pytest.raises(UnsupportedError, match="decides rows by those before"):
        s.begin(Request(plan=AdaptiveODE(VP, "v")))


def test_sample_gives_every_sample_a_plan():
    call, source, noise = schedule_denoiser(DATA, VP, "eps"), AdaptiveODE(VP, "eps"), noises(3)
    plans, each = [], []
    both = vivace.sample(call, source, noise, seed=[4, 5, 6], plans=plans)
    for j in range(3):
        one = vivace.sample(call, source, noise[j : j + 1], seed=4 + j, plans=each)
        assert torch.equal(one[0], both[j]) and plans[j] == each[j]
    fixed = []
    vivace.sample(call, vivace.make_plan(VP, "ddim", 2), noise, plans=fixed)
    assert len(fixed) == 3 and len(set(fixed)) == 1


def test_the_last_state_can_be_the_result():
    short, plans = run(AdaptiveODE(VP, "eps", final="sigma_min"))
    whole, closed = run(AdaptiveODE(VP, "eps"))
    for j, (plan, other) in enumerate(zip(plans, closed, strict=True)):
        assert plan.steps == other.steps[:-1]
        torch.testing.assert_close(whole[j], DATA.x0(short[j], *vp_level(0.0)), rtol=1e-10, atol=1e-12)


def test_guidance_of_a_source_is_that_of_the_pass():
    guided = AdaptiveODE(VP, "eps", guidance=2.5).start().next(None).plan
    plain = AdaptiveODE(VP, "eps").start().next(None).plan
    assert apply_guidance(plain, 2.5) == guided
