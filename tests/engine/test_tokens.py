"""The state of tokens: how long one waits, what selectors read, what is put together; editing inside of a mask."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vivace
from tests.engine.test_token_sessions import TOKENS, base, run, some
from tests.engine.tokeny import SHAPE, Tokeny
from tests.engine.toy import session
from vivace.engine.caching import caches
from vivace.engine.focusing import Member, Together
from vivace.engine.passes import apply_block_cache, apply_mask
from vivace.engine.request import Request
from vivace.engine.token_rows import focused, history_depth, token_rows, tokens_of
from vivace.engine.tokens import Focus, Tokens
from vivace.errors import ArgumentError, UnsupportedError

WIDE = (2, 6, 20)  # 3 x 5 tokens of 2 x 4


def made(plan, n=2, shape=WIDE, patch=(2, 4), **options):
    toy = Tokeny(shape=shape, patch=patch)
    bound = plan.bind(toy.spec)
    return bound, tokens_for(bound, toy, range(n), **options)


def tokens_for(plan, toy, pictures, mask=None, values=None):
    shape = toy.spec.latent_shape
    values = {"guidance_scale": 3.0} if values is None else values
    return Tokens(plan, tuple(pictures), 7, toy.spec.layout(shape), torch.zeros((0, *shape)), values, mask)


def walk(plan, tokens, seed=0):
    """Run the rows on random predictions; per row which tokens were computed, bool [n, N], and their ages behind it."""
    generator = torch.Generator().manual_seed(seed)
    n, shape = len(tokens.pictures), tokens.layout.shape
    for i, step in enumerate(plan.steps):
        if step.variant is None:
            continue
        together = Together((Member(tokens, i, tuple(range(n))),), focused(step.variant))
        focus = together.select()
        outs = tuple(torch.randn((n, *shape), generator=generator) for _ in step.branches)
        together.merge(outs, step.branches)
        active = torch.ones((n, tokens.count), dtype=torch.bool)
        if focus is not None:
            active = torch.zeros_like(active).scatter(1, focus.ids.long(), True)
        yield i, active, together


# --- no token is forgotten -----------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    keep=st.one_of(st.floats(0.07, 0.95), st.lists(st.sampled_from([0.2, 0.34, 0.5, 1.0]), min_size=12, max_size=12)),
    selector=st.sampled_from(["deviation", "norm", "change", "guidance", "random"]),
    drop_high=st.one_of(st.none(), st.floats(0.0, 1.0)),
    starvation=st.floats(0.0, 2.0),
    every=st.one_of(st.none(), st.integers(3, 9)),
    tight=st.booleans(),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_no_token_waits_longer_than_the_bound(keep, selector, drop_high, starvation, every, tight, seed):
    least = min(keep) if isinstance(keep, list) else keep
    options = {"selector": selector, "drop_high": drop_high, "starvation": starvation, "every": every}
    toy = Tokeny(shape=WIDE, patch=(2, 4))
    plan = base(12).bind(toy.spec)
    if tight:  # the least that can be kept at all
        options["bound"] = -(-15 // max(1, round(least * 15))) - 1
    plan = some(plan, keep, **options)
    if not tokens_of(plan):
        return
    bound = max(row.bound for row in token_rows(plan) if row is not None)
    tokens = tokens_for(plan, toy, (0, 3))
    waited = torch.zeros((2, 15), dtype=torch.int32)
    counted = torch.zeros_like(waited)
    for i, active, together in walk(plan, tokens, seed):
        waited = torch.where(active, 0, waited + 1)
        counted += active
        assert int(waited.max()) <= bound, (i, bound)
        assert torch.equal(tokens.ages, waited)
        if together.focus is not None:
            assert int(active.sum()) == 2 * int(token_rows(plan)[i].keep)
            assert bool((together.focus.ids[:, 1:] > together.focus.ids[:, :-1]).all())
    assert torch.equal(tokens.heat, counted.view(2, 3, 5))


# --- what is put together ------------------------------------------------------------------------------------------
def test_every_token_has_its_last_prediction():
    plan, tokens = made(some(base(8), 0.4))
    generator = torch.Generator().manual_seed(1)
    old = {branch: torch.zeros((2, *WIDE)) for branch in ("cond", "uncond")}
    for i, step in enumerate(plan.steps):
        together = Together((Member(tokens, i, (0, 1)),), focused(step.variant))
        focus = together.select()
        fresh = {branch: torch.randn((2, *WIDE), generator=generator) for branch in step.branches}
        outs = together.merge(tuple(fresh.values()), step.branches)
        for branch, found in zip(step.branches, outs, strict=True):
            for s in range(2):
                for p in range(15):
                    y, x = 2 * (p // 5), 4 * (p % 5)
                    place = (s, slice(None), slice(y, y + 2), slice(x, x + 4))
                    if focus is None or p in focus.ids[s].tolist():
                        old[branch][place] = fresh[branch][place]
            assert torch.equal(found, old[branch]), i


def test_outs_that_no_token_was_computed_of_are_never_read():
    plan, tokens = made(some(base(6), 0.4))
    for i, step in enumerate(plan.steps):
        together = Together((Member(tokens, i, (0, 1)),), focused(step.variant))
        focus = together.select()
        outs = [torch.full((2, *WIDE), torch.nan) for _ in step.branches]
        active = None if focus is None else together._pixels(together._active(focus))
        outs = tuple(torch.randn((2, *WIDE)) if active is None else out.masked_fill(active, 1.0) for out in outs)
        assert all(bool(torch.isfinite(out).all()) for out in together.merge(outs, step.branches))


def test_pictures_that_go_different_ways_meet_again():
    plan, tokens = made(some(base(6), 0.4), n=3)
    whole, apart = made(some(base(6), 0.4), n=3)[1], tokens
    generator = torch.Generator().manual_seed(2)
    for i, step in enumerate(plan.steps):
        outs = tuple(torch.randn((3, *WIDE), generator=generator) for _ in step.branches)
        one = Together((Member(whole, i, (0, 1, 2)),), focused(step.variant))
        one.select()
        one.merge(outs, step.branches)
        for pictures in ((0, 2), (1,)) if not focused(step.variant) else ((0, 1, 2),):
            part = Together((Member(apart, i, pictures),), focused(step.variant))
            part.select()
            part.merge(tuple(out[list(pictures)] for out in outs), step.branches)
        assert torch.equal(whole.ages, apart.ages)
        assert torch.equal(whole.run, apart.run)
        for branch in whole.outs:
            assert torch.equal(whole.outs[branch], apart.outs[branch])


def test_change_compares_a_tokens_own_last_two_predictions():
    plan, tokens = made(some(base(9, guided=False), 0.4, selector="change"), n=1)
    last = torch.zeros((2, 1, *WIDE))
    generator = torch.Generator().manual_seed(3)
    for i, step in enumerate(plan.steps[:-1]):
        together = Together((Member(tokens, i, (0,)),), focused(step.variant))
        focus = together.select()
        if focus is not None:
            assert torch.equal(tokens.outs["cond"], last[0])
            assert torch.equal(tokens.before["cond"], last[1])
        fresh = torch.randn((1, *WIDE), generator=generator)
        active = torch.ones((1, 1, *WIDE[1:]), dtype=torch.bool)
        if focus is not None:
            active = together._pixels(together._active(focus))
        together.merge((fresh,), ("cond",))
        last = torch.stack((torch.where(active, fresh, last[0]), torch.where(active, last[0], last[1])))


def test_guidance_ranks_by_the_last_row_that_had_both():
    plan, tokens = made(some(base(10, interval=(0.0, 0.5)), 0.4, selector="guidance"), n=1)
    both, ranked = None, []
    for i, _, _ in walk(plan, tokens):
        row = token_rows(plan)[i]
        if "uncond" in plan.steps[i].branches and i:
            both = [tokens.outs[branch].clone() for branch in ("cond", "uncond")]
        following = token_rows(plan)[i + 1] if i + 1 < len(plan.steps) else None
        if following is not None:
            planes, weights = tokens.planes(i + 1)
            assert all(map(torch.equal, planes, both)), row
            assert weights.tolist() == [[1.0, -1.0]]
            ranked.append(following.stale)
    assert True in ranked
    assert False in ranked


def test_random_tokens_go_by_seed_picture_and_row():
    plan, one = made(some(base(8), 0.4, selector="random"), n=2)
    _, two = made(some(base(8), 0.4, selector="random"), n=2)
    rows = [i for i, row in enumerate(token_rows(plan)) if row is not None]
    scores = torch.stack([one.scores(i) for i in rows])
    assert torch.equal(scores, torch.stack([two.scores(i) for i in rows]))
    assert len({tuple(row) for row in scores.flatten(0, 1).tolist()}) == 2 * len(rows)


def test_a_guidance_scale_that_is_a_tensor_is_refused():
    toy = Tokeny()
    with pytest.raises(UnsupportedError, match=r"step 2: selector 'deviation' needs input 'guidance_scale' as a num"):
        tokens_for(some().bind(toy.spec), toy, (0,), values={})


def test_some_samples_of_a_focus():
    focus = Focus(torch.tensor([[0, 1], [2, 3], [1, 3]], dtype=torch.int32), 4)
    assert focus.count == 2
    assert focus.pick((1,)).ids.tolist() == [[2, 3]]
    assert focus.pick((2, 0)).ids.tolist() == [[1, 3], [0, 1]]


# --- classes by age ------------------------------------------------------------------------------------------------
def test_classes_are_those_of_a_list_of_computed_rows():
    plan, tokens = made(some(base(14, solver="dpmpp_2m"), 0.25, every=7, ages=2))
    depth, gaps = history_depth(plan), tokens.plan.gaps
    assert (depth, gaps) == (1, 2)
    done = [[[] for _ in range(15)] for _ in range(2)]
    seen = set()
    for i, active, together in walk(plan, tokens):
        for s in range(2):
            for p in range(15):
                rows = done[s][p]
                gap = i - rows[-1] if rows else 1
                if not active[s, p]:
                    want = 0
                elif all(j in rows for j in range(max(0, i - depth), i)):
                    want = 1
                else:
                    want = 1 + gap if gap <= gaps else gaps + 2
                if active[s, p]:
                    rows.append(i)
                if together.classes is not None:
                    seen.add(want)
                    assert int(together.classes[s, p]) == want, (i, s, p)
        assert (together.classes is not None) == tokens.plan.classes[i]
    assert seen == {0, 1, 3, 4} | ({2} & seen)


# --- with caches and other solvers ---------------------------------------------------------------------------------
SOLVERS = ("ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "deis", "lms", "ipndm", "heun", "euler")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_batches_as_singles(solver):
    plan = some(base(7, solver=solver), 0.25)
    both, _ = run(plan, n=2)
    assert bool(torch.isfinite(both.latents).all())
    assert not torch.equal(both.latents, run(base(7, solver=solver), n=2)[0].latents)
    for j in range(2):
        assert torch.equal(run(plan, index=j)[0].latents[0], both.latents[j])


@pytest.mark.parametrize("sites", [("mlp",), ("attn",), ("attn", "mlp")])
def test_rows_may_reuse_what_full_rows_kept(sites):
    cached = apply_block_cache(base(10), "fora", interval=3, sites=list(sites))
    plan = some(cached, 0.25, first=1, every=5)
    both, toy = run(plan, n=2)
    assert bool(torch.isfinite(both.latents).all())
    assert both.receipt.caches["reused"]
    for j in range(2):
        assert torch.equal(run(plan, index=j)[0].latents[0], both.latents[j])
    share = both.receipt.caches["computed_share"]
    assert share < run(cached)[0].receipt.caches["computed_share"]


def test_attention_ranks_by_the_last_full_row_whatever_is_given_again():
    """Attention of the last block, which the selection reads, is given again in every token row here."""
    cached = apply_block_cache(base(9), "fora", interval=3)
    plan = some(cached, 0.25, first=1, every=3, selector="attention").bind(Tokeny().spec)
    for i in (0, 3, 6):
        assert "received" in [item.use.site for item in caches(plan).rows[i].uses]
    both, _ = run(plan, n=2)
    assert torch.equal(run(plan, index=1)[0].latents[0], both.latents[1])


# --- masks ---------------------------------------------------------------------------------------------------------
def region(shape=SHAPE, rows=slice(2, 4), columns=slice(2, 6)):
    mask = torch.zeros(shape)
    mask[:, rows, columns] = 1.0
    return mask


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("strength", [None, 0.6])
def test_outside_of_a_mask_the_picture_keeps_its_bits(solver, strength):
    plan = some(apply_mask(base(8, solver=solver)), 0.25, selector="mask", first=1, last=0)
    plan = plan if strength is None else plan.tail(strength)
    start, mask = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)), region()
    found, toy = run(plan, n=2, image=start, mask=mask)
    outside = mask == 0
    for picture in found.latents:
        assert torch.equal(picture[outside], start[outside])
        assert not torch.equal(picture[~outside], start[~outside])
    touched = {5, 6}
    assert all(touched <= set(ids) for ids in toy.runs if ids)
    assert len({tuple(ids) for ids in toy.runs if ids}) == 1
    full = sum(ids is None for ids in toy.runs) // 2
    assert int((found.computed == full).sum()) == 2 * (TOKENS - 4)


def test_a_mask_of_ones_is_the_plain_run():
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    plain = run(base(6))[0].latents
    found = run(apply_mask(base(6)), image=start, mask=torch.ones(SHAPE))[0].latents
    torch.testing.assert_close(found, plain, rtol=0, atol=64 * 2.0**-24 * float(plain.abs().max() + start.abs().max()))


def test_the_nearest_tokens_fill_a_row_up():
    plan, tokens = made(some(base(6), 0.4, selector="mask"), n=1, mask=region(WIDE, slice(2, 4), slice(8, 12))[None])
    assert tokens.near.view(3, 5).tolist() == [[5, 2, 1, 2, 5], [4, 1, 0, 1, 4], [5, 2, 1, 2, 5]]
    ids = [together.focus.ids.tolist() for _, _, together in walk(plan, tokens) if together.focus is not None]
    assert ids[0] == [[1, 2, 6, 7, 8, 12]]


def test_a_mask_beyond_a_row_is_refused_when_the_request_begins():
    plan = some(apply_mask(base(6)), 0.25, selector="mask")
    image = torch.zeros(SHAPE)
    with pytest.raises(
        ArgumentError, match=r"picture 0 touches 8 of 16 tokens, rows of the plan compute 4; raise keep"
    ):
        run(plan, image=image, mask=region(rows=slice(0, 4), columns=slice(0, 8)))
    with pytest.raises(ArgumentError, match=r"touches 0 of 16 tokens.*mark what is to be edited"):
        run(plan, image=image, mask=torch.zeros(SHAPE))
    with pytest.raises(ArgumentError, match="needs input 'mask'"):
        run(plan, image=image)
    with pytest.raises(ArgumentError, match="input 'mask' as a tensor"):
        session(plan, toy=Tokeny()).begin(Request("red", image=image, mask=1.0))


# --- receipts ------------------------------------------------------------------------------------------------------
def test_the_receipt_tells_tokens_row_by_row():
    plan = some(base(8), 0.25, every=5)
    result, toy = run(plan, n=2)
    receipt = result.receipt
    assert [row.tokens for row in receipt.rows] == [None, None, 4, 4, 4, None, 4, None]
    assert [row.share for row in receipt.rows] == [1, 1, 0.25, 0.25, 0.25, 1, 0.25, 1]
    assert receipt.caches["computed_share"] == pytest.approx(receipt.tokens["share"]) == pytest.approx(5 / 8)
    assert (receipt.tokens["of"], receipt.tokens["rows"], receipt.tokens["bound"]) == (TOKENS, 4, 8)
    assert receipt.caches["bytes"] == receipt.caches["bytes_planned"] == 2 * 2 * 3 * TOKENS * 2 * 12 * 4
    assert not receipt.warnings
    assert "4 rows compute some of 16" in str(receipt)
    assert "select_tokens" in [use.op for use in receipt.kernels]
    assert vivace.engine.caching.computed_share(plan.bind(toy.spec)) == pytest.approx(5 / 8)
    assert result.computed.shape == (2, 4, 4)
    assert int(result.computed.sum()) == 2 * (4 * TOKENS + 4 * 4)


def test_results_of_plain_plans_have_no_counts():
    result, _ = run(base(3))
    assert result.computed is None
    assert not result.receipt.tokens
    assert not result.receipt.warnings


def test_unsigned_seeds_choose_as_signed_ones():
    plan = some(base(5), 0.25, selector="random")
    assert np.isfinite(run(plan, seed=(1 << 64) - 1)[0].latents.numpy()).all()
