"""Layers of a UNet that do not run, against DeepCache computed by hand on the network's own modules."""

from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from tests.models.caching.keeping import BRANCH, calls, later
from tests.models.pipelines.checks import Network, networks
from tests.models.pipelines.test_denoiser import load, noise_of, plan_of, prompt_of
from tests.models.pipelines.tiny import FAMILIES, make

import vivace
from vivace.engine import planners
from vivace.engine.caching import caches, computed_share
from vivace.engine.kept import Kept, KeptMemory, Sample, Turn
from vivace.engine.passes import apply_block_cache
from vivace.engine.plan import Action, Args, Binding, Plan, Recipe, Rule, Step, Variant
from vivace.errors import ArgumentError, PlanError, UnsupportedError
from vivace.models.caching.foreign import Cached
from vivace.models.caching.layers import layers_in

TALL = "tall"


@cache
def pair(name):
    """A network with a call, and the same network at a later latent."""
    if name != TALL:
        early = networks(name)[0]
        return early, later(early)
    torch.manual_seed(0)
    stages = {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 2, "sample_size": 20}
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    kinds = {"down_block_types": down, "up_block_types": tuple(kind.replace("Down", "Up") for kind in down[::-1])}
    net = diffusers.UNet2DConditionModel(**stages, **kinds, cross_attention_dim=16, attention_head_dim=2).eval()
    call = {"encoder_hidden_states": torch.randn(2, 6, 16), "return_dict": False}
    early = Network(net, (torch.randn(2, 4, 20, 20), torch.tensor(500)), call, torch.empty(0))
    early = replace(early, answer=early.run().clone())
    return early, later(early)


def by_hand(network, depth=None, given=None, control=None):
    """(answer, what enters each layer up) of a UNet, written out layer by layer.

    depth: only the first `depth` layers down run, and the last depth + 1 up, which `given` enters. control: what is
    added to the skips.
    """
    net, kwargs = network.module, dict(network.kwargs)
    sample, t = (*network.args, *(kwargs.pop(name) for name in ("sample", "timestep")[len(network.args) :]))
    text = kwargs["encoder_hidden_states"]
    emb = net.time_embedding(net.time_proj(t.expand(len(sample))).to(sample.dtype))
    if net.config.addition_embed_type == "text_time":
        added = kwargs["added_cond_kwargs"]
        times = net.add_time_proj(added["time_ids"].flatten()).reshape(len(sample), -1)
        emb = emb + net.add_embedding(torch.cat([added["text_embeds"], times], -1).to(emb.dtype))
    hidden = net.conv_in(sample)
    skips, entered, run = [hidden], [], 0

    def one(block, i, hidden):
        hidden = block.resnets[i](hidden, emb)
        if getattr(block, "attentions", None) is not None:
            hidden = block.attentions[i](hidden, encoder_hidden_states=text, return_dict=False)[0]
        return hidden

    for block in net.down_blocks:
        for i in range(len(block.resnets)):
            if depth is None or run < depth:
                hidden = one(block, i, hidden)
                skips.append(hidden)
                run += 1
        for sampler in block.downsamplers or ():
            if depth is None or run < depth:
                hidden = sampler(hidden)
                skips.append(hidden)
                run += 1
    if depth is None:
        hidden = net.mid_block(hidden, emb, encoder_hidden_states=text)
    if control is not None:
        skips = [skip + more for skip, more in zip(skips, control, strict=False)]
    left = sum(len(block.resnets) for block in net.up_blocks)
    for block in net.up_blocks:
        for i in range(len(block.resnets)):
            left -= 1
            if depth is not None and left > depth:
                continue
            if depth == left:
                hidden = given
            entered.append(hidden)
            hidden = one(block, i, torch.cat([hidden, skips.pop()], 1))
        if (depth is None or left <= depth) and block.upsamplers is not None:
            for sampler in block.upsamplers:
                hidden = sampler(hidden, skips[-1].shape[2:] if skips else None)
    return net.conv_out(net.conv_act(net.conv_norm_out(hidden))), entered


def layer_count(network):
    return len(layers_in(Cached(network.module).parts))


def rows(network, depth):
    """A row that keeps and one that gives, as caches of a plan, and their turns for a batch."""
    count = layer_count(network)
    blocks = depth, count - 1 - depth
    rules = Rule(blocks, "layer", action=Action.COMPUTE), Rule(blocks, "layer", action=Action.REUSE)
    steps = tuple(Step(1.0, 1.0, 1.0, (), Variant(rules=(rule,))) for rule in rules)
    binding = Binding("x", len(network.parts.blocks), 1, 1, (1,), layers=count)
    plan = caches(Plan(steps, "eps", (), Recipe("make_plan", Args()), binding=binding))
    memory = KeptMemory()
    kept, batch = Kept(memory, plan, len(network.answer)), range(len(network.answer))
    return [
        [Turn(item.use, "main", tuple(Sample(kept, n, item.weights) for n in batch)) for item in row.uses]
        for row in plan.rows
    ]


