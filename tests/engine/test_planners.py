"""Planners of caches: what each says of a plan, against the rule its paper states."""

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.plans import edit
from vivace.engine import planners
from vivace.engine.bind import ModelSpec
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.forecast import node_weights
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_block_cache, apply_experts, apply_guidance
from vivace.engine.plan import Action
from vivace.engine.planners.base import required
from vivace.engine.planning import make_plan
from vivace.errors import ArgumentError

SPEC = ModelSpec("toy", "0" * 64, "flow", (2, 4, 4), 6, (1, 1), width=8)
VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))
READS = (Action.REUSE, Action.FORECAST)


def euler(steps=12):
    return make_plan(NoiseSchedule.flow(), "flow_euler", steps, prediction="flow")


def letters(plan, site="attn"):
    """One letter an evaluation: c computes, k computes and keeps, r is given again, 1, 2, ... order of a forecast."""
    out = ""
    for step in plan.steps:
        said = [rule for rule in step.variant.rules if rule.site == site and rule.action is not None]
        assert len(said) <= 1
        if not said:
            out += "c"
        elif said[0].action == Action.COMPUTE:
            out += "k"
        else:
            out += "r" if said[0].action == Action.REUSE else str(said[0].order)
    return out


def computed(plan, site="attn"):
    return letters(plan, site).replace("k", "c")


def table_of(plan, arrays, **changes):
    metadata = {
        "evaluations": plan.nfe,
        "timesteps": [step.timestep for step in plan.steps],
        "latent_shape": [2, 4, 4],
    }
    fields = {"kind": "cache", "fingerprint": SPEC.fingerprint}
    fields |= {name: changes.pop(name) for name in tuple(changes) if name in fields}
    return CalibrationTable(**fields, arrays=arrays, metadata=metadata | changes)


# ---------------------------------------------------------------- rows that compute whatever a planner says
def test_the_first_evaluation_of_a_run_and_of_a_model_computes():
    plan = apply_experts(euler(), 0.55)
    switch = next(i for i, step in enumerate(plan.steps) if step.variant.model != "main")
    assert required(plan) == {0, switch}
    made = letters(apply_block_cache(plan, planners.Fora(20, last=0)))
    assert made[0] == made[switch] == "k" and made.count("r") == len(made) - 2


def test_both_sides_of_a_guidance_edge_compute():
    plan = apply_guidance(euler(), 3.0, interval=(0.25, 0.75))
    assert required(plan) == {0, 2, 3, 8, 9}
    assert letters(apply_block_cache(plan, planners.Fora(20, last=0))) == "krckrrrrckrr"


def test_a_change_of_what_is_fed_beside_the_timestep_computes():
    plan = euler(6)
    for i in range(3, 6):
        plan = edit(plan, i, net_inputs=(("control_scale", 0.5),))
    assert required(plan) == {0, 3}


def test_a_restart_computes_and_the_churn_of_a_step_does_not():
    plan = euler(8)
    back = replace(plan.steps[1], restart=True)
    assert required(replace(plan, steps=(*plan.steps[:5], back, *plan.steps[5:]))) == {0, 5}
    churned = make_plan(NoiseSchedule.edm(), "euler", 12, s_churn=1.0)
    assert any(step.restart for step in churned.steps) and required(churned) == {0}


# ---------------------------------------------------------------- FORA
@pytest.mark.parametrize(("interval", "want"), [(2, "crcrcrcrcrcc"), (3, "crrcrrcrrcrc"), (5, "crrrrcrrrrcc")])
def test_fora_computes_every_interval_and_the_last(interval, want):
    plan = apply_block_cache(euler(), planners.Fora(interval))
    assert computed(plan) == computed(plan, "mlp") == want


def test_fora_counts_from_the_last_computed_evaluation():
    plan = apply_block_cache(euler(), planners.Fora(3, first=2, last=2))
    assert computed(plan) == "ccrrcrrcrrcc"


def test_windows_are_shares_of_the_run_whatever_the_timestep_counts():
    window = {"interval": 2, "window": (0.25, 0.75), "last": 0}
    of_vp = apply_block_cache(make_plan(VP, "ddim", 12), "fora", **window)
    of_flow = apply_block_cache(euler(), "fora", **window)
    assert of_vp.steps[0].timestep > 900 and of_flow.steps[0].timestep <= 1.0
    assert computed(of_vp) == computed(of_flow) == "cccrcrcrcccc"


