"""Merged tokens in networks: the same by plain hooks and matrices, one map for all branches, sessions and pipelines."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from tests.models.pipelines.checks import networks
from tests.models.pipelines.test_denoiser import load, noise_of, plan_of, prompt_of
from tests.models.pipelines.tiny import FAMILIES, make

import vivace
from vivace.engine.merge_rows import MergeRow
from vivace.engine.merging import Merges, MergeSample, Merging
from vivace.engine.passes import apply_block_cache, apply_guidance, apply_merge, apply_precision
from vivace.errors import UnsupportedError
from vivace.models.caching.foreign import Cached
from vivace.models.tokens.merge import best_pairs, drawn_per_cell, left_of
from vivace.models.tokens.merging import merging_blocks

UNETS = ("sd15", "sdxl")
MERGING = ("dit", "pixart", "sd3", "flux", "flux_true_cfg", *UNETS)
SEED, ROW = 5, 2


@cache
def pipe_of(name):
    return load(name)


def merging(network, share, sites=("attn",), fresh=True, levels=1, state=None):
    """(what a row merges in all blocks, the request's state) for the rows of a captured call, two branches or one."""
    count = len(network.answer)
    order = ("uncond", "cond") if count > 1 else ("cond",)
    state = state or Merges((SEED,), (0,))
    row = MergeRow((((0, len(network.parts.blocks)), share, fresh),), 2, tuple(sites), False, levels)
    return Merging("main", row, (MergeSample(state, 0, ROW),)), [(branch, 0) for branch in order], state


def merged(network, share, **options):
    """What a captured call answers with merged tokens."""
    said, rows, state = merging(network, share, **options)
    cached = Cached(network.module)
    return network.run(partial(cached.run, cached.keeper((), rows, None, said))), state


class ByHand:
    """The same by torch's hooks: dense matrices around every attention, made of the row of branch "cond"."""

    def __init__(self, network, share, sites):
        self.network, self.share, self.grid = network, share, None
        self.handles = []
        paths = {"attn": ("attn", "attn1", "attn2"), "mlp": ("ff",)}
        wanted = [name for site in sites for name in paths[site]]
        for module in network.module.modules():
            kind = type(module).__name__
            if kind == "Transformer2DModel":
                self.handles.append(module.register_forward_pre_hook(self._sized))
            elif kind.endswith("TransformerBlock"):
                self.handles.append(module.register_forward_pre_hook(self._mapped, with_kwargs=True))
                for name in wanted:
                    child = getattr(module, name, None)
                    if child is None or (name == "attn2" and kind == "BasicTransformerBlock"):
                        continue
                    self.handles.append(child.register_forward_pre_hook(self._before, with_kwargs=True))
                    self.handles.append(child.register_forward_hook(self._after))

    def _sized(self, module, args):
        self.grid = tuple(args[0].shape[-2:])

    def _mapped(self, module, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        tokens = hidden.shape[1]
        grid = self.grid or (int(tokens**0.5),) * 2
        left = left_of(grid, 2, self.share) if tokens >= self.least else tokens
        place, self.origin = torch.arange(tokens), torch.arange(tokens)
        if left < tokens:
            place, self.origin = best_pairs(hidden[-1], drawn_per_cell(grid, 2, SEED, 0, ROW), left)
        given = torch.nn.functional.one_hot(place, left).to(hidden.dtype)
        self.unmerge, self.merge = given, (given / given.sum(dim=0)).T

    def _before(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        self.lead = hidden.shape[1] - self.merge.shape[1]
        made = torch.cat((hidden[:, : self.lead], self.merge @ hidden[:, self.lead :]), dim=1)
        kwargs = dict(kwargs)
        if kwargs.get("image_rotary_emb") is not None:
            table = kwargs["image_rotary_emb"]
            text = len(table[0]) - self.merge.shape[1]
            kwargs["image_rotary_emb"] = tuple(torch.cat((t[:text], t[text:][self.origin])) for t in table)
        if not args:
            return args, kwargs | {"hidden_states": made}
        return (made, *args[1:]), kwargs

    def _after(self, module, args, result):
        first = result[0] if isinstance(result, tuple) else result
        made = torch.cat((first[:, : self.lead], self.unmerge @ first[:, self.lead :]), dim=1)
        return (made, *result[1:]) if isinstance(result, tuple) else made

    def run(self, least=0):
        """The network's answer. least: layers of fewer tokens merge nothing."""
        self.least = least
        try:
            return self.network.run()
        finally:
            for handle in self.handles:
                handle.remove()


@pytest.mark.parametrize("sites", [("attn",), ("attn", "mlp")])
@pytest.mark.parametrize("share", [0.3, 0.75])
@pytest.mark.parametrize("name", MERGING)
def test_a_network_that_merges_is_the_one_with_dense_matrices_around_its_attentions(name, share, sites):
    network = networks(name)[0]
    if "mlp" in sites and "flux" in name:
        assert "in one projection with others" in Cached(network.module).lacks("merge_mlp", (0, 4))
        return
    least = 64 if name in UNETS else 0
    wanted = ByHand(network, share, sites).run(least)
    got, state = merged(network, share, sites=sites)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    assert float((got - network.answer).norm() / network.answer.norm()) > 1e-4
    assert torch.equal(network.run(), network.answer)  # nothing is left of it on the modules
    assert state.made == len(state.maps) and not state.used


@pytest.mark.parametrize("name", MERGING)
def test_kept_maps_are_used_again_and_a_share_of_nothing_is_the_plain_network(name):
    network = networks(name)[0]
    first, state = merged(network, 0.5)
    maps = {key: dict(each) for key, each in state.maps.items()}
    moved = replace(network, args=network.args, kwargs=network.kwargs)
    again, _ = merged(moved, 0.5, fresh=False, state=state)
    assert torch.equal(first, again) and state.used == state.made
    assert all(maps[key][0][0] is state.maps[key][0][0] for key in maps)
    assert torch.equal(merged(network, 1 / 128)[0], network.answer)


@pytest.mark.parametrize("name", UNETS)
def test_levels_of_a_unet_merge_from_the_highest_that_attends(name):
    network = networks(name)[0]
    assert merging_blocks(network.parts) == {0, 4}
    assert merging_blocks(network.parts, 2) == {0, 2, 4}
    _, one = merged(network, 0.5)
    _, two = merged(network, 0.5, levels=2)
    assert set(one.maps) < set(two.maps)
    assert {block for _, block, _ in two.maps} == {0, 2, 4}


def merging_plan(name, pipe, steps=3, **options):
    return apply_merge(pipe._expanded(plan_of(name, pipe, steps)), 0.5, **options)


@pytest.mark.parametrize("name", MERGING)
def test_a_merging_plan_gives_the_same_bits_alone_in_a_row_and_beside_others(name):
    pipe = pipe_of(name)
    plain = pipe._expanded(plan_of(name, pipe, 3))
    importance = "guidance" if "uncond" in plain.steps[0].branches else None
    plan = apply_merge(plain, 0.5, every=2, importance=importance)
    session = pipe.compile([plan, plain], backend="eager")
    prompt = prompt_of(name)
    asked = [vivace.Request(prompt, seed=1), vivace.Request(prompt, plan=plain, seed=2), vivace.Request(prompt, seed=3)]
    alone = [session(prompt, plan=request.plan, seed=request.seed) for request in asked]
    receipt = alone[0].receipt
    assert receipt.merges["made"] >= receipt.merges["reused"] > 0 and not receipt.warnings and not receipt.caches
    assert receipt.merges["bytes"] > 0 and not alone[1].receipt.merges
    assert torch.equal(session(prompt, seed=1).latents, alone[0].latents)
    states = [session.begin(request) for request in asked]
    while not states[0].done:
        session.step(states)
    for state, single in zip(states, alone, strict=True):
        assert torch.equal(session.finish(state).latents, single.latents)
    both = session(prompt, seed=1, n=2).latents
    assert torch.equal(both[:1], alone[0].latents)
    assert torch.equal(both[1:], session(prompt, seed=1, index=1).latents)
    none = session(prompt, plan=apply_merge(plain, 0.0), seed=2)
    assert torch.equal(none.latents, alone[1].latents)
    assert any("merging had no effect" in warning for warning in none.receipt.warnings)


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "sd15"])
def test_eager_and_compiled_rows_agree(name):
    pipe = pipe_of(name)
    plan = merging_plan(name, pipe, every=2)
    eager, compiled = (pipe.compile(plan, backend=backend)(prompt_of(name), seed=1) for backend in ("eager", "cpu"))
    assert compiled.receipt.executor == "cpu"
    assert eager.receipt.merges == compiled.receipt.merges
    assert float((eager.latents - compiled.latents).norm() / eager.latents.norm()) < 1e-5


@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg", "sd15"])
def test_rows_of_low_precision_merge(name):
    pipe = pipe_of(name)
    plan = apply_merge(apply_precision(plan_of(name, pipe, 3), "bf16", first=1), 0.5)
    found = pipe.compile(plan)(prompt_of(name), seed=1)
    assert found.receipt.precisions == {"model": 1, "bf16": plan.nfe - 1}
    assert found.receipt.merges["made"] and bool(torch.isfinite(found.latents).all())


@pytest.mark.parametrize("name", ["pixart", "sd3", "sd15"])
def test_caches_keep_what_was_copied_back(name):
    pipe = pipe_of(name)
    plan = pipe._expanded(plan_of(name, pipe, 4))
    caching = ("deep_cache", {}) if name in UNETS else ("fora", {"sites": ("attn",)})
    cached = apply_block_cache(plan.bind(pipe.spec), caching[0], interval=2, **caching[1])
    merged_plan = apply_merge(cached, 0.5, sites=("attn", "mlp"))
    session = pipe.compile([merged_plan, cached, plan], backend="eager")
    found = session(prompt_of(name), seed=1)
    assert found.receipt.caches["reused"] and found.receipt.merges["made"] and not found.receipt.warnings
    others = [session(prompt_of(name), plan=each, seed=1) for each in (cached, plan)]
    assert found.receipt.caches["bytes"] == others[0].receipt.caches["bytes"]
    drifts = [float((found.latents - other.latents).norm() / other.latents.norm()) for other in others]
    assert all(0.0 < drift < 0.5 for drift in drifts)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*MERGING, "wan22")])
