"""Rows of the native DiT that keep and reuse: every way against the eager oracle, bits, batches, looks."""

import pytest
import torch
from tests.models.caching.rows import BLOCKS, BRANCHES, SAMPLES, WAYS, Case, Memory, every, give, keep

from vivace.engine.kept import Seen
from vivace.errors import UnsupportedError
from vivace.kernels import spec
from vivace.models.caching.looks import look_blocks

HALVES, TAIL, HEAD = ("attn", "mlp"), (1, BLOCKS), (0, 1)
ROWS = {
    "halves": [every(keep, HALVES), every(give, HALVES), every(keep, HALVES, 1), every(give, HALVES, 1.0, 0.5)],
    "attn": [every(keep, ("attn",)), every(give, ("attn",), 0.9), every(keep, ("attn",)), every(give, ("attn",))],
    "mlp": [
        every(keep, ("mlp",)),
        every(keep, ("mlp",), 1),
        every(keep, ("mlp",), 2),
        every(give, ("mlp",), 1.0, 1.0, 1.0),
    ],
    "residual": [
        [keep("residual", HEAD), keep("residual", TAIL)],
        [give("residual", TAIL)],
        [keep("residual", HEAD, 1), keep("residual", TAIL, 1)],
        [give("residual", HEAD), give("residual", TAIL, 1.0, 0.25)],
    ],
    "block": [
        [keep("block", (0, 2))],
        [give("block", (0, 2))],
        [keep("block", (0, 2), 1)],
        [give("block", (0, 2), 1.0, 0.5)],
    ],
    "halves inside a range": [
        [keep("residual", TAIL), *every(keep, ("mlp",)), keep("block", TAIL)],
        [keep("residual", TAIL, 1), *every(give, ("mlp",))],
        [give("residual", TAIL, 1.0, 1.0), keep("attn", HEAD)],
        [give("block", TAIL), give("attn", HEAD)],
    ],
    "branches that differ": [
        [keep("residual", TAIL, branches=("cond",)), keep("mlp", HEAD, branches=("uncond",))],
        [give("residual", TAIL, branches=("cond",))],
        [give("mlp", HEAD, branches=("uncond",))],
        [],
    ],
}
KINDS = {"plain": None, "int8": (("int8", "int8"),) * 3, "mixed": ((None, "int8"), ("int8", "bf16"), ("fp32", None))}
STORES = (None, "fp32", "bf16", "fp16", "fp8", "int8")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def case(request, tiny_folder):
    return Case(tiny_folder, request.param)


@pytest.fixture(scope="module", params=[name for name in KINDS if name != "plain"])
def precise(request, tiny_folder):
    return Case(tiny_folder, torch.bfloat16, KINDS[request.param])


def holds(found, eager, exact):
    good, error, bound = spec.within_tolerance(found.to(eager.dtype), eager, exact)
    assert good, f"error {error:.3g} exceeds {bound:.3g}"


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(ROWS))
def test_rows_err_no_more_than_twice_the_eager_oracle(case, way, name):
    holds(case.run(way, ROWS[name]), case.run("eager", ROWS[name]), case.exact().run("eager", ROWS[name]))


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(ROWS))
def test_rows_in_other_precisions_err_no_more_than_twice_the_eager_oracle(precise, way, name):
    holds(precise.run(way, ROWS[name]), precise.run("eager", ROWS[name]), precise.exact().run("eager", ROWS[name]))


@pytest.mark.parametrize("store", STORES[1:])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", ["halves", "residual", "block"])
def test_rows_kept_in_any_store_err_no_more_than_twice_the_eager_oracle(case, way, name, store):
    eager = case.run("eager", ROWS[name], store)
    holds(case.run(way, ROWS[name], store), eager, case.exact().run("eager", ROWS[name]))


@pytest.mark.parametrize("way", ["eager", *WAYS])
@pytest.mark.parametrize("kinds", list(KINDS))
def test_rows_that_only_keep_have_the_bits_of_plain_ones(tiny_folder, way, kinds):
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(tiny_folder, dtype, KINDS[kinds])
        plain = case.run(way, [[]])
        for store in ("int8", None):
            rows = [*every(keep, HALVES), keep("residual", TAIL), keep("block", HEAD), keep("residual", HEAD)]
            assert torch.equal(case.run(way, [rows], store), plain)


@pytest.mark.parametrize("way", ["eager", *WAYS])
@pytest.mark.parametrize("name", list(ROWS))
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(case, way, name):
    whole = case.run(way, ROWS[name], "bf16")
    for sample in range(SAMPLES):
        assert torch.equal(case.run(way, ROWS[name], "bf16", [sample])[:, :, 0], whole[:, :, sample])


