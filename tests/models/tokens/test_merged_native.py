"""Merged tokens in the native DiT, in eager: the network of diffusers with the same weights, sessions, importance."""

import pytest
import torch
from tests.models.caching.rows import LABELS, TIMES, Case
from tests.models.compiled.test_native import plan_of

import vivace
from vivace.engine.merge_rows import MergeRow, merge_bytes
from vivace.engine.merging import Merges, MergeSample, Merging
from vivace.engine.passes import apply_block_cache, apply_merge, apply_precision
from vivace.errors import UnsupportedError
from vivace.models.caching.foreign import Cached
from vivace.models.caching.native import predict
from vivace.models.dit import DiT
from vivace.models.quantized.layers import forward_at
from vivace.models.tokens.maps import destinations
from vivace.models.tokens.merge import drawn_by_importance, drawn_per_cell, pooled

BRANCHES = ("cond", "uncond")


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def merging(share, sites, pictures, blocks=3, fresh=True, states=None):
    """What all blocks merge, each picture with a state of its own."""
    states = states or [Merges((5 + n,), (n,)) for n in range(pictures)]
    row = MergeRow((((0, blocks), share, fresh),), 2, sites, False, 1)
    return Merging("main", row, tuple(MergeSample(state, 0, 1) for state in states)), states


@pytest.mark.parametrize("shape", [(8, 8), (12, 6)])
@pytest.mark.parametrize("sites", [("attn",), ("mlp",), ("attn", "mlp")])
def test_the_native_network_merges_as_that_of_diffusers(tiny_folder, sites, shape):
    import diffusers

    foreign, native = diffusers.DiTTransformer2DModel.from_pretrained(tiny_folder), DiT.load(tiny_folder)
    x = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([700.0, 300.0]), torch.tensor([[1, 2], [10, 10]])
    said, _ = merging(0.5, sites, 2)
    ours = torch.cat(predict(native, x, t, labels, BRANCHES, (), merging=said))
    plain = torch.cat(native(x, t, labels))
    assert float((ours - plain).norm() / plain.norm()) > 1e-3
    if shape != (8, 8):
        return  # that network knows one size
    cached = Cached(foreign.eval())
    rows = [(branch, n) for branch in BRANCHES for n in range(2)]
    said, _ = merging(0.5, sites, 2)
    with torch.no_grad():
        keeper = cached.keeper((), rows, None, said)
        theirs = cached.run(keeper, x.repeat(2, 1, 1, 1), timestep=t.repeat(2), class_labels=labels.flatten()).sample
    assert float((ours - theirs[:, :4]).norm() / theirs[:, :4].norm()) < 1e-5


def test_branches_share_the_map_of_cond_and_pictures_have_their_own(tiny_folder):
    native = DiT.load(tiny_folder)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([700.0, 300.0]), torch.tensor([[1, 2], [10, 10]])
    said, states = merging(0.5, ("attn",), 2)
    both = predict(native, x, t, labels, BRANCHES, (), merging=said)
    first, second = (state.maps["main", 0, 0][0][0] for state in states)
    assert not torch.equal(first, second)
    for n in range(2):  # alone, and cond without uncond: the same bits
        alone, own = merging(0.5, ("attn",), 1, states=[Merges((5 + n,), (n,))])
        one = slice(n, n + 1)
        single = predict(native, x[one], t[one], labels[:, one], BRANCHES, (), merging=alone)
        assert all(torch.equal(a[one], b) for a, b in zip(both, single, strict=True))
        lone, third = merging(0.5, ("attn",), 1, states=[Merges((5 + n,), (n,))])
        cond = predict(native, x[one], t[one], labels[:1, one], ("cond",), (), merging=lone)
        assert torch.equal(cond[0], single[0])
        assert all(torch.equal(own[0].maps[key][0][0], third[0].maps[key][0][0]) for key in own[0].maps)
        after, _ = merging(0.5, ("attn",), 1, states=third)  # uncond, evaluated by itself after cond
        uncond = predict(native, x[one], t[one], labels[1:, one], ("uncond",), (), merging=after)
        assert torch.equal(uncond[0], single[1])
    nobody, _ = merging(0.5, ("attn",), 1)
    with pytest.raises(RuntimeError, match="no map of block 0"):
        predict(native, x[:1], t[:1], labels[1:, :1], ("uncond",), (), merging=nobody)


def test_sessions_tell_bytes_beforehand_and_give_the_same_bits_in_any_mix(pipe):
    plan = plan_of(pipe, 4, 3.0, (0.0, 0.7))
    made = [apply_merge(plan, 0.5, every=2, importance="guidance"), apply_merge(plan, 0.75, sites=("attn", "mlp"))]
    session = pipe.compile([*made, plan], backend="eager")
    asked = [
        vivace.Request("red heart", plan=which, seed=seed, n=n)
        for which, seed, n in ((made[0], 1, 2), (made[1], 2, 1), (plan, 3, 1), (made[0], 4, 1))
    ]
    alone = [session("red heart", plan=request.plan, seed=request.seed, n=request.n) for request in asked]
    for result, request in zip(alone, asked, strict=True):
        bound, told = request.plan.bind(pipe.spec), result.receipt.merges
        if request.plan is plan:
            assert not told
            continue
        assert told["bytes"] == told["bytes_planned"] == merge_bytes(bound) * request.n
        assert told["layers"] == pipe.spec.blocks
    states = [session.begin(request) for request in asked]
    session.step(states[:1])  # not all at one row
    while not all(state.done for state in states):
        session.step([state for state in states if not state.done])
    for state, single in zip(states, alone, strict=True):
        assert torch.equal(session.finish(state).latents, single.latents)
    picture = session("red heart", plan=made[0], seed=1, index=1).latents
    assert torch.equal(picture, alone[0].latents[1:])


