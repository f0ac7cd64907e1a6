"""Rows of some image tokens, family by family, against all tokens run densely with stale keys and values by hand."""

import re
from dataclasses import replace

import pytest
import torch
from tests.models.caching.keeping import Run, keep, later, reuse
from tests.models.pipelines.checks import captured, networks
from tests.models.pipelines.tiny import FAMILIES, make
from tests.models.tokens.dense import BEHIND, active, by_token, count, densely, kv, picked, sparsely, twice
from torch.overrides import TorchFunctionMode

from vivace.engine.tokens import Focus
from vivace.errors import UnsupportedError
from vivace.models.caching.foreign import Cached
from vivace.models.pipelines.fused import fuse
from vivace.models.tokens.foreign import check_inputs

WHOLE = ("sd15", "sdxl", "sana")  # families that compute all tokens in every row
SOME = [name for name in FAMILIES if name not in WHOLE]
ALONE = [name for name in SOME if len(networks(name)[0].answer) == 1]  # one picture in the captured call


def near(found, wanted):
    """Equal up to what other tilings of one product round."""
    return float((found - wanted).abs().max()) <= 16 * torch.finfo(torch.float32).eps * float(wanted.abs().max())


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pictures", [1, 2])
def test_active_tokens_read_fresh_keys_of_theirs_and_old_ones_of_others(name, fused, pictures):
    early = networks(name)[0]
    if pictures == 2:
        early = twice(early) if name in ALONE else early
    late = later(early)
    module = fuse(early.module)[0] if fused else None
    ids = picked(early)
    found = active(late, sparsely(early, late, ids, module), ids)
    assert near(found, active(late, densely(early, late, ids, module), ids))
    assert not near(found, active(late, late.answer, ids))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("fused", [False, True])
def test_a_row_of_all_tokens_has_the_bits_of_a_plain_one(name, fused):
    early = twice(networks(name)[0]) if name in ALONE else networks(name)[0]
    late = later(early)
    module = fuse(early.module)[0] if fused else None
    every = torch.arange(count(early), dtype=torch.int32).expand(len(early.answer), -1)
    assert torch.equal(sparsely(early, late, every, module), late.run(module))


@pytest.mark.parametrize("name", SOME)
def test_keys_of_active_tokens_stay_for_later_rows(name):
    early = networks(name)[0]
    middle, last = later(early), later(early, 0.5)
    first, second = picked(early, 0.6, 1), picked(early, 0.4, 2)
    blocks = range(len(early.parts.blocks))
    run = Run.of(early, *(tuple(rule((i, i + 1), "kv") for i in blocks) for rule in (keep, reuse, reuse)))
    run.row(0)
    run.row(1, middle, focus=Focus(first, count(early)))
    before = {key: slab.values.clone() for key, (slab, _) in run.kept.places.items()}
    run.row(2, last, focus=Focus(second, count(early)))
    for (cell, part), (slab, lanes) in run.kept.places.items():
        text = slab.shape[0] - count(early)
        behind = type(early.module).__name__ in BEHIND
        image = slice(0, count(early)) if behind else slice(text, None)
        changed = (slab.values != before[cell, part])[list(lanes), 0].any(dim=-1)[:, image]
        wanted = torch.zeros_like(changed).scatter(1, second.long(), True)
        assert torch.equal(changed, wanted), (cell, part)
    run.kept.release()
    assert run.memory.idle


@pytest.mark.parametrize("name", ["dit", "sd3", "wan"])
def test_other_tokens_and_other_pictures_change_nothing(name):
    early = twice(networks(name)[0]) if name in ALONE else networks(name)[0]
    late = later(early)
    ids = picked(early)
    alone = active(late, sparsely(early, late, ids), ids)
    other = ids.clone()
    other[1] = picked(early, seed=5)[1]
    assert torch.equal(active(late, sparsely(early, late, other), other)[0], alone[0])


@pytest.mark.parametrize("name", ["flux", "lumina2"])
def test_pictures_wider_than_high_and_their_tokens_row_by_row(name):
    tiny = replace(FAMILIES[name], call={**FAMILIES[name].call, "height": 16, "width": 48})
    early = captured(make(name), "transformer", tiny)
    late, ids = later(early), picked(early)
    found = active(late, sparsely(early, late, ids), ids)
    assert near(found, active(late, densely(early, late, ids), ids))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("site", ["residual", "block", "mlp", "attn"])
