"""The executor of graphs, without a GPU: its bookkeeping, its code, and what it asks of torch.cuda."""

import ast
import gc
import inspect
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import vivace
from tests.engine.recording import HostTouched, NoHost, Recording, Watch, reachable
from tests.engine.test_session import mixed, run, v_plan
from tests.engine.toy import SHAPE, Toy
from vivace.engine import compiled as compiled_calls
from vivace.engine import denoiser as protocol
from vivace.engine.compiled import Evaluation
from vivace.engine.denoiser import Piece, predictions, samples_of
from vivace.engine.executors import cuda_graph, graphs, steps
from vivace.engine.executors.cuda_graph import CudaGraphExecutor, bucket
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Guard, Variant
from vivace.engine.request import Request
from vivace.engine.session import Session
from vivace.errors import ShapeError, UnsupportedError


class Staged(Toy):
    """The toy in pieces: one per branch, so that their rows must be put in place."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault

    def stage(self, call, variant, bucket=int):
        n = len(call.lanes)
        order = [*range(n), *[n - 1] * (bucket(n) - n)]
        places = (*range(n), *[-1] * (len(order) - n))
        numbers = {
            "t": (torch.tensor([call.timesteps[i] for i in order]).view(-1, 1, 1, 1),),
            "c": (torch.tensor([call.conditions[i] for i in order]).view(-1, 1, 1, 1),),
        }
        stray = call.x[call.lanes[0]] if self.fault == "stray" else None

        def forward(branch):
            def run(tensors):
                x = tensors["x"] if self.fault != "stray" else tensors["x"] + stray
                base = torch.tanh(x * 0.7 + 0.001 * tensors["t"])
                if self.fault == "item":
                    base = base * float(base.sum().item() > -1e9)
                if self.fault == "shape":
                    base = base[:, :1]
                return base + (0.1 * tensors["c"] if branch == "cond" else 0.0)

            return run

        pieces = []
        for b, branch in enumerate(variant.branches):
            key = (branch, len(order), tuple(call.x.shape[1:]))
            shifted = tuple(place if place < 0 else b * n + place for place in places)
            x = samples_of(call.x, [call.lanes[i] for i in order])
            pieces.append(Piece(key, numbers | {"x": x}, forward(branch), shifted))
        return tuple(pieces)

    precisions = frozenset()

    def why_not(self, variant):
        return None

    def hoist(self, timesteps, branches, condition):
        return None

    def weights(self):
        return ()

    def report(self):
        return {"network": "toy"}


def graphed(toy):
    recording = Recording(toy)
    return CudaGraphExecutor(toy, recording, graphs=recording)


def compiled(*plans, toy=None, **options):
    toy = toy or Staged()
    executor = graphed(toy)
    shape = options.pop("shape", SHAPE)
    bound = {"expand": lambda plan: plan.bind(toy.spec, shape), "probed": False}
    return Session(toy, plans, executor, shape=shape, **(bound | options))


def eager(*plans):
    toy = Toy()
    return Session(toy, plans, EagerExecutor(toy), shape=SHAPE, expand=lambda plan: plan.bind(toy.spec, SHAPE))


def test_mixed_steps_and_plans_give_the_bits_of_the_eager_executor():
    requests = mixed()
    together, wanted = run(compiled(requests[0].plan), requests), run(eager(requests[0].plan), requests)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(together, wanted, strict=True))
    alone = compiled(requests[0].plan)
    for request, result in zip(requests, wanted, strict=True):
        assert torch.equal(run(alone, [request])[0].latents, result.latents)


def test_a_network_compiles_at_most_once_for_each_size_of_the_ladder():
    session = compiled(apply_guidance(v_plan(3), 2.0))
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 3, 5, 1):
        session(n=n, seed=n)
    assert session.executor.compiles == 2 * len({bucket(n) for n in range(1, 9)}) == 8
    assert session.executor.graphs.captured == session.executor.graphs.warmed == 8
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_numbers_compile_nothing():
    session = compiled(apply_guidance(v_plan(4), 2.0))
    session("a", n=2)
    before = session.executor.compiles
    session("another prompt", n=2, seed=9, guidance_scale=7.0, plan=apply_guidance(v_plan(9, solver="ddim"), 3.0))
    assert session("a", n=2).receipt.compiles == session.executor.compiles == before


def test_what_a_plan_needs_is_captured_when_it_is_compiled():
    session = compiled(apply_guidance(v_plan(3), 2.0), batch=3)
    assert session.executor.compiles == 2
    assert session(n=3).receipt.compiles == 2
    nameless = Staged()
    nameless.encode = lambda prompt: Toy().encode("nonsense" if prompt is None else prompt)
    assert compiled(v_plan(2), toy=nameless).executor.compiles == 0
    assert compiled(v_plan(2), shape=(3, 4, 4)).executor.compiles == 0


def test_another_shape_is_another_artefact():
    session, small = compiled(v_plan(2)), (3, 4, 4)
    before = session.executor.compiles
    for _ in range(2):
        outs = session.executor.evaluate(torch.zeros(1, *small), (5.0,), (0.0,), Variant())
        assert outs[0].shape == (1, *small)
    assert session.executor.compiles == before + 1


def test_the_least_recently_used_artefact_goes_first(monkeypatch):
    monkeypatch.setattr(CudaGraphExecutor, "kept", 2)
    executor = compiled(v_plan(2), batch=4).executor  # captured for a bucket of 4
    assert executor.compiles == 1

    def evaluate(n):
        executor.evaluate(torch.zeros(n, *SHAPE), (5.0,) * n, (0.0,) * n, Variant())

    for n in (1, 3, 2, 4, 2):
        evaluate(n)
    assert executor.compiles == 3  # 4 was used after 1
    evaluate(1)
    assert executor.compiles == 4 and executor.report()["graphs"] == 2
    inputs = (1 + 2) * (3 * 64 + 1 + 1) * 4  # x, time, condition in float32
    assert executor.report()["graph_bytes"] == inputs


def test_a_piece_that_cannot_be_captured_runs_eagerly_and_says_so():
    session = compiled(v_plan(3), toy=Staged("item"))
    result = session("abc", n=2, seed=4)
    assert torch.equal(result.latents, eager(v_plan(3))("abc", n=2, seed=4).latents)
    assert result.receipt.compiled["graphs"] == 0
    (use,) = [use for use in result.receipt.kernels if use.op == "network"]
    assert (use.backend, "item" in use.reason) == ("torch", True)
    good = compiled(v_plan(3))("abc").receipt
    assert "not_captured" not in good.compiled and good.executor == "cuda_graph"


def test_the_stand_in_fails_a_function_that_reads_what_is_not_static():
    weight, given, stray = torch.ones(2), torch.ones(2), torch.ones(2)
    with Watch([given], reachable(lambda: weight)), pytest.raises(AssertionError, match="not static"):
        (given * weight) + stray
    for touch in (torch.Tensor.item, torch.Tensor.tolist, bool, float, lambda t: torch.tensor([1.0])):
        with NoHost(), pytest.raises(HostTouched):
            touch(torch.ones(()))
    with pytest.raises(AssertionError, match="holds tensors of its first row"):
        compiled(v_plan(2), toy=Staged("stray"))


def test_a_model_whose_bits_depend_on_the_batch_is_replayed_one_by_one():
    session, plan = compiled(v_plan(3)), v_plan(3)
    session.executor.one_by_one = "asked for"
    before = session.executor.compiles
    got = session("ab", n=3, seed=1)
    assert torch.equal(got.latents, eager(plan)("ab", n=3, seed=1).latents)
    assert session.executor.compiles == before  # the one of a single sample was there


def test_what_cannot_run_is_refused_before_anything_runs():
    toy = Staged()
    with pytest.raises(UnsupportedError, match="graphs run models on cuda, this one is on cpu"):
        CudaGraphExecutor(toy, toy)
    session = compiled(v_plan(3))
    before = session.executor.compiles
    plan = v_plan(3)
    guarded = replace(plan.steps[1], guard=Guard("change", "below", 0.1, Variant(branches=("cond",))))
    bound = replace(plan, steps=(plan.steps[0], guarded, plan.steps[2]))
    with pytest.raises(UnsupportedError, match="step 1: the cuda_graph executor does not run a guard on 'change'"):
        session.executor.check(bound)
    toy.why_not = lambda variant: "it is Tuesday"
    with pytest.raises(UnsupportedError, match="step 0: .* cannot run it: it is Tuesday; use backend='eager'"):
        graphed(toy).check(plan)
    assert session.executor.compiles == before
    with pytest.raises(ShapeError, match="branch 'cond'"):
        compiled(v_plan(2), toy=Staged("shape"))


@pytest.mark.parametrize(
    ("places", "views"), [((0, 1, 2, -1, 3, 4, 5, -1), True), ((0, 1, 2, 3, 4, 5), True), ((3, 0, 1, 2, 4, 5), False)]
)
def test_predictions_are_put_in_place(places, views):
    rows = torch.tensor([float(place) for place in places])
    piece = Piece("key", {}, lambda tensors: rows, places)
    outs = predictions([piece], [rows], 2, 3)
    assert [out.tolist() for out in outs] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert all((out.untyped_storage()._cdata == rows.untyped_storage()._cdata) == views for out in outs)


# --- what runs between a row's begin and its end ----------------------------------------------------------------------
def loop_functions():
    from vivace.models.caching import bound, laid_out, lanes, planes
    from vivace.models.compiled import linears, replay, sequence, sequence_tokens, sequence_walk
    from vivace.models.pipelines import network

    yield from (cuda_graph.CudaGraphExecutor, cuda_graph._write, compiled_calls.Evaluation)
    yield from (graphs.CudaGraph, protocol.predictions, protocol.samples_of, steps.finish_rows)
    yield from (replay.DitReplay.stage, replay.DitReplay._modulation, replay.DitReplay._forward)
    yield from (sequence.DitSequence.run, sequence.DitSequence._embed, sequence.DitSequence._block)
    yield from (sequence.DitSequence._attention, sequence.DitSequence.inside, sequence.DitSequence.normed)
    yield from (sequence.DitSequence.update, sequence.DitSequence._product, sequence_walk.Walk)
    yield from (linears._PlainLayer.__call__, linears._OurLayer.__call__)
    yield from (
        replay.DitReplay._laid_out,
        laid_out.Layouts,
        laid_out._lay_out,
        laid_out._cell,
        laid_out._bound,
        laid_out._stands,
    )
    yield from (planes.keep, planes._placed, planes.on_device, planes._sent, planes.sendable)
    yield from (sequence_tokens.Keys, sequence_tokens.picked, sequence_tokens.planes_of)
    yield from (lanes.Lanes.keep, lanes.Lanes.lanes, lanes.Lanes.index, lanes.Lanes.weights, bound.Bound, bound._run)
    yield from (
        network.NetworkDenoiser._kept,
        network.NetworkDenoiser.stage,
        network.NetworkDenoiser._forward,
        network._prediction,
    )


SYNCS = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


def offences(function):
    """Calls in the source of a function that wait for a device, or send host data from memory that is not pinned."""
    for node in ast.walk(ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, text = node.func.attr, ast.unparse(node)
            if name in SYNCS:
                yield text
            if name in ("tensor", "as_tensor") and "device=" in text and "pin_memory" not in text:
                yield text
            if name in ("to", "cuda") and "non_blocking=True" not in text:
                yield text
            if name == "copy_" and len(node.args) == 1 and "static[" in text and "non_blocking=True" not in text:
                yield text


@pytest.mark.parametrize("function", [*loop_functions()], ids=lambda f: f.__qualname__)
def test_nothing_in_a_row_waits_for_the_device(function):
    assert list(offences(function)) == []


def test_the_check_of_the_loop_finds_what_waits():
    def guilty(x):
        x.item(), x.to("cpu"), torch.tensor([1], device="cuda"), torch.cuda.synchronize()

    assert len(list(offences(guilty))) == 4


# --- what is asked of torch.cuda --------------------------------------------------------------------------------------
@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as a list of what was called, in order."""
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append("wait")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextmanager
    def block(name, *args, **kwargs):
        calls.append((name, kwargs.get("pool")))
        yield
        calls.append(f"end {name}")

    fakes = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: block("stream"),
        "CUDAGraph": Graph,
        "graph": lambda graph, pool, stream, capture_error_mode: block("graph", pool=pool),
        "graph_pool_handle": lambda: calls.append("pool") or len(calls),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda: 0,
        "device": lambda device: block("device", pool=device),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return calls