@pytest.mark.parametrize("name", ["sd15", "sdxl", TALL])
def test_every_depth_is_deepcache_by_hand(name):
    early, late = pair(name)
    cached, lanes = Cached(early.module), [(BRANCH, n) for n in range(len(early.answer))]
    layers = layers_in(cached.parts)
    exact, entered = by_hand(early)
    assert torch.equal(exact, early.answer)
    ups = [layer for layer in layers if layer.kind == "up"]
    for depth in range(len(ups)):
        keeps, gives = rows(early, depth)
        assert torch.equal(early.run(lambda *a, k=keeps, **kw: cached.forward(k, lanes, *a, **kw)), early.answer)
        answer = late.run(lambda *a, g=gives, **kw: cached.forward(g, lanes, *a, **kw))
        wanted, _ = by_hand(late, depth, entered[len(ups) - 1 - depth])
        assert torch.equal(answer, wanted), depth
        assert not torch.equal(answer, late.answer)


@pytest.mark.parametrize("depth", [0, 1, 3, 5])
def test_only_the_layers_of_the_rim_run(depth):
    early, late = pair(TALL)
    cached, lanes = Cached(early.module), [(BRANCH, n) for n in range(2)]
    keeps, gives = rows(early, depth)
    early.run(lambda *a, **kw: cached.forward(keeps, lanes, *a, **kw))
    paths = [path for path, module in early.module.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    samplers = [path for path, module in early.module.named_modules() if type(module).__name__ == "Downsample2D"]
    ran = calls(late, [*paths, *samplers], lambda: late.run(lambda *a, **kw: cached.forward(gives, lanes, *a, **kw)))
    assert ran == 2 * depth + 1


@pytest.mark.parametrize("depth", [1, 3, 11])
def test_control_of_the_rim_stays_fresh(depth):
    """What a control network adds is added to skips and the middle whether they were made or not."""
    early, late = pair(TALL)
    cached, lanes = Cached(early.module), [(BRANCH, n) for n in range(2)]
    shapes, seen = [], []
    early.intercepted(lambda call: seen.append(call.compute()) or seen[-1])
    for out in seen:
        shapes += [skip.shape for skip in out.skips]
    generator = torch.Generator().manual_seed(3)
    stem = early.module.conv_in(early.args[0]).shape
    added = tuple(torch.randn(shape, generator=generator) for shape in (stem, *shapes))
    control = {"down_block_additional_residuals": added, "mid_block_additional_residual": torch.zeros(shapes[-1])}
    steered = replace(late, kwargs={**late.kwargs, **control})
    keeps, gives = rows(early, depth)
    early.run(lambda *a, **kw: cached.forward(keeps, lanes, *a, **kw))
    answer = steered.run(lambda *a, **kw: cached.forward(gives, lanes, *a, **kw))
    given = by_hand(early)[1][len(added) - 1 - depth]
    assert torch.equal(answer, by_hand(late, depth, given, added)[0])


@pytest.mark.parametrize("depth", [1, 10])
def test_an_adapter_inside_blocks_that_do_not_run_whole_is_refused(depth):
    early, _ = pair(TALL)
    cached, lanes = Cached(early.module), [(BRANCH, n) for n in range(2)]
    added = [torch.ones(2, 4, 20, 20), *(torch.ones(2, 8, edge, edge) for edge in (10, 5, 3))]

    def adapted(turns):
        given = {"down_intrablock_additional_residuals": [each.clone() for each in added]}
        steered = replace(early, kwargs={**early.kwargs, **given})
        return steered.run(lambda *a, **kw: cached.forward(turns, lanes, *a, **kw))

    keeps, gives = rows(early, depth)
    assert torch.equal(adapted(keeps), adapted(()))
    with pytest.raises(UnsupportedError, match="down_intrablock_additional_residuals: added at the ends of down"):
        adapted(gives)


@pytest.mark.parametrize(
    ("blocks", "fragment"),
    [
        ((3, 19), "the 5 layers behind them read skips of layers that do not run; at most 4 may run"),
        ((13, 20), "must begin before its first layer up, 12"),
        ((2, 9), "end within"),
        ((2, 24), "end within"),
    ],
)
def test_ranges_whose_skips_would_be_missing_are_refused(blocks, fragment):
    cached = Cached(pair(TALL)[0].module)
    assert fragment in cached.why_not(Variant(rules=(Rule(blocks, "layer", action=Action.REUSE),)))
    assert cached.why_not(Variant(rules=(Rule((3, 20), "layer", action=Action.REUSE),))) is None
    assert cached.why_not(Variant(rules=(Rule((3, 22), "layer", action=Action.REUSE),))) is None


def test_networks_without_layers_refuse_them():
    cached = Cached(networks("dit")[0].module)
    assert "have no layers told apart" in cached.why_not(Variant(rules=(Rule((0, 1), "layer", action=Action.REUSE),)))
    assert "layer" in Cached(pair("sd15")[0].module).sites and "layer" not in cached.sites


# ---------------------------------------------------------------- plans
@cache
def loaded():
    return load("sd15")


def planned(interval=2, steps=4, **arguments):
    plan = plan_of("sd15", loaded(), steps)
    return plan, apply_block_cache(plan, planners.DeepCache(interval, **arguments))


def test_a_plan_says_layers_and_counts_their_work():
    plan, deep = planned(layer=1)
    assert {rule.blocks for step in deep.steps for rule in step.variant.rules} == {(1, -2)}
    bound, count = deep.bind(loaded().spec), loaded().spec.layers
    assert count == 12 and bound.binding.layers == count
    assert {rule.blocks for step in bound.steps for rule in step.variant.rules} == {(1, count - 2)}
    given = plan.nfe // 2  # rows of which three layers run
    assert computed_share(bound) == pytest.approx(1 - given / plan.nfe * (1 - 3 / count))
    assert f"1:{count - 2}.layer=" in str(bound) and "1:-2.layer=" in str(deep)
    assert apply_block_cache(plan.bind(loaded().spec), planners.DeepCache(2, layer=1)).steps == bound.steps
    tail = deep.tail(0.5).bind(loaded().spec)
    assert {rule.blocks for step in tail.steps for rule in step.variant.rules} == {(1, count - 2)}


def test_a_plan_file_keeps_them(tmp_path):
    bound = planned(layer=0)[1].bind(loaded().spec)
    bound.save(tmp_path / "plan.json")
    assert vivace.Plan.load(tmp_path / "plan.json").hash == bound.hash


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ArgumentError, match="say the depth in one way"):
        planned(layer=1, branch=1)
    with pytest.raises(PlanError, match="outside a model of 12 layers"):
        planned(layer=6)[1].bind(loaded().spec)
    emoji = vivace.load("emoji")
    with pytest.raises(PlanError, match="have no layers told apart"):
        apply_block_cache(emoji.choose_plan(None, None, 4, None), "deep_cache", layer=0).bind(emoji.spec)
    with pytest.raises(PlanError, match="which do not run"):
        apply_block_cache(planned(layer=1)[1], planners.Fora(2, sites=("attn",)))


