"""The native DiT with caches through sessions: executors agree, bits, mixes of requests, guards."""

from dataclasses import replace

import pytest
import torch
from tests.models.compiled.test_native import forced, plan_of

import vivace
from vivace.engine.plan import Action, Guard, Rule
from vivace.kernels.spec import error_of
from vivace.models.caching import events
from vivace.models.compiled import native
from vivace.models.compiled.replay import DitReplay

KEEP, REUSE = Action.COMPUTE, Action.REUSE
SITES = {"halves": ("attn", "mlp"), "mlp": ("mlp",), "residual": ("residual",), "block": ("block",)}


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def cached(plan, interval, sites, blocks=(1, -1), store=None, **options):
    """Sites computed every so many rows, else reused."""
    steps = []
    for i, step in enumerate(plan.steps):
        action = REUSE if i % interval else KEEP
        rules = tuple(Rule(blocks, site, action=action, store=store, **options) for site in sites)
        steps.append(replace(step, variant=replace(step.variant, rules=rules)))
    return vivace.verify(replace(plan, steps=tuple(steps)))


def guarded(plan, threshold, metric="first_block", params=(1.0, 0.0)):
    """Every row but the first may reuse what all blocks but the first add."""
    steps = []
    for i, step in enumerate(plan.steps):
        keep, read = (
            replace(step.variant, rules=(Rule((1, 0), "residual", action=action),)) for action in (KEEP, REUSE)
        )
        guard = Guard(metric, "below", threshold, read, params) if i else None
        steps.append(replace(step, variant=keep, guard=guard))
    return vivace.verify(replace(plan, steps=tuple(steps)))


@pytest.mark.parametrize("way", list(native.WAYS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sites", list(SITES))
def test_either_way_errs_no_more_than_twice_the_eager_executor(pipe, monkeypatch, way, dtype, sites):
    forced(monkeypatch, way)
    plan = cached(plan_of(pipe, 4, 3.0, (0.0, 0.7)), 2, SITES[sites])

    def latents(backend, dtype):
        return pipe.compile(plan, backend=backend, dtype=dtype)("red heart", n=2, seed=3).latents

    exact = latents("eager", "float64")
    eager, ours = (error_of(latents(backend, dtype), exact) for backend in ("eager", "cpu"))
    assert ours <= 2 * eager + {"float32": 2**-24, "bfloat16": 2**-8}[dtype]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_plan_that_always_computes_gives_the_bits_of_one_without_caches(pipe, backend):
    plan = plan_of(pipe, 3)
    plain = pipe.compile(plan, backend=backend)("pizza", seed=5).latents
    for sites in SITES.values():
        assert torch.equal(pipe.compile(cached(plan, 1, sites), backend=backend)("pizza", seed=5).latents, plain)


@pytest.mark.parametrize("way", list(native.WAYS))
@pytest.mark.parametrize("store", [None, "int8"])
def test_a_picture_has_the_same_bits_alone_in_a_batch_and_beside_other_requests(pipe, monkeypatch, way, store):
    forced(monkeypatch, way)
    plan, other = cached(plan_of(pipe, 5), 2, ("attn", "mlp"), store=store), cached(plan_of(pipe, 6), 3, ("residual",))
    session = pipe.compile([plan, other], backend="cpu")
    alone = session("pizza", index=1, seed=5).latents
    assert torch.equal(session("pizza", n=3, seed=5).latents[1:2], alone)
    states = [session.begin(vivace.Request("rocket", other, n=2, seed=1)), session.begin(vivace.Request("tree", plan))]
    session.step(states)
    states.append(session.begin(vivace.Request("pizza", index=1, seed=5)))
    while not states[2].done:
        session.step([state for state in states if not state.done])
    assert torch.equal(session.finish(states[2]).latents, alone)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize(
    ("metric", "params"), [("first_block", (1.0, 0.0)), ("first_block", (2.0, 0.0)), ("modulated_input", (1.0, 0.0))]
)
def test_a_guard_that_never_fires_changes_no_bit_and_one_that_fires_gives_every_sample_its_own(
    pipe, backend, metric, params
):
    plan = plan_of(pipe, 4)
    never = pipe.compile(guarded(plan, 0.0, metric, params), backend=backend)
    plain = pipe.compile(plan, backend=backend)
    assert torch.equal(never("cat face", seed=2).latents, plain("cat face", seed=2).latents)
    often = pipe.compile(guarded(plan, 0.4, metric, params), backend=backend)
    pair = often("cat face", n=2, seed=2).latents
    assert not torch.equal(pair, plain("cat face", n=2, seed=2).latents)
    for index in range(2):
        assert torch.equal(often("cat face", index=index, seed=2).latents[0], pair[index])


def test_rows_of_one_branch_alone_run_apart(pipe, monkeypatch):
    forced(monkeypatch, native.CPP)
    plan = cached(plan_of(pipe, 4), 2, ("mlp",), branches=("uncond",))
    exact, eager, ours = (
        pipe.compile(plan, backend=backend, dtype=dtype)("red heart", seed=3).latents
        for backend, dtype in (("eager", "float64"), ("eager", None), ("cpu", None))
    )
    assert error_of(ours, exact) <= 2 * error_of(eager, exact) + 2**-24


def test_graphs_have_all_sites_and_no_metric():
    assert DitReplay.sites == events.SITES and not DitReplay.metrics