def test_ends_of_the_share(pipe):
    plan = plan_of(pipe, 3, 3.0)
    session = pipe.compile([plan], backend="eager")
    exact = session("red heart", seed=1)
    none = session("red heart", plan=apply_merge(plan, 0.0), seed=1)
    assert torch.equal(none.latents, exact.latents)
    assert none.receipt.warnings == ("merging had no effect: no token was merged (apply_merge)",)
    some, most = (session("red heart", plan=apply_merge(plan, share), seed=1).latents for share in (0.1, 0.75))
    drifts = [float((latents - exact.latents).norm() / exact.latents.norm()) for latents in (some, most)]
    assert 0.0 < drifts[0] < drifts[1]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_rows_in_another_precision_merge(pipe, precision):
    plan = apply_merge(apply_precision(plan_of(pipe, 3, 3.0), precision, first=1), 0.5, sites=("attn", "mlp"))
    found = pipe.compile(plan, backend="eager")("red heart", seed=1)
    plain = pipe.compile(apply_merge(plan_of(pipe, 3, 3.0), 0.5, sites=("attn", "mlp")), backend="eager")
    wanted = plain("red heart", seed=1)
    assert found.receipt.merges == wanted.receipt.merges
    drift = float((found.latents - wanted.latents).norm() / wanted.latents.norm())
    assert drift < (0.5 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("kinds", [(("int8", "int8"),) * 3, ((None, "int8"), ("int8", "bf16"), ("fp32", None))])
def test_halves_of_8_bits_merge_what_their_first_linear_reads(tiny_folder, kinds):
    case = Case(tiny_folder, torch.float32, kinds)
    t, labels, x = torch.full((3,), TIMES[0]), torch.tensor(LABELS)[:, None].expand(-1, 3), case.x[0]
    outs = []
    for network in (case.model, case.network()):
        said, states = merging(0.5, ("attn", "mlp"), 3)
        with forward_at([TIMES[0]] * 3):
            outs.append(torch.cat(predict(network, x, t, labels, BRANCHES, (), merging=said)))
    plain = torch.cat(case.model(x, t, labels))
    drift, merged = (float((out - outs[0]).norm() / outs[0].norm()) for out in (outs[1], plain))
    assert 0.0 < drift < merged  # rounding to 8 bits moves less than merging does


def test_halves_that_are_given_again_merge_nothing(pipe):
    plan = plan_of(pipe, 4, 3.0).bind(pipe.spec)
    cached = apply_block_cache(plan, "fora", interval=2, sites=("attn",))
    found = pipe.compile(apply_merge(cached, 0.5, sites=("attn", "mlp")), backend="eager")("red heart", seed=1)
    assert found.receipt.caches["reused"] and found.receipt.merges["made"] == 4 * pipe.spec.blocks
    alone = pipe.compile(apply_merge(cached, 0.5), backend="eager")("red heart", seed=1)
    assert alone.receipt.merges["made"] == 3 * pipe.spec.blocks  # the last row computes, too


def test_importance_is_what_guidance_did_in_the_last_row_with_both_branches(pipe):
    plan = apply_merge(plan_of(pipe, 4, 3.0, (0.0, 0.5)), 0.5, importance="guidance")
    session = pipe.compile(plan, backend="eager")
    state = session.begin(vivace.Request("red heart", seed=1))
    seen, evaluate = [], session.denoiser.evaluate

    def noted(*args, **kwargs):
        outs = evaluate(*args, **kwargs)
        seen.append((args[3].branches, outs))
        return outs

    session.denoiser.evaluate = noted
    sample = MergeSample(state.merges, 0, 9)
    grid = tuple(size // edge for size, edge in zip(pipe.spec.latent_shape[1:], pipe.spec.patch, strict=True))
    count = (grid[0] // 2) * (grid[1] // 2)
    assert torch.equal(destinations(sample, grid, 2, True, torch.device("cpu")), drawn_per_cell(grid, 2, 1, 0, 9))
    kept = []
    while not state.done:
        session.step([state])
        kept.append(state.merges.importance[0])
    for (branches, outs), importance in zip(seen, kept, strict=True):
        if "uncond" in branches:
            wanted = (outs[0][0] - outs[1][0]).abs().mean(dim=0)
        assert torch.equal(importance, wanted)
    assert [len(branches) for branches, _ in seen] == [2, 2, 1, 1]
    drawn = drawn_by_importance(pooled(wanted, grid), count, 1, 0, 9)
    assert torch.equal(destinations(sample, grid, 2, True, torch.device("cpu")), drawn)
    session.abort(state)


def test_compiled_rows_refuse_with_the_reason(pipe):
    with pytest.raises(UnsupportedError, match="cpu executor cannot run it: its rows merge no tokens; use backend"):
        pipe.compile(apply_merge(plan_of(pipe, 3), 0.5), backend="cpu")