def test_what_rows_of_all_tokens_kept_is_given_by_token(name, site):
    early = twice(networks(name)[0]) if name in ALONE else networks(name)[0]
    late, ids, last = later(early), picked(early), len(early.parts.blocks) - 1
    cached = Cached(early.module)
    if site in ("residual", "block"):
        spans = [(0, last)]
    else:
        spans = [(i, i + 1) for i in range(last) if cached.lacks(site, (i, i + 1)) is None]
    together = [s for s in spans if site in ("attn", "mlp") and joined(early, s[0])]
    other = {"attn": "mlp", "mlp": "attn"}.get(site, site)
    sites = [(span, site) for span in spans] + [(span, other) for span in together]
    keys = [((i, i + 1), "kv") for i in range(last + 1)]
    rules = [tuple(rule(*each) for each in (*sites, *keys)) for rule in (keep, reuse)]
    run, every = Run.of(early, *rules), torch.arange(count(early), dtype=torch.int32).expand(len(early.answer), -1)
    run.row(0)
    whole = run.row(1, late, focus=Focus(every, count(early)))
    plain = Run.of(early, *(tuple(rule(*each) for each in sites) for rule in (keep, reuse)))
    plain.row(0)
    assert torch.equal(whole, plain.row(1, late))
    run = Run.of(early, *rules)
    run.row(0)
    some = active(late, run.row(1, late, focus=Focus(ids, count(early))), ids)
    if site in ("residual", "block") or name in ("dit", "pixart", "wan"):
        assert bool(torch.isfinite(some).all())
    assert not torch.equal(some, active(late, late.answer, ids))


def joined(network, block):
    """One projection gives attention and MLP of a block."""
    return any(len(half.sites) > 1 for half in network.parts.entries[block].inside)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "lumina2"])
def test_what_a_row_of_some_tokens_keeps_lies_among_the_rest(name):
    early = networks(name)[0]
    late, ids, blocks = later(early), picked(early), len(early.parts.blocks)
    keys = [((i, i + 1), "kv") for i in range(blocks)]
    span = (0, 1), "mlp"
    rules = [tuple(rule(*each) for each in (span, *keys)) for rule in (keep, reuse)]
    middle = (keep(*span), *(reuse(*each) for each in keys))
    run = Run.of(early, rules[0], middle, rules[1])
    run.row(0)
    (slab, lanes) = next(place for (cell, part), place in run.kept.places.items() if cell.site == "mlp" and part == 0)
    before = slab.values.clone()
    run.row(1, late, focus=Focus(ids, count(early)))
    changed = (slab.values != before)[list(lanes), 0].any(dim=-1)
    assert torch.equal(changed, torch.zeros_like(changed).scatter(1, ids.long(), True))


@pytest.mark.parametrize("store", ["fp32", "bf16", "fp16"])
def test_keys_may_be_kept_in_fewer_bits(store):
    early = networks("sd3")[0]
    late, ids, blocks = later(early), picked(early), range(len(early.parts.blocks))
    exact = active(late, sparsely(early, late, ids), ids)
    rules = [tuple(replace(rule((i, i + 1), "kv"), store=store) for i in blocks) for rule in (keep, reuse)]
    run = Run.of(early, rules[0], tuple(reuse((i, i + 1), "kv") for i in blocks))
    run.row(0)
    found = active(late, run.row(1, late, focus=Focus(ids, count(early))), ids)
    assert torch.equal(found, exact) == (store == "fp32")
    assert float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_half_precision_keeps_keys_as_they_are():
    early = networks("sd3")[0]
    module = make("sd3", torch.bfloat16).transformer

    def narrow(value):
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    ids, late = picked(early), later(early)
    early, late = (
        replace(
            each,
            module=module,
            args=tuple(map(narrow, each.args)),
            kwargs={k: narrow(v) for k, v in each.kwargs.items()},
        )
        for each in (early, late)
    )
    run = kv(early)
    run.row(0)
    assert {slab.dtype for slab, _ in run.kept.places.values()} == {torch.bfloat16}
    found = active(late, run.row(1, late, focus=Focus(ids, count(early))), ids)
    wanted = active(late, densely(early, late, ids), ids)
    assert float((found - wanted).abs().max()) <= 4 * torch.finfo(torch.bfloat16).eps * float(wanted.abs().max())


