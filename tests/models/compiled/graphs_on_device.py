"""Captured rows on a GPU: bench/gpu.sh runs this file there. Without one, stand-ins do (test_cached_graphs)."""

import pytest
import torch
from tests.models.compiled.test_native import plan_of

import vivace
from vivace.kernels.spec import UNIT_ROUNDOFF, error_of

FORA = {"interval": 2, "blocks": (1, 0)}
TAYLOR = {"interval": 3, "order": 1, "first": 1, "blocks": (1, 0)}
PLANS = {
    "none": lambda plan: plan,
    "halves": lambda plan: vivace.passes.apply_block_cache(plan, "taylor_seer", **TAYLOR),
    "int8": lambda plan: vivace.passes.apply_block_cache(plan, "taylor_seer", store="int8", **TAYLOR),
    "residual": lambda plan: vivace.passes.apply_block_cache(plan, "fora", sites=("residual",), **FORA),
    "block": lambda plan: vivace.passes.apply_block_cache(plan, "fora", sites=("block",), **FORA),
    "tokens": lambda plan: vivace.passes.apply_tokens(plan, 0.5, selector="random", first=2),
}


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def made(pipe, name, steps=6):
    return PLANS[name](plan_of(pipe, steps))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(PLANS))
def test_captured_rows_err_no_more_than_twice_the_eager_executor(pipe, name, dtype):
    plan = made(pipe, name)
    exact = pipe.compile(plan, backend="eager", device="cpu", dtype="float64")("red heart", n=3, seed=3).latents
    eager = pipe.compile(plan, backend="eager", device="cuda", dtype=dtype)("red heart", n=3, seed=3).latents
    session = pipe.compile(plan, backend="cuda_graph", device="cuda", dtype=dtype)
    ours = session("red heart", n=3, seed=3)
    assert error_of(ours.latents.cpu(), exact) <= 2 * error_of(eager.cpu(), exact) + UNIT_ROUNDOFF[dtype]
    assert [use.reason for use in ours.receipt.kernels if use.op == "network"] == ["captured"]


def test_a_request_has_the_same_bits_before_and_after_its_slab_grew(pipe):
    plan = made(pipe, "halves")
    session = pipe.compile(plan, backend="cuda_graph", device="cuda", dtype="float32")
    alone = session("pizza", seed=5).latents.clone()
    slabs = {slab.serial for slab in session.kept.slabs.values()}
    states = [session.begin(vivace.Request(word, n=3, seed=1)) for word in ("tree", "rocket")]
    session.step(states)
    states.append(session.begin(vivace.Request("pizza", seed=5)))
    while not states[2].done:
        session.step(states[2:])
    assert slabs != {slab.serial for slab in session.kept.slabs.values()}
    assert torch.equal(session.finish(states[2]).latents, alone)
    assert torch.equal(session("pizza", seed=5).latents, alone)
    for state in states[:2]:
        session.abort(state)


@pytest.mark.parametrize("name", list(PLANS))
def test_the_host_waits_for_nothing_in_the_loop(pipe, name):
    session = pipe.compile(made(pipe, name), backend="cuda_graph", device="cuda", dtype="bfloat16")
    session("pizza", seed=5)
    state = session.begin(vivace.Request("tree", seed=6))
    torch.cuda.set_sync_debug_mode("error")
    try:
        while not state.done:
            session.step([state])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    session.finish(state)
