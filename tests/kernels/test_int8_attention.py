"""Attention on integer scores: close to attention in float64, keys less their mean, blocks that change no bit."""

from dataclasses import astuple

import pytest
import torch

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec, store
from vivace.kernels.attention import attention
from vivace.kernels.int8_attention import SPEC, int8_attention, reference, tiles
from vivace.kernels.int8_attention.tiles import Blocks, Head
from vivace.kernels.int8_attention.tune import tune

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
DEVICE = "NVIDIA H100 80GB HBM3 (9, 0)"


@pytest.fixture(autouse=True)
def empty_store(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles.forget()
    yield
    tiles.forget()


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def heads(*shape, keys=None, dtype=torch.bfloat16, seed=3):
    generator = torch.Generator().manual_seed(seed)
    many = (shape[0], keys or shape[1], *shape[2:])
    return [torch.randn(size, generator=generator).to(dtype) for size in (shape, many, many)]


def run(query, key, value, backend, **options):
    place = device_of(backend)
    return int8_attention(*(t.to(place) for t in (query, key, value)), **options, backend=backend).cpu()


def exact(query, key, value):
    return attention(query.double(), key.double(), value.double(), backend="reference")


def most_error(query, key, value):
    """What half a step in queries and keys can do: scores off by d change weights by factors up to exp(2 d)."""
    q, k = query.double(), key.double() - key.double().mean(1, keepdim=True).bfloat16()
    a, c = q.abs().amax(-1) / 127, k.abs().amax((1, 3)) / 127  # of the largest keys of a head: no block has more
    products = q.abs().sum(-1) * c[:, None] + k.abs().sum(-1).amax(1)[:, None] * a + q.shape[-1] * a * c[:, None] / 2
    factor = torch.expm1(products.max() / 2 * q.shape[-1] ** -0.5 * 2)
    return (factor + 2.0**-7) * value.double().abs().max()  # weights and results are rounded to bfloat16


@on_every_backend
@pytest.mark.parametrize("width", [64, 72, 128])
def test_it_is_as_close_to_float64_as_half_steps_allow(backend, width):
    query, key, value = heads(1, 66, 2, width)
    found, wanted = run(query, key, value, backend).double(), exact(query, key, value)
    assert (found - wanted).abs().max() <= most_error(query, key, value)
    typical = (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert typical < 1.0 / 16  # 127 steps to the largest of some hundred normals: a step is 1 / 40 of a deviation


@on_every_backend
def test_one_vector_added_to_all_keys_costs_nothing(backend):
    query, key, value = heads(1, 50, 2, 64)
    far = (key.float() + torch.arange(64) - 32).bfloat16()  # up to 32 deviations off
    found, wanted = run(query, far, value, backend).double(), exact(query, far, value)
    assert (found - wanted).abs().max() <= most_error(query, far, value)
    rest = far.double() - far.double().mean(1, keepdim=True)
    assert far.double().abs().max() > 6 * rest.abs().max()  # steps would be that much larger with the mean on


@on_every_backend
def test_a_query_has_its_bits_whatever_the_other_queries(backend):
    query, key, value = heads(2, 70, 2, 40)
    whole = run(query, key, value, backend)
    for rows in (1, 5, 64, 65):
        assert torch.equal(run(query[:, :rows], key, value, backend), whole[:, :rows])
    others = query.clone()
    others[:, 1:] *= 100.0
    assert torch.equal(run(others, key, value, backend)[:, 0], whole[:, 0])
    assert torch.equal(run(query, key, value, backend, scale=40**-0.5), whole)


@on_every_backend
def test_infinite_keys_and_queries_are_told_by_nan(backend):
    query, key, value = heads(1, 6, 2, 16)
    query[0, 2, 1, 3], key[0, 1, 0, 0] = float("inf"), float("-inf")
    found = run(query, key, value, backend)
    assert found[:, :, 0].isnan().all() and found[0, 2, 1].isnan().all()
    assert found[0, [0, 1, 3, 4, 5], 1].isfinite().all()


def test_keys_share_a_scale_in_blocks_and_a_query_has_its_own():
    key = torch.randn(2, 130, 8, generator=torch.Generator().manual_seed(1))
    q, scale = reference.quantized_keys(key)
    assert q.abs().amax((1, 2)).eq(127).all() and q.frac().eq(0).all()
    assert all(len(scale[0, begin : begin + 64].unique()) == 1 for begin in (0, 64, 128))
    mean = key.mean(1, keepdim=True).bfloat16().float()
    assert (q * scale - (key - mean)).abs().le(0.5001 * scale).all()


@pytest.mark.parametrize(
    ("width", "parts"),
    [(1, (32, 0, 0)), (33, (32, 32, 16)), (64, (64, 0, 0)), (72, (64, 32, 16)), (80, (64, 32, 16)), (96, (64, 32, 32)),
     (112, (64, 64, 64)), (128, (128, 0, 0))],
)  # fmt: skip
def test_heads_are_cut_into_powers_of_two(width, parts):
    head = Head.of(width)
    assert (head.first, head.rest, head.rest_values) == parts
    assert head.first + head.rest >= width and head.wide >= head.first + head.rest


def test_blocks_fill_the_device_and_fit_it():
    assert tiles.table(Head.of(72), 32, 4096) == Blocks(128, 128, 8, 3)
    assert tiles.table(Head.of(72), 32, 256) == Blocks(64, 128, 4, 3) or tiles.table(Head.of(72), 32, 256).queries == 64
    for width in (64, 72, 128):
        head = Head.of(width)
        assert len({each.keys for each in tiles.blocks(head)}) == 1  # which decides bits
        assert all(each.shared(head) <= 227 << 10 for each in tiles.blocks(head))
        assert all(each.shared(head) <= 99 << 10 for each in tiles.blocks(head, 99 << 10))


def test_kept_blocks_are_taken_for_their_shape_class_alone():
    head, chosen = Head.of(72), tiles.blocks(Head.of(72))[1]
    assert store.put(tiles.key(head, 64, 4096, 4096, DEVICE), {"blocks": list(astuple(chosen))}) is None
    assert tiles.blocks_of(head, 32, 4000, 4096, DEVICE) == chosen
    assert tiles.blocks_of(head, 32, 8192, 4096, DEVICE) != chosen
    assert tiles.blocks_of(Head.of(64), 32, 4000, 4096, DEVICE) != chosen
    assert store.put(tiles.key(head, 64, 64, 64, DEVICE), {"blocks": [1, 2, 3, 4]}) is None
    assert tiles.blocks_of(head, 32, 64, 64, DEVICE) == tiles.table(head, 64, 64)


@pytest.mark.backend("triton")
def test_triton_blocks_all_have_the_same_bits_and_the_fastest_is_kept():
    if spec.interpreted():
        ticks = iter(range(100, 0, -1))
        tuned = tune(2, 70, 70, 72, device="cpu", clock=lambda call: float(next(ticks)))
    else:
        tuned = tune(2, 70, 70, 72)
    assert not tuned.refused and tuned.not_kept is None and set(tuned.ms) == set(tiles.blocks(Head.of(72)))
    assert tuned.blocks == min(tuned.ms, key=tuned.ms.get) and tuned.to_dict()["shape"] == [2, 70, 70, 72]
    found = store.get(tiles.key(Head.of(72), 64, 128, 128, tuned.device))
    assert tiles.kept(found.value, Head.of(72)) == tuned.blocks


@pytest.mark.parametrize("sizes", [(0, 1, 1, 8), (1, 1, 1, 129)])
def test_what_has_no_blocks_is_refused(sizes):
    with pytest.raises(ArgumentError, match="tune: "):
        tune(*sizes)


Q = torch.zeros(2, 3, 2, 8).bfloat16()
REFUSED = [
    ((Q.float(), Q, Q), {}, DtypeError, "query is float32, needs bfloat16 or float16"),
    ((Q, Q.half(), Q), {}, DtypeError, "key is float16, needs bfloat16"),
    ((Q[0], Q, Q), {}, ShapeError, r"query has shape \(3, 2, 8\)"),
    ((Q, Q[:1], Q), {}, ShapeError, r"key has shape \(1, 3, 2, 8\)"),
    ((Q, Q, Q[:, :2]), {}, ShapeError, "value has shape"),
    ((Q.transpose(1, 3), Q.transpose(1, 3), Q.transpose(1, 3)), {}, ShapeError, "stride"),
    ((Q, Q, Q), {"scale": 0.0}, ArgumentError, "scale is 0.0"),
    ((Q, Q, Q), {"out": Q.half()}, DtypeError, "out is float16"),
    ((Q.repeat(1, 1, 1, 17),) * 3, {}, ShapeError, "heads are 136 wide, need 1 to 128"),
    ((Q[..., :0],) * 3, {}, ShapeError, "heads are 0 wide"),
    ((Q, Q, Q), {"backend": "cpu"}, BackendError, "on a processor use `attention`"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(args, kwargs, error, words):
    with pytest.raises(error, match=f"int8_attention: .*{words}"):
        int8_attention(*args, **kwargs)