@pytest.mark.parametrize("name", WHOLE)
def test_networks_that_need_all_tokens_say_why(name):
    cached = Cached(networks(name)[0].module)
    assert "kv" not in cached.sites
    assert re.search("computes all image tokens in every row: .*convolutions", cached.lacks("kv", (0, 1)))


def test_an_attention_without_the_product_of_torch_is_refused():
    from diffusers.models.attention_processor import AttnProcessor

    early = networks("dit")[0]
    module = make("dit").transformer
    module.transformer_blocks[1].attn1.set_processor(AttnProcessor())
    with pytest.raises(
        UnsupportedError, match="attn1: AttnProcessor ran scaled_dot_product_attention of torch 0 times"
    ):
        kv(early).row(0, module=module)


def test_a_row_about_another_number_of_tokens_is_refused():
    early = networks("flux")[0]
    run = kv(early)
    run.row(0)
    with pytest.raises(UnsupportedError, match="has rows for 16 tokens, the row of the plan is about 20 image tokens"):
        run.row(1, focus=Focus(picked(early), 20))
    with pytest.raises(UnsupportedError, match="controlnet_block_samples: it is added to all image tokens"):
        check_inputs({"controlnet_block_samples": [1], "hidden_states": 2})


def test_a_prompt_of_another_length_within_a_run_is_refused():
    early = networks("flux")[0]
    run = kv(early)
    run.row(0)
    longer = {**early.kwargs, "encoder_hidden_states": early.kwargs["encoder_hidden_states"].repeat(1, 2, 1)}
    longer["txt_ids"] = early.kwargs["txt_ids"].repeat(2, 1)
    with pytest.raises(UnsupportedError, match="a prompt must keep its length within a run"):
        run.row(1, replace(early, kwargs=longer), focus=Focus(picked(early), count(early)))


def test_tokens_of_a_prediction_are_counted_row_by_row():
    early = networks("wan")[0]
    assert by_token(early, early.answer).shape[1] == 32


@pytest.mark.parametrize(
    "name", ["dit", "sd3", "flux", "flux2", "lumina2", "qwen", "cogvideox", "wan", "hunyuan_video"]
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_row_tells_what_attention_tokens_receive(name, fused):
    early = networks(name)[0]
    block, n = len(early.parts.blocks) - 1, count(early)
    span = (block, block + 1)
    module = fuse(early.module)[0] if fused else None
    run = Run.of(early, (keep(span, "kv"), keep(span, "received")), (reuse(span, "kv"), reuse(span, "received")))
    assert torch.equal(run.row(0, module=module), early.run(module))
    slab, lanes = next(place for (cell, _), place in run.kept.places.items() if cell.site == "received")
    with Weighing(n, type(early.module).__name__ in BEHIND) as weighing:
        early.run(module)
    assert near(slab.values[list(lanes), 0], weighing.found)
    whole = weighing.found.sum(dim=1)
    assert bool((whole <= n * (1 + 1e-5)).all()) and (
        name not in ("dit", "wan") or near(whole, torch.full_like(whole, n))
    )


class Weighing(TorchFunctionMode):
    """What image tokens receive in the last product over them, by weights of their own."""

    def __init__(self, tokens, behind):
        super().__init__()
        self.tokens, self.behind, self.found = tokens, behind, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            query, key, length = named["query"].double(), named["key"].double(), named["key"].shape[2]
            if query.shape[2] == length >= self.tokens:
                scores = torch.einsum("bhqk,bhmk->bhqm", query, key) * (named.get("scale") or query.shape[-1] ** -0.5)
                if named.get("attn_mask") is not None:
                    scores = scores + torch.where(named["attn_mask"], 0.0, -torch.inf)
                weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
                image = slice(0, self.tokens) if self.behind else slice(length - self.tokens, length)
                self.found = weights[:, :, image, image].mean(dim=1).sum(dim=1).float()
        return func(*args, **kwargs)