def test_a_solver_with_two_evaluations_a_step_counts_evaluations():
    plan = make_plan(NoiseSchedule.edm(), "heun", 4)
    assert plan.nfe == 7
    times = [step.lam for step in plan.steps]
    assert len(set(times)) < len(times)  # the second stage of a step and the first of the next are at one time
    made = apply_block_cache(plan, planners.Fora(2, last=0))
    assert computed(made) == "crcrcrc"


# ---------------------------------------------------------------- TaylorSeer
def test_orders_rise_with_the_values_there_are():
    plan = apply_block_cache(euler(), planners.TaylorSeer(2, 3, first=1, last=0))
    assert letters(plan) == "krk1k2k3k3k3"


def weights(plan, i, site="attn"):
    step = plan.steps[i]
    rule = next(rule for rule in step.variant.rules if rule.site == site)
    return step.forecast[rule.weights : rule.weights + rule.order + 1]


@pytest.mark.parametrize("variable", ["step", "lam"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_polynomial_in_the_variable_is_met_exactly(order, variable):
    plan = make_plan(VP, "ddim", 16)
    made = apply_block_cache(plan, planners.TaylorSeer(3, order, first=4, variable=variable, form="newton"))
    places = [step.lam if variable == "lam" else float(i) for i, step in enumerate(plan.steps)]
    f = np.polynomial.Polynomial(np.arange(1.0, order + 2) / 8)
    line = computed(made)
    assert str(order) in line
    for i, letter in enumerate(line):
        if letter == str(order):
            newest = [j for j in reversed(range(i)) if line[j] == "c"][: order + 1]
            assert np.dot(weights(made, i), [f(places[j]) for j in newest]) == pytest.approx(f(places[i]), rel=1e-10)


def published(values, times, at, order):
    """A direct transcription of the published code: differences by the distance to the computed value before."""
    factors, before = [], 0.0
    for value, time in zip(values, times, strict=True):  # oldest first
        new = [value]
        for m in range(min(order, len(factors))):
            new.append((new[m] - factors[m]) / (time - before))
        factors, before = new, time
    k = at - times[-1]
    factorials = [1.0, 1.0, 2.0, 6.0]
    return sum(factors[m] * k**m / factorials[m] for m in range(len(factors)))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_published_form_is_the_published_codes(order):
    times = [0.0, 1.0, 2.0, 6.0, 9.0][-order - 1 :]
    values = list(np.random.default_rng(order).normal(size=order + 1))
    found = node_weights(times[::-1], 11.0, "taylor")
    assert np.dot(found, values[::-1]) == pytest.approx(published(values, times, 11.0, order), rel=1e-12)
    assert (node_weights(times[::-1], 11.0) == pytest.approx(found)) == (order == 1)


def test_infinite_and_repeated_places_lower_the_order():
    flow = apply_block_cache(euler(6), planners.TaylorSeer(2, 2, first=1, last=0, variable="lam"))
    assert euler(6).steps[0].lam == -np.inf
    assert letters(flow) == "krkrk1"  # the value at lam = -inf is never a node
    heun = apply_block_cache(
        make_plan(NoiseSchedule.edm(), "heun", 5), "taylor_seer", interval=2, first=2, variable="lam"
    )
    assert all(np.isfinite(step.forecast).all() for step in heun.steps)


# ---------------------------------------------------------------- SmoothCache
def smoothcache(curve, alpha, most):
    """A direct transcription: the largest k with E(i, k) <= alpha, then i + k + 1."""
    count, out, i = len(curve), [], 0
    while i < count:
        reach = max((k for k in range(1, most + 1) if k <= count - 1 - i and curve[i][k - 1] <= alpha), default=0)
        if i + reach >= count - 1:
            reach = max(0, count - 2 - i)  # the last one computes
        out += ["c"] + ["r"] * reach
        i += reach + 1
    return "".join(out)


@pytest.mark.parametrize("alpha", [0.05, 0.12, 0.3])
def test_smoothcache_is_the_published_rule(alpha):
    rng = np.random.default_rng(5)
    curve = np.cumsum(rng.uniform(0.02, 0.12, size=(20, 3)), axis=1)
    plan = apply_block_cache(euler(20), planners.SmoothCache({"attn": curve}, alpha))
    assert computed(plan) == smoothcache(curve, alpha, 3)


def test_errors_are_read_at_the_evaluation_they_were_measured_at():
    curve = np.full((12, 3), 9.0)
    curve[4, :2] = 0.01  # evaluation 4 against 5 and against 6
    plan = apply_block_cache(euler(), planners.SmoothCache({"attn": curve}))
    assert computed(plan) == "ccccc" + "rr" + "ccccc"


def test_evaluations_without_a_measurement_compute():
    curve = np.full((12, 2), 0.01)
    curve[-2:] = np.nan
    plan = apply_block_cache(euler(), planners.SmoothCache({"mlp": curve}, most=2, last=0))
    assert computed(plan, "mlp") == "crrcrrcrrcrr" and computed(plan) == "c" * 12


def test_sites_have_schedules_of_their_own():
    low, high = np.full((12, 3), 0.01), np.full((12, 3), 0.5)
    plan = apply_block_cache(euler(), planners.SmoothCache({"attn": low, "mlp": high}))
    assert "r" in letters(plan) and letters(plan, "mlp") == "c" * 12


# ---------------------------------------------------------------- MagCache
def test_magcache_is_the_published_rule():
    ratios = np.random.default_rng(2).uniform(0.93, 1.0, size=28)
    made, product, error, row = "", 1.0, 0.0, 0
    for i, ratio in enumerate(ratios):
        product, row = product * ratio, row + 1
        error += abs(1 - product)
        skip = error <= 0.12 and row <= 3 and i >= int(0.2 * 28)
        if not skip:
            product, error, row = 1.0, 0.0, 0
        made += "r" if skip else "c"
    plan = apply_block_cache(euler(28), planners.MagCache(ratios, 0.12))
    assert computed(plan, "residual") == made and "r" in made


# ---------------------------------------------------------------- masks and U-Nets
def test_a_mask_says_which_evaluations_add_the_kept_residual():
    plan = apply_block_cache(euler(6), planners.StepMask("1,0,0,1,0,1", first_blocks=2, last_blocks=1))
    assert letters(plan, "residual") == "krrkrc"
    assert {rule.blocks for step in plan.steps for rule in step.variant.rules} == {(2, -1)}


def test_deepcache_reuses_what_lies_within_the_rim():
    plan = apply_block_cache(euler(7), planners.DeepCache(3, branch=1))
    assert computed(plan, "block") == "crrcrrc" and plan.steps[1].variant.rules[0].blocks == (2, -2)


def test_deepcache_can_be_densest_around_a_centre():
    plan = apply_block_cache(euler(50), planners.DeepCache(5, centre=15))
    full = [i for i, letter in enumerate(computed(plan, "block")) if letter == "c"]
    gaps = np.diff(full)
    assert full[0] == 0 and len(full) <= 11
    assert gaps[np.searchsorted(full, 15) - 1] == gaps.min() and gaps[-1] == gaps.max()


def test_the_encoder_runs_at_its_keys_and_late_evaluations_see_prior_noise():
    plan = apply_block_cache(euler(50), planners.FasterDiffusion(encoder=4))
    keys = [i for i, letter in enumerate(computed(plan, "block")) if letter == "c"]
    assert keys == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    assert plan.steps[1 + 3].variant.rules[0].blocks == (0, 4)
    added = [i + 1 for i, step in enumerate(plan.steps) if ("noise:0", 0.003) in step.ops[-1].terms]
    assert added == list(range(25, 50))


def test_a_tail_adds_the_prior_noise_that_the_run_adds():
    tail = apply_block_cache(euler(50), planners.FasterDiffusion(encoder=4)).tail(0.6)
    added = [i + 1 for i, step in enumerate(tail.steps) if ("noise:0", 0.003) in step.ops[-1].terms]
    assert added == list(range(5, 30))
    inner = apply_block_cache(make_plan(NoiseSchedule.edm(), "dpmpp_2s", 6), planners.FasterDiffusion(encoder=3))
    stages = [i for i, step in enumerate(inner.steps) if step.x != "x"]
    assert stages and not any(("noise:0", 0.24) in inner.steps[i - 1].ops[-1].terms for i in stages)


def test_the_encoder_of_a_bound_u_net_is_known():
    unet = replace(SPEC, blocks=9)
    plan = apply_block_cache(euler(20).bind(unet), "faster_diffusion", noise=0.0)
    assert plan.steps[4 - 1].variant.rules[0].blocks == (0, 5)
    assert all(len(step.ops) == 1 for step in plan.steps)
    for bad in (euler(20), euler(20).bind(SPEC)):
        with pytest.raises(ArgumentError, match="which blocks are the encoder"):
            apply_block_cache(bad, planners.FasterDiffusion())


# ---------------------------------------------------------------- nothing asked, nothing written
NOTHING = [
    planners.Fora(1),
    planners.TaylorSeer(1, 2),
    planners.SmoothCache({"attn": np.zeros((12, 3)), "mlp": np.full((12, 3), 0.1)}, alpha=0.0),
    planners.MagCache(np.ones(12), threshold=0.0),
    planners.MagCache(np.full(12, 0.99), most=0),
    planners.StepMask([1] * 12),
    planners.DeepCache(1),
    planners.DeepCache(1, centre=4),
    planners.FasterDiffusion(keys=range(12), encoder=3),
    planners.Fora(3, window=(0.0, 0.01)),
]


@pytest.mark.parametrize("planner", NOTHING, ids=lambda planner: type(planner).__name__)
def test_what_gives_nothing_again_writes_nothing(planner):
    assert apply_block_cache(euler(), planner).steps == euler().steps


# ---------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("planner", "message"),
    [
        (planners.Fora(0), "Fora: interval=0"),
        (planners.Fora(2.0), "Fora: interval=2.0"),
        (planners.Fora(2, first=0), "Fora: first=0"),
        (planners.Fora(2, sites=("attn", "attn")), "Fora: sites"),
        (planners.Fora(2, sites=("conv",)), "Fora: sites"),
        (planners.Fora(2, blocks=(1,)), "Fora: blocks"),
        (planners.Fora(2, window=(0.5, 0.5)), "Fora: window"),
        (planners.Fora(2, window=(0, 1000)), "Fora: window=1000"),
        (planners.TaylorSeer(order=5), "TaylorSeer: order=5"),
        (planners.TaylorSeer(variable="sigma"), "variable 'sigma'"),
        (planners.TaylorSeer(form="pade"), "form 'pade'"),
        (planners.SmoothCache({"attn": [[0.1] * 3] * 11}), "11 evaluations and 3 lags; the plan has 12"),
        (planners.SmoothCache({"attn": [[0.1] * 2] * 12}), "12 evaluations and 2 lags"),
        (planners.SmoothCache({"norm": [[0.1] * 3] * 12}), "SmoothCache: sites"),
        (planners.SmoothCache({"attn": [["a"]]}), "finite numbers in 2 axes"),
        (planners.SmoothCache({"attn": [[0.1] * 3] * 12}, alpha=-1), "SmoothCache: alpha=-1"),
        (planners.MagCache([1.0] * 11), "MagCache: 11 ratios"),
        (planners.MagCache([0.0] * 12), "one positive ratio"),
        (planners.StepMask([1, 0]), "of 2 entries; one 0 or 1 for each of the plan's 12"),
        (planners.StepMask([1, 2] * 6), "one 0 or 1"),
        (planners.DeepCache(3, centre=99), "a centre below 12"),
        (planners.FasterDiffusion(keys=[12], encoder=3), "FasterDiffusion: keys"),
        (planners.Scheduled([{"site": "attn", "blocks": [0, 0], "orders": [None] * 11}]), "each of 12 evaluations"),
        (planners.Scheduled([{"site": "attn", "orders": []}]), "a track has the fields"),
        (planners.Scheduled([], times=[0.0]), "1 times; the plan has 12"),
    ],
)
def test_bad_arguments_name_planner_and_field(planner, message):
    with pytest.raises(ArgumentError, match=message):
        apply_block_cache(euler(), planner)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope", {}), "planner 'nope'; use one of Fora, TaylorSeer"),
        ((3, {}), "planner 3"),
        (("fora", {"alpha": 1}), "Fora: arguments .'alpha'.; it takes interval, sites"),
        (("magcache", {}), "needs table"),
        ((planners.Fora(), {"interval": 2}), "give these to it"),
    ],
)
def test_names_of_planners_and_arguments_are_checked(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        apply_block_cache(euler(), arguments[0], **arguments[1])