@pytest.mark.parametrize("layer", [0, 2])
def test_sessions_run_it_and_pictures_do_not_depend_on_company(layer):
    plan, deep = planned(layer=layer)
    prompt, always = prompt_of("sd15"), planned(1, layer=layer)[1]
    sessions = [loaded().compile([deep, plan], backend=backend) for backend in ("eager", "cpu")]
    alone = [session(prompt, seed=1) for session in sessions]
    assert alone[0].receipt.caches["reused"] > 0 and not alone[0].receipt.warnings
    assert alone[0].receipt.caches["computed_share"] == pytest.approx(computed_share(deep.bind(loaded().spec)))
    assert float((alone[0].latents - alone[1].latents).norm() / alone[0].latents.norm()) < 1e-5
    session = sessions[0]
    asked = [vivace.Request(prompt, seed=1), vivace.Request(prompt, plan=plan, seed=2)]
    states = [session.begin(request) for request in asked]
    while not states[0].done:
        session.step(states)
    assert torch.equal(session.finish(states[0]).latents, alone[0].latents)
    exact = session.finish(states[1]).latents
    assert session.kept.idle
    assert torch.equal(session(prompt, plan=plan, seed=2).latents, exact)
    assert torch.equal(session(prompt, plan=always, seed=2).latents, exact)
    assert not torch.equal(session(prompt, seed=2).latents, exact)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_session_and_the_pipeline_agree(layer):
    pipe, noise, last = make("sd15"), noise_of(loaded().spec.latent_shape), []
    deep = planned(layer=layer)[1]
    wanted = loaded().compile(deep)(prompt_of("sd15"), latents=noise).latents
    vivace.accelerate(pipe, deep)
    call = FAMILIES["sd15"].arguments(output_type="latent", latents=noise.clone())
    pipe(**call, callback_on_step_end=lambda p, i, t, tensors: last.append(tensors["latents"]) or {})
    assert float((last[-1][:1] - wanted).norm() / wanted.norm()) < 1e-4
    told = vivace.receipt(pipe).caches
    assert told["reused"] > 0 and told["computed_share"] == pytest.approx(computed_share(deep.bind(loaded().spec)))
