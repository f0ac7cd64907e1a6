"""Token rows of the native DiT: every way against the eager oracle, that against a dense computation; bits, batches."""

import pytest
import torch
import torch.nn.functional as F
from tests.models.caching.rows import BLOCKS, BRANCHES, LABELS, SAMPLES, TIMES, WAYS, Case, Memory, every, give, keep

from vivace.engine.tokens import Focus
from vivace.kernels import spec
from vivace.models.dit import NORM_EPS

N, KV = 15, ("kv",)
ALL_WAYS = ["eager", *WAYS]
KEEP, READ = every(keep, KV), every(give, KV)
ROWS = [KEEP, READ, READ, READ]
KINDS = {
    "int8": (("int8", "int8"),) * 3,
    "mixed": ((None, "int8"), ("int8", "bf16"), ("fp32", None)),
    "fp32 inside": (("fp32", "fp32"), (None, None), ("fp32", "int8")),
}
STORES = ("fp32", "bf16", "fp16", "fp8", "int8")
TAIL = (1, BLOCKS)
# What token rows do with caches beside: (what a row says, whether it computes some tokens).
BESIDE = {
    "attention given again": [
        (KEEP + every(keep, ("attn",)), False),
        (every(give, ("attn",)), True),
        (READ + every(keep, ("attn",)), True),
        (every(give, ("attn",)) + READ, True),
    ],
    "what token rows kept, read by a full one": [
        (KEEP + every(keep, ("mlp",)), False),
        (READ + every(keep, ("mlp",)), True),
        (READ + every(keep, ("mlp",)), True),
        (every(give, ("mlp",)), False),
    ],
    "differences of full rows, read by token rows": [
        (every(keep, ("mlp",)), False),
        (KEEP + every(keep, ("mlp",), 1), False),
        (READ + every(give, ("mlp",), 1.0, 0.5), True),
        (READ + every(give, ("mlp",), 0.75), True),
    ],
    "ranges": [
        ([*KEEP, keep("residual", TAIL), keep("block", (0, 1))], False),
        ([*READ, keep("residual", TAIL), keep("block", (0, 1))], True),
        ([*READ, give("residual", TAIL)], True),
        ([*READ, give("block", (0, 1)), keep("attn", (2, 3))], True),
    ],
}


def drawn(*counts):
    """Ids of each row, other ones for every sample; None: a row with all tokens."""
    g = torch.Generator().manual_seed(4)
    return [
        None
        if count is None
        else torch.stack([torch.randperm(N, generator=g)[:count].sort().values for _ in range(SAMPLES)]).int()
        for count in counts
    ]


SOME = drawn(None, 5, 1, 11)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def case(request, tiny_folder):
    return Case(tiny_folder, request.param)


@pytest.fixture(scope="module", params=list(KINDS))
def precise(request, tiny_folder):
    return Case(tiny_folder, torch.bfloat16, KINDS[request.param])


def holds(found, eager, exact):
    good, error, bound = spec.within_tolerance(found.to(eager.dtype), eager, exact)
    assert good, f"error {error:.3g} exceeds {bound:.3g}"


