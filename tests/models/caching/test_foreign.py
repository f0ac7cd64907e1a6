"""Networks of diffusers that keep and give again, family by family, against torch's own hooks on the plain network."""

import re
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from tests.models.caching.keeping import Run, answered, calls, keep, later, recorded, reuse
from tests.models.pipelines.checks import Network, networks
from tests.models.pipelines.tiny import FAMILIES, make

from vivace.engine.denoiser import BlockOut
from vivace.engine.plan import Action, Rule, Variant
from vivace.errors import UnsupportedError
from vivace.models.caching.foreign import Cached
from vivace.models.pipelines.fused import fuse

UNETS = ("sd15", "sdxl")
TRANSFORMERS = [name for name in FAMILIES if name not in UNETS]
BASIC = {"attn": ("attn1",), "cross_attn": ("attn2",), "mlp": ("ff",)}
DOUBLE = {"attn": ("attn",), "mlp": ("ff", "ff_context")}
BESIDE = {"attn": ("proj_out",), "mlp": ()}
FEED = {"attn": ("attn",), "mlp": ("feed_forward",)}
# Modules whose outputs are a site, by the beginning of a block's path.
INSIDE = {
    "dit": {"": {"attn": ("attn1",), "mlp": ("ff",)}},
    "pixart": {"": BASIC},
    "sd3": {
        "transformer_blocks.0": {"attn": ("attn", "attn2"), "mlp": ("ff", "ff_context")},
        "transformer_blocks.2": {"attn": ("attn",), "mlp": ("ff",)},
        "": DOUBLE,
    },
    "flux": {"single": BESIDE, "": DOUBLE},
    "flux_true_cfg": {"single": BESIDE, "": DOUBLE},
    "flux2": {"single": {"attn": ("attn",), "mlp": ()}, "": DOUBLE},
    "qwen": {"": {"attn": ("attn",), "mlp": ("img_mlp", "txt_mlp")}},
    "lumina2": {"": FEED},
    "sana": {"": BASIC},
    "hunyuan_dit": {"": BASIC},
    "cogvideox": {"": {"attn": ("attn1",), "mlp": ("ff",)}},
    "wan": {"": BASIC | {"mlp": ("ffn",)}},
    "wan22": {"": BASIC | {"mlp": ("ffn",)}},
    "ltx": {"": BASIC},
    "hunyuan_video": {"single": BESIDE, "": DOUBLE},
}
# Where residuals of all blocks but the last are taken apart: hidden states change their form, or a later block reads.
SEGMENTS = {
    "flux2": ((0, 2), (2, 3)),
    "lumina2": ((0, 2), (2, 4)),
    "hunyuan_dit": ((0, 1), (1, 5)),
}
SITES = [
    (name, site) for name in TRANSFORMERS for site in dict.fromkeys(s for kinds in INSIDE[name].values() for s in kinds)
]


@cache
def pair(name):
    """The network of a family in an early and in a later row."""
    first = networks(name)[0]
    return first, later(first)


def paths(name, network, site):
    """Modules that give a site, in all blocks."""
    found = []
    for info in network.parts.blocks:
        kinds = next(kinds for start, kinds in INSIDE[name].items() if info.name.startswith(start))
        found += [f"{info.name}.{child}" for child in kinds[site]]
    return found


def both(name, rule, site):
    """`rule` of a site in all blocks, and of the sites that one projection gives with it."""
    network = pair(name)[0]
    blocks = range(len(network.parts.blocks))
    together = {i for i in blocks if "single" in network.parts.blocks[i].name} if site in ("attn", "mlp") else set()
    other = {"attn": "mlp", "mlp": "attn"}.get(site, site)
    return (*(rule((i, i + 1), site) for i in blocks), *(rule((i, i + 1), other) for i in sorted(together)))


