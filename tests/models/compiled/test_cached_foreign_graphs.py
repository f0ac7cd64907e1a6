"""Networks of diffusers that keep and give again, through graphs, on a stand-in for CUDA graphs."""

import gc
import weakref

import pytest
import torch
from tests.models.compiled.test_graph_sessions import captured, run, session
from tests.models.pipelines.test_denoiser import embeddings, load, plan_of, prompt_of

import vivace

CASES = [
    ("sd15", "block"),
    ("dit", "halves"),
    ("sdxl", "block"),
    ("sd3", "residual"),
    ("sd3", "halves"),
    ("flux", "residual"),
    ("flux", "halves"),
    ("pixart", "halves"),
    ("pixart", "block"),
]
SITES = {"halves": ("attn", "mlp")}


def both(name, **options):
    """A denoiser, its plan with caches, a session of graphs and the eager one."""
    pipe = load(name)
    denoiser = pipe._denoiser(dict(pipe.networks))
    plan = cached(plan_of(name, pipe, 5), **options)
    replayed = denoiser.replayable()
    return plan, session(denoiser, replayed, plan), session(denoiser, replayed, plan, graphs=False)


def test_graphs_hold_nothing_of_a_request():
    _, graphs, _ = both("sd3", site="residual")
    state = graphs.begin(vivace.Request(prompt_of("sd3")))
    kept = weakref.ref(state.kept)
    while not state.done:
        graphs.step([state])
    graphs.finish(state)
    captured(graphs)
    del state
    gc.collect()
    assert kept() is None


def test_rows_of_unequal_arguments_keep_in_pieces_of_their_own():
    _, graphs, eager = both("sd3", site="halves")
    short, long = prompt_of("sd3"), prompt_of("sd3")
    for sign in ("", "negative_"):
        long[f"{sign}prompt_embeds"] = embeddings(1, 9, 16, seed=8)
    asked = [vivace.Request(prompt, seed=i) for i, prompt in enumerate((short, long, short))]
    for executor in (graphs.executor, eager.executor):
        executor.one_by_one = None  # tiny networks run one by one by themselves
    for mine, theirs in zip(run(graphs, asked), run(eager, asked), strict=True):
        assert torch.equal(mine.latents, theirs.latents)
    captured(graphs)


def cached(plan, site="residual", order=1, store=None):
    planner = {"sites": SITES.get(site, (site,)), "blocks": (1, 0), "interval": 2, "first": 1, "last": 0}
    return vivace.passes.apply_block_cache(plan, "taylor_seer", order=order, store=store, **planner)


@pytest.mark.parametrize(("name", "site"), CASES)
def test_rows_with_caches_have_the_bits_of_eager(name, site):
    plan, graphs, eager = both(name, site=site)
    asked = [vivace.Request(prompt_of(name), seed=k, n=k + 1) for k in range(2)]
    together = run(graphs, asked)
    for mine, request in zip(together, asked, strict=True):
        assert torch.equal(mine.latents, run(eager, [request])[0].latents)
        assert torch.equal(run(graphs, [request])[0].latents, mine.latents)
    before = captured(graphs)
    graphs(prompt_of(name), seed=7)
    assert captured(graphs) == before
    assert graphs.kept.idle


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_rows_of_some_tokens_have_the_bits_of_eager(name):
    pipe = load(name)
    denoiser = pipe._denoiser(dict(pipe.networks))
    plan = vivace.passes.apply_tokens(plan_of(name, pipe, 4), 0.5, first=2, last=0)
    replayed = denoiser.replayable()
    graphs, eager = session(denoiser, replayed, plan), session(denoiser, replayed, plan, graphs=False)
    asked = [vivace.Request(prompt_of(name), seed=k, n=k + 1) for k in range(2)]
    for mine, request in zip(run(graphs, asked), asked, strict=True):
        assert torch.equal(mine.latents, run(eager, [request])[0].latents)
    before = captured(graphs)
    again = graphs(prompt_of(name), seed=1, n=2)
    assert [use.reason for use in again.receipt.kernels if use.op == "network"] == ["captured"]
    assert captured(graphs) <= before + 4
