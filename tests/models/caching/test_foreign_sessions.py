"""Sessions of foreign models whose plans cache: the same pictures alone, in a row and beside others; guards' looks."""

from functools import cache, partial

import pytest
import torch
from tests.models.caching.keeping import later, recorded
from tests.models.pipelines.checks import networks
from tests.models.pipelines.test_denoiser import load, plan_of, prompt_of
from tests.models.pipelines.tiny import FAMILIES

import vivace
from vivace.engine.passes import apply_block_cache, apply_guards, apply_precision
from vivace.errors import UnsupportedError
from vivace.models.caching.foreign import Cached, Keeper
from vivace.models.caching.foreign_looks import Look, metrics_of, resumed, states_of

UNETS = ("sd15", "sdxl")
TRANSFORMERS = [name for name in FAMILIES if name not in UNETS]
FIRST_ATTENTION = {
    **dict.fromkeys(("sd3", "flux", "flux_true_cfg", "flux2", "qwen", "hunyuan_video"), "transformer_blocks.0.attn"),
    "lumina2": "noise_refiner.0.attn",
    **dict.fromkeys(("hunyuan_dit", "wan", "wan22"), "blocks.0.attn1"),
}


@cache
def pipe_of(name):
    return load(name)


def cached_plan(name, plan, interval=2):
    """A plan whose second row gives again: attention and MLP, of a UNet its inner blocks."""
    return apply_block_cache(plan, "deep_cache" if name in UNETS else "fora", interval=interval)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cached_plan_gives_the_same_bits_alone_in_a_row_and_beside_others(name):
    pipe = pipe_of(name)
    plan = pipe._expanded(plan_of(name, pipe, 3))
    saving, always = cached_plan(name, plan), cached_plan(name, plan, 1)
    # compiled, the plain network of this one differs in its last bits with the number of samples, at some timesteps
    session = pipe.compile([saving, plan], backend="eager" if name == "cogvideox" else "auto")
    prompt = prompt_of(name)
    asked = [vivace.Request(prompt, seed=1), vivace.Request(prompt, plan=plan, seed=2), vivace.Request(prompt, seed=3)]
    alone = [session(prompt, plan=request.plan, seed=request.seed) for request in asked]
    assert alone[0].receipt.caches["reused"] > 0 and not alone[0].receipt.warnings
    assert torch.equal(session(prompt, seed=1).latents, alone[0].latents)
    states = [session.begin(request) for request in asked]
    while not states[0].done:
        session.step(states)
    for state, single in zip(states, alone, strict=True):
        assert torch.equal(session.finish(state).latents, single.latents)
    assert session.kept.idle
    plain = session(prompt, plan=plan, seed=1)
    assert not torch.equal(plain.latents, alone[0].latents)
    same = session(prompt, plan=always, seed=1)
    assert torch.equal(same.latents, plain.latents)
    assert any("caching had no effect" in warning for warning in same.receipt.warnings)


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sd15"])
def test_eager_and_compiled_rows_agree(name):
    pipe = pipe_of(name)
    plan = cached_plan(name, pipe._expanded(plan_of(name, pipe, 3)))
    eager, compiled = (pipe.compile(plan, backend=backend)(prompt_of(name), seed=1) for backend in ("eager", "cpu"))
    assert eager.receipt.caches["bytes"] == compiled.receipt.caches["bytes"] > 0
    assert float((eager.latents - compiled.latents).norm() / eager.latents.norm()) < 1e-5


@pytest.mark.parametrize("name", ["pixart", "sd3", "sd15"])
def test_rows_in_another_precision_keep_and_give_for_each_other(name):
    pipe = pipe_of(name)
    plan = apply_precision(plan_of(name, pipe, 4), "bf16", first=1)
    saving = cached_plan(name, plan)
    session = pipe.compile([saving, plan])
    found, plain = (session(prompt_of(name), plan=each, seed=1) for each in (saving, plan))
    assert found.receipt.caches["reused"] > 0
    assert set(found.receipt.precisions) == set(plain.receipt.precisions) == {"model", "bf16"}
    assert 0.0 < float((found.latents - plain.latents).norm() / plain.latents.norm()) < 0.5
    assert torch.equal(session(prompt_of(name), plan=saving, seed=1).latents, found.latents)