@pytest.mark.parametrize(("name", "site"), SITES)
def test_a_site_inside_blocks_is_given_as_it_was(name, site):
    early, late = pair(name)
    run = Run.of(early, both(name, keep, site), both(name, reuse, site))
    given = [*paths(name, early, site), *(p for p in paths(name, early, "attn") if p.startswith("single"))]
    before = recorded(early, given)
    assert torch.equal(run.row(0), early.answer)
    answer = run.row(1, late)
    outputs = {path: lambda handed, output, path=path: before[path][1] for path in given}
    assert torch.equal(answer, answered(late, outputs))
    assert not torch.equal(answer, late.answer)
    assert calls(late, given, lambda: run.row(1, late)) == 0
    assert torch.equal(late.run(), late.answer)
    run.kept.release()
    assert run.memory.idle


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_residual_is_given_as_it_was(name):
    early, late = pair(name)
    infos, last = early.parts.blocks, len(early.parts.blocks) - 1
    run = Run.of(early, (keep((0, last), "residual"),), (reuse((0, last), "residual"),))
    names = [info.name for info in infos[:last]]
    before = _streams(early, names)
    assert torch.equal(run.row(0), early.answer)
    answer = run.row(1, late)
    assert calls(late, names, lambda: run.row(1, late)) == 0
    segments = SEGMENTS.get(name, ((0, last),))
    assert Cached(early.module).wiring.segments(0, last) == segments
    handed = {}

    def given(call):
        block = call.info.index
        if block >= last:
            return call.compute()
        first, end = next(part for part in segments if part[0] <= block < part[1])
        if block == first:
            handed.update(hidden=call.hidden, context=call.context)
        out = call.compute()
        if block < end - 1:
            return out
        after, at = before[end - 1][1], before[first][0]
        hidden = handed["hidden"] + (after.hidden - at.hidden)
        return BlockOut(hidden, None if after.context is None else handed["context"] + (after.context - at.context))

    assert torch.equal(answer, late.intercepted(given))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_output_of_blocks_is_given_as_it_was(name):
    early, late = pair(name)
    last = len(early.parts.blocks) - 1
    run = Run.of(early, (keep((0, last), "block"),), (reuse((0, last), "block"),))
    names = [info.name for info in early.parts.blocks[:last]]
    before = _streams(early, names)
    assert torch.equal(run.row(0), early.answer)
    answer = run.row(1, late)
    wanted = late.intercepted(lambda call: before[call.info.index][1] if call.info.index < last else call.compute())
    assert torch.equal(answer, wanted)
    assert calls(late, names, lambda: run.row(1, late)) == 0


def _streams(network, names):
    """(turn, output) of the blocks that are named, while the network answers."""
    found = []

    def note(call):
        out = call.compute()
        if call.info.name in names:
            found.append((call, out))
        return out

    network.intercepted(note)
    return found


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("blocks", [(1, -1), (0, 3), (0, 2), (2, 4), (0, 4), (1, 3)])
def test_a_unet_is_given_what_leaves_its_blocks(name, blocks):
    early, late = pair(name)
    infos = early.parts.blocks
    first, last = blocks[0], blocks[1] % len(infos)
    run = Run.of(early, (keep((first, last), "block"),), (reuse((first, last), "block"),))
    names = [info.name for info in infos[first:last]]
    stem = ["conv_in"] if first == 0 else []
    before = recorded(early, [*names, *stem])
    assert torch.equal(run.row(0), early.answer)
    answer = run.row(1, late)
    assert calls(late, names, lambda: run.row(1, late)) == 0
    wanted = answered(late, {path: lambda handed, output, path=path: before[path][1] for path in before})
    assert torch.equal(answer, wanted)
    assert not torch.equal(answer, late.answer)


@cache
def tall(edge):
    """A UNet of four stages, whose mid-sized feature maps have odd edges where `edge` is no multiple of eight."""
    torch.manual_seed(0)
    stages = {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 2, "sample_size": edge}
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    kinds = {"down_block_types": down, "up_block_types": tuple(name.replace("Down", "Up") for name in down[::-1])}
    net = diffusers.UNet2DConditionModel(**stages, **kinds, cross_attention_dim=16, attention_head_dim=2).eval()
    call = {"encoder_hidden_states": torch.randn(2, 6, 16), "return_dict": False}
    early = Network(net, (torch.randn(2, 4, edge, edge), torch.tensor(500)), call, torch.empty(0))
    early = replace(early, answer=early.run().clone())
    return early, later(early)


@pytest.mark.parametrize("edge", [16, 20])
@pytest.mark.parametrize("blocks", [(1, 8), (2, 7), (3, 6), (0, 5), (0, 3), (4, 5), (0, 8), (5, 7)])
def test_a_unet_of_four_stages_is_given_what_leaves_its_blocks(edge, blocks):
    early, late = tall(edge)
    run = Run.of(early, (keep(blocks, "block"),), (reuse(blocks, "block"),))
    names = [info.name for info in early.parts.blocks[slice(*blocks)]]
    before = recorded(early, [*names, *(["conv_in"] if blocks[0] == 0 else [])])
    assert torch.equal(run.row(0), early.answer)
    assert calls(late, names, lambda: run.row(1, late)) == 0
    wanted = answered(late, {path: lambda handed, output, path=path: before[path][1] for path in before})
    assert torch.equal(run.row(1, late), wanted)


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_that_reuses_now_its_inside_now_its_encoder_keeps_what_both_read(name):
    early, late = pair(name)
    rules = (keep((0, 3), "block"), keep((1, 4), "block"))
    run = Run.of(early, rules, (reuse((0, 3), "block"),), (reuse((1, 4), "block"),))
    assert torch.equal(run.row(0), early.answer)
    apart = [Run.of(early, (keep(blocks, "block"),), (reuse(blocks, "block"),)) for blocks in ((0, 3), (1, 4))]
    for number, alone in enumerate(apart, 1):
        alone.row(0)
        assert torch.equal(run.row(number, late), alone.row(1, late))