def dense(case, rows_of):
    """Token rows in float64, each over all tokens: of those that are skipped K, V are taken from where they were last
    computed, whatever else they give is wrong and read by nobody."""
    model, x = case.exact().model, case.exact().x
    held, made = [None] * BLOCKS, []
    for i, ids in enumerate(rows_of):
        active = torch.ones(2 * SAMPLES, N, dtype=torch.bool)
        if ids is not None:
            active = torch.zeros(SAMPLES, N).scatter_(1, ids.long(), 1).bool().repeat(2, 1)
        labels = torch.tensor(LABELS)[:, None].expand(2, SAMPLES)
        modulation = model.condition(torch.full((SAMPLES,), TIMES[i], dtype=torch.float64), labels)
        hidden = model.embed(x[i]).repeat(2, 1, 1)
        for b, block in enumerate(model.layers()):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.of_block(b)
            normed = F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS) * scale1 + shift1
            query, fresh = block.qkv(normed).split([hidden.shape[-1], 2 * hidden.shape[-1]], dim=2)
            held[b] = fresh if held[b] is None else torch.where(active[..., None], fresh, held[b])
            heads = [part.unflatten(2, (block.heads, -1)).transpose(1, 2) for part in (query, *held[b].chunk(2, dim=2))]
            scores = (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(-1)
            hidden = hidden + gate1 * block.out((scores @ heads[2]).transpose(1, 2).flatten(2))
            hidden = hidden + gate2 * block.mlp(hidden, shift2, scale2)
        out = torch.stack(model.head(hidden, modulation, x.shape[-2:]))
        shown = 1 if ids is None else case.shown(Focus(ids, N)).double()
        made.append(out * shown)
    return torch.stack(made)


def test_the_oracle_is_dense_rows_with_older_keys_and_values_of_skipped_tokens(tiny_folder):
    case = Case(tiny_folder, torch.float32).exact()
    found, wanted = case.run("eager", ROWS, ids=SOME), dense(case, SOME)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-12


@pytest.mark.parametrize("way", list(WAYS))
def test_token_rows_err_no_more_than_twice_the_eager_oracle(case, way):
    eager, exact = case.run("eager", ROWS, ids=SOME), case.exact().run("eager", ROWS, ids=SOME)
    holds(case.run(way, ROWS, ids=SOME), eager, exact)


@pytest.mark.parametrize("way", list(WAYS))
def test_token_rows_in_other_precisions_err_no_more_than_twice_the_eager_oracle(precise, way):
    eager, exact = precise.run("eager", ROWS, ids=SOME), precise.exact().run("eager", ROWS, ids=SOME)
    holds(precise.run(way, ROWS, ids=SOME), eager, exact)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("way", list(WAYS))
def test_keys_and_values_in_any_store_err_no_more_than_twice_the_eager_oracle(case, way, store):
    eager = case.run("eager", ROWS, store, ids=SOME)
    holds(case.run(way, ROWS, store, ids=SOME), eager, case.exact().run("eager", ROWS, ids=SOME))


@pytest.mark.parametrize("name", list(BESIDE))
@pytest.mark.parametrize("way", list(WAYS))
def test_token_rows_with_caches_beside_err_no_more_than_twice_the_eager_oracle(case, way, name):
    rows = [row for row, _ in BESIDE[name]]
    ids = [some if short else None for some, (_, short) in zip(drawn(4, 5, 3, 11), BESIDE[name], strict=True)]
    eager, exact = case.run("eager", rows, ids=ids), case.exact().run("eager", rows, ids=ids)
    holds(case.run(way, rows, ids=ids), eager, exact)


@pytest.mark.parametrize("name", list(BESIDE))
@pytest.mark.parametrize("way", list(WAYS))
def test_int8_token_rows_with_caches_beside_err_no_more_than_twice_the_eager_oracle(precise, way, name):
    rows = [row for row, _ in BESIDE[name]]
    ids = [some if short else None for some, (_, short) in zip(drawn(4, 5, 3, 11), BESIDE[name], strict=True)]
    eager, exact = precise.run("eager", rows, ids=ids), precise.exact().run("eager", rows, ids=ids)
    holds(precise.run(way, rows, ids=ids), eager, exact)


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize("kinds", [None, *KINDS])
def test_token_rows_of_all_tokens_have_the_bits_of_plain_rows(tiny_folder, way, kinds):
    """The same kernels on the same rows: going by ids only moves memory, and what is kept is what was computed."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(tiny_folder, dtype, None if kinds is None else KINDS[kinds])
        ids = [None, *[torch.arange(N, dtype=torch.int32).repeat(SAMPLES, 1)] * 3]
        assert torch.equal(case.run(way, ROWS, ids=ids), case.run(way, [[]] * 4))


def test_a_token_row_on_the_input_that_was_kept_has_the_bits_of_the_full_row_where_it_is_active(case):
    """Then K, V of skipped tokens are those that they would have had, and a token's bits do not depend on others."""
    memory = Memory([KEEP])
    full = case.compiled("cpp", 0, memory.turns(KEEP))
    for ids in SOME[1:]:
        shown = case.shown(Focus(ids, N)) > 0
        found = case.compiled("cpp", 0, memory.turns(READ), focus=Focus(ids, N))
        assert torch.equal(torch.where(shown, found, 0), torch.where(shown, full, 0))


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize("name", [None, *BESIDE])
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(case, way, name):
    """Each sample has tokens of its own; those of its neighbours change nothing."""
    rows, ids = ROWS, SOME
    if name is not None:
        rows = [row for row, _ in BESIDE[name]]
        ids = [some if short else None for some, (_, short) in zip(drawn(4, 5, 3, 11), BESIDE[name], strict=True)]
    whole = case.run(way, rows, "bf16", ids=ids)
    for sample in range(SAMPLES):
        assert torch.equal(case.run(way, rows, "bf16", [sample], ids)[:, :, 0], whole[:, :, sample])


@pytest.mark.parametrize("way", ALL_WAYS)
def test_branches_of_a_token_row_alone_have_the_bits_of_both_together(case, way):
    """The branches share ids, and each has keys and values of its own."""
    apart = [[item for branch in BRANCHES for item in every(say, KV, branches=(branch,))] for say in (keep, give)]
    assert torch.equal(case.run(way, [apart[0], apart[1]], ids=SOME[:2]), case.run(way, ROWS[:2], ids=SOME[:2]))


@pytest.mark.parametrize("way", ALL_WAYS)
def test_rows_that_keep_keys_and_values_have_the_bits_of_plain_ones(case, way):
    for store in (None, "int8"):
        assert torch.equal(case.run(way, [KEEP], store), case.run(way, [[]]))


@pytest.mark.parametrize("way", ["eager", "sequence"])
def test_the_order_of_ids_changes_nothing(case, way):
    """A token's bits depend on what it is and on what is kept, not on where it stands among the active ones."""
    mixed = [None, SOME[1].flip(1)[:, [1, 0, 2, 4, 3]], *SOME[2:]]
    assert torch.equal(case.run(way, ROWS, ids=mixed), case.run(way, ROWS, ids=SOME))


@pytest.mark.parametrize("way", ALL_WAYS)
def test_a_token_row_writes_the_active_tokens_and_no_others(case, way):
    memory = Memory([[*KEEP, *every(keep, ("mlp",))]])
    full, short = [*KEEP, *every(keep, ("mlp",))], [*READ, *every(keep, ("mlp",))]
    run = case.eager if way == "eager" else lambda *args, **more: case.compiled(way, *args, **more)
    run(0, memory.turns(full))
    slabs = list(memory.memory.slabs.values())
    before = [slab.values.clone() for slab in slabs]
    run(1, memory.turns(short), focus=Focus(SOME[1], N))
    changed = [slab.values.ne(old).any(-1) for slab, old in zip(slabs, before, strict=True)]
    assert {slab.values.shape[-1] for slab in slabs} == {32, 64}
    wanted = torch.zeros(SAMPLES, N, dtype=torch.bool).scatter_(1, SOME[1].long(), True)
    for slab, found in zip(slabs, changed, strict=True):
        for cell in memory.kept.places:
            held, lanes = memory.kept.places[cell]
            if held is slab:
                assert torch.equal(found[list(lanes), 0], wanted)


@pytest.mark.parametrize("way", ALL_WAYS)
def test_keys_and_values_are_kept_in_the_dtype_of_the_heads(case, way):
    memory = Memory([KEEP])
    run = case.eager if way == "eager" else lambda *args: case.compiled(way, *args)
    run(0, memory.turns(KEEP))
    assert {(slab.shape, slab.dtype) for slab in memory.memory.slabs.values()} == {((N, 64), case.model.dtype)}


@pytest.mark.parametrize("way", ALL_WAYS)
def test_token_rows_without_keys_and_values_are_refused(case, way):
    memory = Memory([KEEP])
    run = case.eager if way == "eager" else lambda *args, **more: case.compiled(way, *args, **more)
    run(0, memory.turns(KEEP))
    with pytest.raises((RuntimeError, ValueError), match=r"[Bb]lock 1"):
        run(1, [turn for turn in memory.turns(READ) if turn.use.blocks != (1, 2)], focus=Focus(SOME[1], N))
    with pytest.raises(RuntimeError, match="block 0: REUSE in a row with all tokens"):
        run(1, memory.turns(READ))
    with pytest.raises(RuntimeError, match="block 0: COMPUTE in a token row"):
        run(1, memory.turns(KEEP), focus=Focus(SOME[1], N))


def test_ids_that_do_not_ascend_or_leave_the_picture_are_refused(case):
    memory = Memory([KEEP])
    case.compiled("cpp", 0, memory.turns(KEEP))
    for bad in ([0, 2, 2], [0, 3, 1], [-1, 0, 1], [0, 1, 15]):
        ids = torch.tensor([[0, 1, 2], bad, [0, 1, 2]], dtype=torch.int32)
        with pytest.raises(ValueError, match="ids ascend"):
            case.compiled("cpp", 1, memory.turns(READ), focus=Focus(ids, N))