def test_graphs_share_one_memory_pool_and_warm_up_on_another_stream(cuda):
    made, x = graphs.CudaGraphs(), torch.ones(2)
    made.warm_up(lambda tensors: cuda.append("run"), {"x": x})
    assert cuda == ["wait", ("stream", None), *["run"] * graphs.WARM_UPS, "end stream", "wait"]
    cuda.clear()
    first, second = (made.capture(lambda tensors: tensors["x"] + 1, {"x": x}) for _ in range(2))
    assert cuda == ["pool", ("graph", 1), "end graph", ("graph", 1), "end graph"]
    with made.ready(torch.device("cuda", 1)):
        assert cuda[-1] == ("device", torch.device("cuda", 1))
    assert first.replay() is first.result and second.result is not first.result and cuda[-1] == "replay"


def test_a_graph_keeps_the_memory_that_its_function_brought_along(cuda):
    memory = torch.ones(2)
    seen = weakref.ref(memory)
    graph = graphs.CudaGraphs().capture(lambda tensors, memory=memory: tensors["x"] + memory, {"x": torch.ones(2)})
    del memory
    gc.collect()
    assert seen() is not None
    del graph
    gc.collect()
    assert seen() is None


def test_a_failed_capture_leaves_its_pool_to_the_graphs_that_are_in_it(cuda):
    made = graphs.CudaGraphs()

    def broken(tensors):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        made.capture(broken, {})
    made.capture(lambda tensors: tensors["x"], {"x": torch.ones(1)})
    assert cuda.count("pool") == 2


def test_the_network_is_evaluated_alone_with_the_bits_of_a_run():
    toy = Staged()
    executor, x = graphed(toy), torch.randn(3, *SHAPE)
    variant = Variant(branches=("cond", "uncond"))
    outs = executor.evaluate(x, (1.0, 2.0, 3.0), (0.0, 1.0, 2.0), variant)
    wanted = Toy().evaluate(x, (1.0, 2.0, 3.0), (0.0, 1.0, 2.0), variant)
    assert all(torch.equal(a, b) for a, b in zip(outs, wanted, strict=True))
    lanes = Evaluation(x, (2, 0), (0, 0), (3.0, 1.0), (2.0, 0.0), (None, None))
    assert torch.equal(executor._network(lanes, variant)[1], wanted[1][[2, 0]])


def test_a_request_through_graphs_is_the_one_of_sample():
    plan, toy = apply_guidance(v_plan(5), 3.0), Toy()
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))

    def call(x, t, branch):
        return toy.evaluate(x, t.tolist(), [3.0] * len(x), Variant(branches=(branch,)))[0]

    assert torch.equal(compiled(plan)(prompt="abc", n=2, latents=noise).latents, vivace.sample(call, plan, noise))
    assert Request("abc").n == 1