def test_control_of_a_unet_stays_fresh_where_its_encoder_is_given():
    early, late = pair("sd15")
    seen = []

    def shapes(call):
        out = call.compute()
        seen.extend(out.skips)
        return out

    early.intercepted(shapes)
    generator = torch.Generator().manual_seed(3)
    stem = torch.zeros_like(early.module.conv_in(early.args[0]).detach())
    added = tuple(torch.randn(skip.shape, generator=generator) for skip in (stem, *seen))
    middle = torch.zeros_like(seen[-1])
    control = {"down_block_additional_residuals": added, "mid_block_additional_residual": middle}
    steered = replace(late, kwargs={**late.kwargs, **control})
    run = Run.of(early, (keep((0, 3), "block"),), (reuse((0, 3), "block"),))
    run.row(0)
    names = [info.name for info in early.parts.blocks[:3]]
    before = recorded(early, [*names, "conv_in"])
    wanted = answered(steered, {path: lambda handed, output, path=path: before[path][1] for path in before})
    assert float((run.row(1, steered) - wanted).abs().max()) <= 4 * torch.finfo(torch.float32).eps * float(
        wanted.abs().max()
    )


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("site", ["attn", "cross_attn", "mlp"])
def test_transformers_within_a_unet_are_given_as_they_were(name, site):
    early, late = pair(name)
    child = {"attn": "attn1", "cross_attn": "attn2", "mlp": "ff"}[site]
    having = [
        i for i, info in enumerate(early.parts.blocks) if info.name in ("down_blocks.0", "mid_block", "up_blocks.1")
    ]
    given = [path for path, _ in early.module.named_modules() if path.endswith(f".{child}")]
    run = Run.of(early, *(tuple(rule((i, i + 1), site) for i in having) for rule in (keep, reuse)))
    before = recorded(early, given)
    assert torch.equal(run.row(0), early.answer)
    answer = run.row(1, late)
    wanted = answered(late, {path: lambda handed, output, path=path: before[path][1] for path in given})
    assert torch.equal(answer, wanted)
    assert calls(late, given, lambda: run.row(1, late)) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_stand_ins_with_our_ops_keep_and_give_too(name):
    early, late = pair(name)
    fused, report = fuse(early.module)
    assert report.replaced
    last = len(early.parts.blocks) - 1
    rules = [(rule((1, last), "block"), rule((0, 1), "attn")) for rule in (keep, reuse)]
    ours, plain = (Run.of(early, *rules) for _ in range(2))
    assert torch.equal(ours.row(0, module=fused), early.run(fused))
    plain.row(0)
    mine, theirs = ours.row(1, late, fused), plain.row(1, late)
    assert float((mine - theirs).abs().max()) < 2e-5 * float(theirs.abs().max())
    names = [info.name for info in early.parts.blocks[1:last]]
    assert calls(late, names, lambda: ours.row(1, late, fused)) == 0


@pytest.mark.parametrize("name", ["sd3", "flux2", "sd15"])
def test_a_forecast_is_weights_times_planes(name):
    early, late = pair(name)
    site, blocks = ("block", (1, 4)) if name == "sd15" else ("residual", (0, 2))
    rules = [(keep(blocks, site, order=1),)] * 2
    weights = (2.0, -1.0)
    forecast = (Rule(blocks, site, action=Action.FORECAST, order=1),)
    run = Run.of(early, *rules, forecast, forecast=weights)
    run.row(0)
    assert torch.equal(run.row(1, late), late.answer)
    third = later(early, scale=0.5)
    single = [Run.of(early, (keep(blocks, site),), (reuse(blocks, site),)) for _ in range(2)]
    single[0].row(0)
    single[1].row(0, late)
    for (cell, part), (slab, _) in run.kept.places.items():
        old, new = ({k: v for k, v in s.kept.places.items() if k[1] == part} for s in single)
        before, after = (next(iter(v.values()))[0].values[:, 0] for v in (old, new))
        assert torch.equal(slab.values[:, 0], after) and torch.equal(slab.values[:, 1], after - before), (cell, part)
        wanted = slab.values[:, 0] - -1.0 * slab.values[:, 1]
        single[1].kept.places[next(iter(new))][0].values[:, 0] = wanted
    assert torch.equal(run.row(2, third), single[1].row(1, third))