@pytest.mark.parametrize("way", ["eager", *WAYS])
def test_samples_of_two_requests_share_a_row_without_sharing_memory(case, way):
    """Requests at the same row, each with memory of its own, in any order."""
    rows = ROWS["halves"][:2]
    alone = case.run(way, rows)
    first, second = Memory(rows), Memory(rows)
    second.memory = second.kept.memory = first.memory
    for i, row in enumerate(rows):
        own, other = first.turns(row, (0, 1)), second.turns(row, (2,))
        turns = tuple(type(a)(a.use, a.model, (b.samples[0], *a.samples)) for a, b in zip(own, other, strict=True))
        samples = [2, 0, 1]
        found = case.eager(i, turns, samples) if way == "eager" else case.compiled(way, i, turns, samples)
        assert torch.equal(found, alone[i][:, samples])


@pytest.mark.parametrize("way", list(WAYS))
def test_memory_that_moves_is_found_again(case, way):
    """Another request makes the slab grow between two rows."""
    rows = ROWS["halves"][:2]
    memory, alone = Memory(rows), case.run(way, rows)
    assert torch.equal(case.compiled(way, 0, memory.turns(rows[0])), alone[0])
    before = [slab.values.data_ptr() for slab in memory.memory.slabs.values()]
    for slab in memory.memory.slabs.values():
        slab.take(4 * len(slab.values))
    assert before != [slab.values.data_ptr() for slab in memory.memory.slabs.values()]
    assert torch.equal(case.compiled(way, 1, memory.turns(rows[1])), alone[1])


def looked(case, way, metric, params, samples=range(SAMPLES)):
    """A look at the first row."""
    samples = list(samples)
    if way == "eager":
        return case.look(0, metric, params, samples)
    blocks = look_blocks(metric, params, BLOCKS)
    signal, states = case.row(way).look(*case.inputs(0, samples), blocks)
    return Seen(signal, BRANCHES, blocks, states, tuple(range(len(samples))))


@pytest.mark.parametrize("way", ["eager", *WAYS])
@pytest.mark.parametrize(
    ("metric", "params"), [("first_block", (1.0,)), ("first_block", (3.0, 2.0)), ("modulated_input", (1.0, 0.0))]
)
def test_a_run_goes_on_from_a_look_to_the_bits_of_a_whole_one(case, way, metric, params):
    seen = looked(case, way, metric, params)
    assert seen.signal.dtype == torch.float32 and seen.signal.shape[:2] == (len(BRANCHES), SAMPLES)
    tail = (seen.block, BLOCKS)
    rows = [[], [keep("residual", tail)], [keep("mlp", (2, 3), branches=("uncond",))], [keep("attn", HEAD)]]
    for row in rows[: 1 if seen.block == BLOCKS else None]:
        for samples, part in (([0, 1, 2], seen), ([2, 0], seen.pick((2, 0)))):
            own, other = (Memory([row]).turns(row, samples) for _ in range(2))
            run = case.eager if way == "eager" else lambda *args: case.compiled(way, *args)
            assert torch.equal(run(0, own, samples, part), run(0, other, samples))


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(("metric", "params"), [("first_block", (2.0,)), ("modulated_input", ())])
def test_looks_see_what_the_eager_oracle_sees(case, way, metric, params):
    exact, eager = (looked(each, "eager", metric, params) for each in (case.exact(), case))
    found = looked(case, way, metric, params)
    holds(found.signal, eager.signal, exact.signal.double())
    assert torch.equal(looked(case, way, metric, params, [1]).signal[:, 0], found.signal[:, 1])


def test_unknown_looks_are_refused():
    for metric, params in (("last_block", ()), ("first_block", ()), ("first_block", (4.0,)), ("first_block", (0.0,))):
        with pytest.raises(UnsupportedError, match=metric):
            look_blocks(metric, params, BLOCKS)


@pytest.mark.parametrize("way", list(WAYS))
def test_a_reused_layer_is_not_looked_at_for_odd_numbers_and_the_next_one_is(tiny_folder, way):
    case = Case(tiny_folder, torch.float32)
    rows = [every(keep, ("mlp",)), every(give, ("mlp",))]
    memory = Memory(rows)
    case.compiled(way, 0, memory.turns(rows[0]))
    for slab in memory.memory.slabs.values():
        slab.values.fill_(float("nan"))
    case.compiled(way, 1, memory.turns(rows[1]), check=True)
    assert case.row(way).fault == ("blocks.1.qkv", 0)
