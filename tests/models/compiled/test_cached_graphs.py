"""Rows that keep and give again, through graphs: the native DiT, on a stand-in for CUDA graphs."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.models.compiled.test_graph_sessions import SCHEDULER, captured, plans, run, session
from tests.models.compiled.test_precisions import smoothed

import vivace
from vivace.engine.caching import caches
from vivace.engine.compiled import Evaluation
from vivace.engine.kept import split
from vivace.engine.plan import Action, Guard, Rule
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.compiled.parts import Part
from vivace.models.compiled.precisions import kinds_of
from vivace.models.compiled.replay import DitReplay
from vivace.models.load import load as load_model

SITES = {"halves": ("attn", "mlp"), "mlp": ("mlp",), "residual": ("residual",), "block": ("block",)}


class Walked(ClassDenoiser):
    """The native DiT evaluated by the ops of its pieces, handed the turns of the request as they are."""

    def __init__(self, model, quantized=None):
        super().__init__(model, quantized)
        label = partial(self.label, model.classes)
        self.replay = DitReplay(model.module, label, quantized=quantized)

    @staticmethod
    def label(null, match, branch):
        return match.id if branch == "cond" else null

    def evaluate(self, x, timesteps, conditions, variant, turns=(), resume=None, focus=None):
        lanes, found = tuple(range(len(x))), {}
        for branches, mine in split(variant.branches, turns):
            call = Evaluation(x, lanes, lanes, tuple(timesteps), tuple(conditions), (None,) * len(x))
            (piece,) = self.replay.stage(call, replace(variant, branches=branches))
            given = {name: torch.cat(parts) for name, parts in piece.inputs.items()}
            part, positions = Part(branches, mine, focus=focus), self.replay._table((x.shape[2] // 2, x.shape[3] // 2))
            sequence, scales = self.replay._sequence(kinds_of(self.model.module, variant)), given.get("x_scales")
            outs = sequence.run(given["x"], given["modulation"], positions, len(branches), x_scales=scales, part=part)
            found |= zip(branches, (out.clone() for out in outs), strict=True)
        return tuple(found[branch] for branch in variant.branches)


def loaded(folder, dtype=torch.float32):
    return Walked(load_model(folder, dtype=dtype, scheduler=SCHEDULER))


@pytest.fixture(scope="module")
def native(tiny_folder):
    return loaded(tiny_folder)


def cached(sites, steps=6, interval=3, order=0, store=None, scale=2.0):
    """A guided plan whose sites are computed every so many rows, else given again or forecast."""
    plan = plans(steps, scale)[1]
    shared = {"interval": interval, "sites": sites, "blocks": (1, 0), "first": 1, "store": store}
    if order:
        return vivace.passes.apply_block_cache(plan, "taylor_seer", order=order, **shared)
    return vivace.passes.apply_block_cache(plan, "fora", **shared)


def both(native, *made):
    """A session of graphs and the eager one."""
    return session(native, native.replay, *made), session(native, native.replay, *made, graphs=False)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("sites", list(SITES))
def test_rows_with_caches_have_the_bits_of_eager(native, sites, order):
    plan = cached(SITES[sites], order=order)
    graphs, eager = both(native, plan)
    for n in (1, 3):
        assert torch.equal(graphs(3, n=n, seed=5).latents, eager(3, n=n, seed=5).latents)
    captured(graphs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_have_the_bits_of_eager(tiny_folder, dtype):
    model = loaded(tiny_folder, dtype)
    for sites in (("attn", "mlp"), ("residual",)):
        graphs, eager = both(model, cached(sites, order=1))
        assert torch.equal(graphs(3, n=3, seed=5).latents, eager(3, n=3, seed=5).latents)
        captured(graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_eight_bits_have_the_bits_of_eager(tiny_folder, dtype):
    model = load_model(tiny_folder, dtype=dtype, scheduler=SCHEDULER)
    native = Walked(model, smoothed(model.module, False))
    mixed = vivace.passes.apply_precision(plans(5)[1], "int8", last=1, high="bf16")
    plan = vivace.passes.apply_block_cache(mixed, "fora", interval=2, blocks=(1, 0))
    tokens = vivace.passes.apply_tokens(mixed, 0.5, first=2)
    graphs, eager = both(native, plan, tokens)
    for made in (plan, tokens):
        for n in (1, 3):
            assert torch.equal(graphs(3, plan=made, n=n, seed=5).latents, eager(3, plan=made, n=n, seed=5).latents)
    captured(graphs)


@pytest.mark.parametrize("store", ["bf16", "fp16", "fp8", "int8"])
def test_stores_have_the_bits_of_eager(native, store):
    graphs, eager = both(native, cached(("attn", "mlp"), order=1, store=store))
    assert torch.equal(graphs(3, n=3, seed=5).latents, eager(3, n=3, seed=5).latents)
    captured(graphs)


def test_graphs_of_a_size_are_as_many_as_structures_and_numbers_make_none(native):
    plan = cached(("attn", "mlp"), order=1)
    graphs, _ = both(native, plan)
    structures = len({tuple(item.use for item in row.uses) for row in caches(plan.bind(native.spec)).rows})
    graphs(3, n=1)
    before = captured(graphs)
    assert before == structures  # the last row computes everything, as the self-test did
    newton = vivace.passes.apply_block_cache(
        plans(6)[1], "taylor_seer", order=1, interval=3, first=1, blocks=(1, 0), variable="lam"
    )
    for prompt, seed, other in ((5, 2, plan), (None, 3, newton), (1, 4, newton)):
        graphs(prompt, seed=seed, guidance_scale=seed / 2, plan=other)
    assert captured(graphs) == before


def test_requests_that_come_and_go_have_the_bits_of_alone(native):
    one, two = cached(("attn", "mlp"), order=1), cached(("residual",), steps=5, interval=2)
    asked = [vivace.Request(k % 4, plan=(one, two)[k % 2], n=1 + k % 3, seed=k) for k in range(6)]
    graphs, eager = both(native, one, two)
    wanted = [run(eager, [request])[0].latents for request in asked]
    for _ in range(2):
        states, done, waiting = [], {}, list(enumerate(asked))
        while waiting or states:
            if waiting:
                number, request = waiting.pop(0)
                states.append((number, graphs.begin(request)))
            graphs.step([state for _, state in states])
            done |= {number: graphs.finish(state).latents for number, state in states if state.done}
            states = [(number, state) for number, state in states if not state.done]
        assert all(torch.equal(done[number], latents) for number, latents in enumerate(wanted))
    captured(graphs)
    assert graphs.kept.idle


def test_a_slab_that_grows_is_captured_anew_and_its_graphs_are_dropped(native):
    plan = cached(("attn", "mlp"), order=1)
    graphs, eager = both(native, plan)
    request = vivace.Request(3, n=1, seed=5)
    state = graphs.begin(request)
    graphs.step([state])
    (slab,) = graphs.kept.slabs.values()
    place, before = slab.values, captured(graphs)
    others = [graphs.begin(vivace.Request(1, n=3, seed=6)) for _ in range(2)]
    assert slab.values is not place
    while not state.done:
        graphs.step([state])
    assert torch.equal(graphs.finish(state).latents, run(eager, [request])[0].latents)
    after = captured(graphs)
    assert before < after
    held = [artefact for artefact in graphs.executor._artefacts.values() if not artefact.stands()]
    assert not held
    for other in others:
        graphs.abort(other)
    graphs(3, n=1)
    assert captured(graphs) == after + 1  # its first row, which ran before the slab grew
    graphs(2, n=1, seed=9)
    assert captured(graphs) == after + 1


def test_memory_for_as_many_pictures_as_were_announced_is_there_before_the_first(native):
    plan = cached(("attn", "mlp"), order=1)
    made, _ = both(native, plan)
    graphs = type(made)(
        native, [plan], made.executor, shape=native.spec.latent_shape, expand=lambda p: p.bind(native.spec), batch=3
    )
    (slab,) = graphs.kept.slabs.values()
    place, before = slab.values, captured(graphs)
    graphs(3, n=3)
    graphs(3, n=1)
    assert slab.values is place
    structures = captured(graphs) - before
    assert 0 < structures < 5  # of one picture; those of three were there


def test_rows_that_fill_a_bucket_keep_nothing_of_others(native):
    plan = cached(("attn", "mlp"), order=2)
    graphs, eager = both(native, plan)
    asked = [vivace.Request(3, n=1, seed=1), vivace.Request(2, n=3, seed=2), vivace.Request(1, n=1, seed=3)]
    for mine, theirs in zip(run(graphs, asked), [run(eager, [request])[0] for request in asked], strict=True):
        assert torch.equal(mine.latents, theirs.latents)


def test_branches_that_do_not_the_same_run_apart(native):
    plan = plans(4)[1]
    steps = []
    for i, step in enumerate(plan.steps):
        rule = Rule((1, 0), "mlp", ("uncond",), Action.REUSE if i % 2 else Action.COMPUTE)
        steps.append(replace(step, variant=replace(step.variant, rules=(rule,))))
    graphs, eager = both(native, vivace.verify(replace(plan, steps=tuple(steps))))
    assert torch.equal(graphs(3, n=2, seed=5).latents, eager(3, n=2, seed=5).latents)
    captured(graphs)


def test_a_model_whose_bits_depend_on_the_batch_is_replayed_one_by_one(native):
    graphs, eager = both(native, cached(("attn", "mlp"), order=1))
    graphs.executor.one_by_one = "asked for"
    assert torch.equal(graphs(3, n=3, seed=5).latents, eager(3, n=3, seed=5).latents)
    captured(graphs)


def test_a_row_that_cannot_be_captured_keeps_once_and_says_why(native, monkeypatch):
    plan = cached(("attn", "mlp"), order=2)
    graphs, eager = both(native, plan)

    def refuse(forward, inputs):
        raise RuntimeError("it is Tuesday")

    monkeypatch.setattr(graphs.executor.graphs, "capture", refuse)
    result = graphs(3, n=3, seed=5)
    assert torch.equal(result.latents, eager(3, n=3, seed=5).latents)
    assert any("cannot be captured (it is Tuesday)" in use.reason for use in result.receipt.kernels)


def test_rows_that_go_on_from_a_look_run_without_graphs_and_say_so(tiny_folder):
    model = ClassDenoiser(load_model(tiny_folder, dtype=torch.float32, scheduler=SCHEDULER))
    replay, plan = loaded(tiny_folder).replay, plans(4)[1]
    steps = []
    for i, step in enumerate(plan.steps):
        keep, read = (
            replace(step.variant, rules=(Rule((1, 0), "residual", action=action),))
            for action in (Action.COMPUTE, Action.REUSE)
        )
        guard = Guard("first_block", "below", 0.3, read, (1.0, 0.0)) if i else None
        steps.append(replace(step, variant=keep, guard=guard))
    graphs = session(model, replay, vivace.verify(replace(plan, steps=tuple(steps))))
    result = graphs(3, n=2, seed=5)
    assert any("go on from a guard's look" in use.reason for use in result.receipt.kernels)
    assert any(use.reason == "captured" for use in result.receipt.kernels)


# --- rows that compute some tokens ------------------------------------------------------------------------------------
def some_tokens(plan, keep=0.5, selector="deviation"):
    return vivace.passes.apply_tokens(plan, keep, selector=selector, first=2, last=1)


@pytest.mark.parametrize("sites", [(), ("mlp",), ("residual",)])
def test_token_rows_have_the_bits_of_eager(native, sites):
    plan = some_tokens(cached(sites, steps=6, interval=2) if sites else plans(6)[1])
    graphs, eager = both(native, plan)
    for n in (1, 3):
        assert torch.equal(graphs(3, n=n, seed=5).latents, eager(3, n=n, seed=5).latents)
    before = captured(graphs)
    graphs(2, n=3, seed=6)
    assert captured(graphs) == before
    assert not any("eager" in use.reason for use in graphs(2, seed=6).receipt.kernels if use.op == "network")


def test_requests_with_token_rows_beside_others_have_the_bits_of_alone(native):
    one, two = some_tokens(plans(6)[1]), some_tokens(plans(5)[1], 0.25, "norm")
    asked = [vivace.Request(k % 4, plan=(one, two, plans(4)[1])[k % 3], n=1 + k % 2, seed=k) for k in range(5)]
    graphs, eager = both(native, one, two)
    for mine, request in zip(run(graphs, asked), asked, strict=True):
        assert torch.equal(mine.latents, run(eager, [request])[0].latents)
    captured(graphs)