@pytest.mark.parametrize("store", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_every_store_is_near_what_was_kept(store):
    early, late = pair("sd3")
    exact = Run.of(early, (keep((0, 2), "residual"),), (reuse((0, 2), "residual"),))
    small = Run.of(early, (keep((0, 2), "residual", store=store),), (reuse((0, 2), "residual"),))
    assert torch.equal(exact.row(0), small.row(0))
    wanted, got = exact.row(1, late), small.row(1, late)
    assert torch.equal(got, wanted) == (store == "fp32")
    changed = float((wanted - late.answer).norm())
    assert float((got - wanted).norm()) < changed
    assert small.kept.nbytes <= exact.kept.nbytes


def test_float64_and_half_precisions_keep_their_own():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        early = networks("sd3")[0]
        module = make("sd3", dtype).transformer
        kwargs = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in early.kwargs.items()
        }
        narrow = replace(early, module=module, kwargs=kwargs)
        narrow = replace(narrow, answer=narrow.run().clone())
        run = Run.of(narrow, (keep((0, 3), "attn"),), (reuse((0, 3), "attn"),))
        assert torch.equal(run.row(0), narrow.answer)
        assert torch.equal(run.row(1), narrow.answer)


@pytest.mark.parametrize(
    ("name", "rule", "fragment"),
    [
        ("dit", keep((0, 3), "cross_attn"), r"block 0 \(transformer_blocks.0, BasicTransformerBlock\) has no site"),
        ("sd15", keep((0, 1), "residual"), "change the shape"),
        ("sd15", keep((0, 2), "attn"), r"block 1 \(down_blocks.1, DownBlock2D\) has no site 'attn'; it has block"),
        ("flux", keep((2, 3), "attn"), "in one projection"),
        ("flux", keep((2, 3), "mlp"), "in one projection"),
        ("sd3", keep((0, 3), "attn"), None),
    ],
)
def test_a_site_that_blocks_have_not_is_refused_by_name(name, rule, fragment):
    why = Cached(networks(name)[0].module).why_not(Variant(rules=(rule,)))
    assert (why is None) == (fragment is None)
    if fragment is not None:
        assert re.search(fragment, why)


def test_a_compiled_block_keeps_itself_to_itself():
    early, _ = pair("dit")
    block = early.module.transformer_blocks[0]
    block.__dict__["_compiled_call_impl"] = block._call_impl
    try:
        run = Run.of(early, (keep((0, 1), "attn"),), (reuse((0, 1), "attn"),))
        with pytest.raises(UnsupportedError, match="compiled by torch"):
            run.row(0)
        run = Run.of(early, (keep((0, 2), "residual"),), (reuse((0, 2), "residual"),))
        assert torch.equal(run.row(0), early.answer)
    finally:
        block.__dict__["_compiled_call_impl"] = None


def test_hooks_of_accelerate_and_diffusers_on_blocks_stay_in_place():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import ModelHook as DiffusersHook

    class Noting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            notes.append("accelerate")
            return args, kwargs

    class Noted(DiffusersHook):
        def pre_forward(self, module, *args, **kwargs):
            notes.append("diffusers")
            return args, kwargs

    early, late = pair("sd3")
    blocks, notes = early.module.transformer_blocks, []
    run = Run.of(early, (keep((0, 3), "attn"),), (reuse((0, 3), "attn"),))
    plain = Run.of(early, (keep((0, 3), "attn"),), (reuse((0, 3), "attn"),))
    plain.row(0)
    wanted = plain.row(1, late)
    add_hook_to_module(blocks[0], Noting())
    registry = HookRegistry.check_if_exists_or_initialize(blocks[1])
    registry.register_hook(Noted(), "noted")
    try:
        assert torch.equal(run.row(0), early.answer)
        given = paths("sd3", early, "attn")
        assert calls(late, given, lambda: run.row(1, late)) == 0
        assert torch.equal(run.row(1, late), wanted)
        assert notes == ["accelerate", "diffusers"] * 3
    finally:
        remove_hook_from_module(blocks[0])
        registry.remove_hook("noted")