GUARDS = {
    "first_block_cache": {},
    "db_cache": {"first": 2, "warm_up": 1},
    "tea_cache": {"table": (1.0, 0.0), "last": 0},
}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("name", ["sd3", "flux2"])
def test_a_guard_that_never_fires_changes_nothing_and_one_that_does_reuses(name, guard, backend):
    pipe = pipe_of(name)
    plan = plan_of(name, pipe, 4)
    never, ever = (apply_guards(plan, guard, threshold=threshold, **GUARDS[guard]) for threshold in (1e-12, 1.0))
    session = pipe.compile([plan, never, ever], backend=backend)
    prompt = prompt_of(name)
    plain = session(prompt, seed=1)
    looked = session(prompt, plan=never, seed=1)
    assert torch.equal(looked.latents, plain.latents)
    assert [decision.fired for decision in looked.receipt.decisions] == [(False,)] * 3
    fired = session(prompt, plan=ever, seed=1)
    assert any(decision.fired == (True,) for decision in fired.receipt.decisions)
    assert not torch.equal(fired.latents, plain.latents)
    both = session(prompt, plan=ever, seed=1, n=2)
    assert torch.equal(both.latents[:1], fired.latents)
    assert session.kept.idle


def test_prompts_of_other_lengths_keep_lanes_of_their_own():
    pipe = pipe_of("sd3")
    session = pipe.compile(cached_plan("sd3", plan_of("sd3", pipe, 3)))
    short, long = prompt_of("sd3"), prompt_of("sd3")
    for sign in ("", "negative_"):
        long[f"{sign}prompt_embeds"] = torch.cat([long[f"{sign}prompt_embeds"]] * 2, dim=1)
    states = [session.begin(vivace.Request(prompt, seed=i)) for i, prompt in enumerate((short, long))]
    while not states[0].done:
        session.step(states)
    for i, (state, prompt) in enumerate(zip(states, (short, long), strict=True)):
        assert torch.equal(session.finish(state).latents, session(prompt, seed=i).latents)


def test_sites_that_a_family_lacks_are_refused_before_any_work():
    pipe = pipe_of("sd15")
    plan = plan_of("sd15", pipe, 3)
    with pytest.raises(UnsupportedError, match=r"block 1 \(down_blocks.1, DownBlock2D\) has no site 'attn'"):
        pipe.compile(apply_block_cache(plan, "fora", interval=2))
    with pytest.raises(UnsupportedError, match="sites: attn, block, cross_attn, layer, .*mlp"):
        pipe.compile(apply_block_cache(plan, "fora", interval=2, sites=("residual",)))
    with pytest.raises(UnsupportedError, match="metrics: none"):
        pipe.compile(apply_guards(plan, "first_block_cache"))


# --- looks -----------------------------------------------------------------------------------------------------------
def looked(network, metric, params):
    """(the look, rows) at a captured call."""
    cached, rows = Cached(network.module), [("cond", n) for n in range(len(network.answer))]
    look = Look(cached, rows, metric, params)
    network.run(partial(cached.parts.forward, look))
    return cached, look, rows


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_run_that_goes_on_from_a_look_has_the_bits_of_a_whole_one(name):
    network = later(networks(name)[0])
    for blocks in (1, len(network.parts.blocks) - 1):
        cached, look, rows = looked(network, "first_block", (float(blocks),))
        seen = []

        def note(call, seen=seen):
            out = call.compute()
            seen.append((call.hidden[:, call.image], out.hidden[:, call.image]))
            return out

        network.intercepted(note)
        assert torch.equal(look.signal, seen[blocks - 1][1].float() - seen[0][0].float())
        states = [{} for _ in rows]
        states_of(look.held, rows, states)
        keeper = resumed(Keeper(cached.parts, cached.wiring, (), rows), states, look.block, rows)
        assert torch.equal(network.run(partial(cached.parts.forward, keeper)), network.answer)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_modulated_input_is_what_the_first_attention_reads(name):
    network = networks(name)[0]
    path = FIRST_ATTENTION.get(name, "transformer_blocks.0.attn1")
    wanted = recorded(network, [path])[path][0]
    cached, look, _ = looked(network, "modulated_input", ())
    assert metrics_of(cached) == {"first_block", "modulated_input"}
    assert torch.equal(look.signal, wanted.float()) and look.block == 0


def test_unets_have_no_metric():
    assert not metrics_of(Cached(networks("sd15")[0].module))