def test_other_families_are_refused_by_name(name):
    pipe = pipe_of(name)
    kind = type(getattr(make(name), FAMILIES[name].denoisers[0])).__name__
    with pytest.raises(UnsupportedError, match=f"merged tokens of blocks .*{kind}.* is not recorded for merging"):
        pipe.compile(merging_plan(name, pipe))


def test_the_compiled_native_dit_refuses():
    pipe = pipe_of("dit")
    with pytest.raises(UnsupportedError, match="its rows merge no tokens; use backend='eager'"):
        pipe.compile(merging_plan("dit", pipe), backend="cpu")


# ---------------------------------------------------------------- the pipeline's own loop
def picture(name, pipe, **changes):
    call = FAMILIES[name].arguments(**changes)
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(0))[0])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", MERGING)
def test_a_merging_plan_runs_in_the_loop_of_a_pipeline(name, guided):
    pipe, family = make(name), FAMILIES[name]
    mu = {"mu": 0.7} if pipe.scheduler.config.get("use_dynamic_shifting") else {}
    plan = vivace.Plan.from_diffusers(pipe.scheduler, 4, **mu)
    if guided and not family.guided:
        return
    options = {"importance": "guidance"} if guided else {}
    plan = apply_guidance(plan, scale=float(family.call[family.scale])) if guided else plan
    pictures = []
    for share in (0.0, 0.5):
        vivace.accelerate(pipe, apply_merge(plan, share, every=2, **options))
        pictures.append(picture(name, pipe))
        told = vivace.receipt(pipe)
        if share:
            assert told.merges["made"] and told.merges["reused"] and not told.warnings and not told.caches
            assert torch.equal(picture(name, pipe), pictures[-1])  # nothing is left of the first call
        else:
            assert not told.merges and any("merging had no effect" in warning for warning in told.warnings)
        vivace.restore(pipe)
    assert 0.0 < float((pictures[0] - pictures[1]).norm()) < float(pictures[0].norm())


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"importance": "guidance"}])
@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg", "sdxl"])
def test_a_session_and_the_pipeline_agree(name, options):
    loaded, pipe, last = pipe_of(name), make(name), []
    noise = noise_of(loaded.spec.latent_shape)
    plan = apply_guidance(loaded.plan(4), scale=float(FAMILIES[name].call[FAMILIES[name].scale]))
    plan = apply_merge(plan, 0.5, **options)
    wanted = loaded.compile(plan)(prompt_of(name), latents=noise).latents
    vivace.accelerate(pipe, plan)
    call = FAMILIES[name].arguments(output_type="latent", latents=noise.clone())
    pipe(**call, callback_on_step_end=lambda p, i, t, tensors: last.append(tensors["latents"]) or {})
    assert float((last[-1][:1] - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("name", ["flux", "sd15", "sd3"])
def test_pictures_that_are_not_square_merge_by_their_own_grid(name):
    size = {"height": 16, "width": 24} if name == "sd15" else {"height": 12, "width": 20}
    pipe = make(name)
    plan = vivace.Plan.from_diffusers(pipe.scheduler, 2, **({"mu": 0.7} if name == "flux" else {}))
    vivace.accelerate(pipe, apply_merge(plan, 0.5))
    one = picture(name, pipe, **size)
    told = vivace.receipt(pipe)
    assert told.merges["made"] and torch.equal(picture(name, pipe, **size), one)


@pytest.mark.parametrize("name", ["sd3", "flux_true_cfg", "sd15"])
def test_two_prompts_in_one_call_are_the_pictures_of_single_calls(name):
    pipe, calls = make(name), []
    mu = {"mu": 0.7} if pipe.scheduler.config.get("use_dynamic_shifting") else {}
    vivace.accelerate(pipe, apply_merge(vivace.Plan.from_diffusers(pipe.scheduler, 3, **mu), 0.5))
    for seed in range(2):
        call = FAMILIES[name].arguments()
        calls.append({key: v + 0.1 * seed if isinstance(v, torch.Tensor) else v for key, v in call.items()})
    both = {
        key: torch.cat([call[key] for call in calls]) if isinstance(v, torch.Tensor) else v
        for key, v in calls[0].items()
    }
    together = pipe(**both, generator=[torch.Generator().manual_seed(seed) for seed in range(2)])[0]
    for seed, call in enumerate(calls):
        alone = pipe(**call, generator=torch.Generator().manual_seed(seed))[0]
        assert float((together[seed : seed + 1] - alone).norm() / alone.norm()) < 1e-5
