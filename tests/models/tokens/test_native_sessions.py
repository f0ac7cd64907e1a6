"""The native DiT with token rows through sessions: executors agree, bits, mixes of requests, precisions, caches."""

from dataclasses import replace

import pytest
import torch
from tests.models.compiled.test_native import forced, plan_of

import vivace
from vivace.engine.plan import Action, Guard, Rule
from vivace.kernels.spec import error_of
from vivace.models.compiled import native
from vivace.models.quantized.plain import round_layers


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def short(plan, keep=0.5, selector="random", **options):
    return vivace.passes.apply_tokens(plan, keep, selector=selector, **{"first": 2} | options)


@pytest.mark.parametrize("way", list(native.WAYS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"store": "int8"}, {"keep": 0.25, "slope": 0.2, "every": 4}])
def test_either_way_errs_no_more_than_twice_the_eager_executor(pipe, monkeypatch, way, dtype, options):
    """Random tokens, so that rounding cannot change which tokens are computed."""
    forced(monkeypatch, way)
    plan = short(plan_of(pipe, 6, 3.0, (0.0, 0.7)), **options)
    plain = short(plan_of(pipe, 6, 3.0, (0.0, 0.7)), **options | {"store": None})

    def latents(backend, dtype, plan=plan):
        return pipe.compile(plan, backend=backend, dtype=dtype)("red heart", n=2, seed=3).latents

    exact = latents("eager", "float64", plain)
    eager, ours = (error_of(latents(backend, dtype), exact) for backend in ("eager", "cpu"))
    assert ours <= 2 * eager + {"float32": 2**-24, "bfloat16": 2**-8}[dtype]


@pytest.mark.parametrize("way", list(native.WAYS))
@pytest.mark.parametrize("selector", ["deviation", "change"])
def test_a_picture_has_the_same_bits_alone_in_a_batch_and_beside_other_requests(pipe, monkeypatch, way, selector):
    """Pictures of one group compute tokens of their own choice, in one launch."""
    forced(monkeypatch, way)
    plan, other = short(plan_of(pipe, 6), selector=selector), short(plan_of(pipe, 7), 0.25, first=1)
    session = pipe.compile([plan, other], backend="cpu")
    alone = session("pizza", index=1, seed=5).latents
    assert torch.equal(session("pizza", n=3, seed=5).latents[1:2], alone)
    states = [session.begin(vivace.Request("rocket", other, n=2, seed=1)), session.begin(vivace.Request("tree", plan))]
    session.step(states)
    states.append(session.begin(vivace.Request("pizza", index=1, seed=5)))
    while not states[2].done:
        session.step([state for state in states if not state.done])
    assert torch.equal(session.finish(states[2]).latents, alone)


@pytest.mark.parametrize("way", list(native.WAYS))
def test_token_rows_run_beside_caches_and_int8(pipe, monkeypatch, way):
    """What token rows give again lies among all tokens, and their linears take 8 bits as those of full rows do."""
    forced(monkeypatch, way)
    pipe = vivace.load("emoji", quantized=round_layers(pipe, format="int8"))
    plan = vivace.passes.apply_precision(plan_of(pipe, 7, 3.0), "int8", blocks=(1, -1))
    plan = short(vivace.passes.apply_block_cache(plan, "fora", interval=2))
    session = pipe.compile(plan, backend="cpu")
    ours = session("red heart", n=2, seed=3)
    assert any(row.tokens and row.reused for row in ours.receipt.rows)
    assert torch.equal(session("red heart", index=1, seed=3).latents, ours.latents[1:])
    full = pipe.compile(plan_of(pipe, 7, 3.0), backend="eager")("red heart", n=2, seed=3).latents
    eager = pipe.compile(plan, backend="eager")("red heart", n=2, seed=3).latents
    assert error_of(ours.latents, eager.double()) < 0.1 * error_of(full, eager.double())


def test_a_compiled_token_row_allocates_no_arena_in_the_loop(pipe):
    plan = short(plan_of(pipe, 5))
    session = pipe.compile(plan, backend="cpu")
    state = session.begin(vivace.Request("tree"))
    before = session.executor.report()["arena"]
    while not state.done:
        session.step([state])
    assert session.executor.report()["arena"] == before
    session.finish(state)


@pytest.mark.parametrize("metric", ["first_block", "modulated_input"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_token_rows_before_a_guard_do_not_go_on_from_its_look(pipe, backend, metric):
    """A look runs all tokens; a guard of a later row, which never fires here, looks at token rows too."""
    plan = short(plan_of(pipe, 6), 0.25, last=1).bind(pipe.spec)
    residual, steps = Rule((1, plan.binding.blocks), "residual", action=Action.COMPUTE), list(plan.steps)
    full, last = steps[1].variant, steps[5].variant
    steps[1] = replace(steps[1], variant=replace(full, rules=(*full.rules, residual)))
    otherwise = replace(last, rules=(replace(residual, action=Action.REUSE),))
    guard = Guard(metric, "below", -1.0, otherwise, (1.0, 0.0))
    steps[5] = replace(steps[5], guard=guard)
    guarded = vivace.verify(replace(plan, steps=tuple(steps), recipe=None))
    ours, plain = (pipe.compile(each, backend=backend)("tree", n=2).latents for each in (guarded, plan))
    assert torch.equal(ours, plain)
