"""QK norm and rotary embedding: torch's norms, complex rotation, tokens left alone, layouts, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.qk_norm_rope import SPEC, qk_norm_rope
from vivace.kernels.qk_norm_rope.cases import fused, permuted, tables

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_fast_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.impls]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
B, N, H, K = 2, 3, 2, 24


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def heads(dtype=torch.float32, device="cpu", shape=(B, N, H, K)):
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return query, key


def turn(device="cpu", rows=N, pairs="interleaved"):
    cos, sin = (table[1:].to(device) for table in tables(rows + 1, K, pairs))
    return {"cos": cos, "sin": sin, "pairs": pairs}


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- the definition ------------------------------------------------------------------------------------------------


def test_neighbours_turn_as_complex_numbers_do():
    query, key = (x.double() for x in heads())
    angles = torch.randn(N, K // 2, dtype=torch.float64)
    freqs = torch.polar(torch.ones_like(angles), angles)
    cos, sin = freqs.real.repeat_interleave(2, -1), freqs.imag.repeat_interleave(2, -1)
    for x, y in zip((query, key), qk_norm_rope(query, key, cos=cos, sin=sin, kind="none"), strict=True):
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * freqs[:, None]
        torch.testing.assert_close(y, torch.view_as_real(z).flatten(-2), rtol=1e-12, atol=1e-12)


def test_halves_turn_as_neighbours_do_after_a_change_of_order():
    query, key = (x.double() for x in heads())
    order = torch.arange(K).view(-1, 2).T.flatten()  # 0, 2, 4, ..., 1, 3, 5, ...
    whole = qk_norm_rope(query, key, **turn())
    parts = qk_norm_rope(query[..., order], key[..., order], **turn(pairs="half"))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a[..., order], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_norm_is_that_of_torch(kind, across):
    query, key = (x.double() for x in heads())
    size = H * K if across else K
    weight, bias = torch.randn(2, size, dtype=torch.float64)
    found = qk_norm_rope(query, key, query_weight=weight, query_bias=bias, key_weight=weight, kind=kind, eps=1e-5)
    for x, y, offset in zip((query, key), found, (bias, torch.zeros_like(bias)), strict=True):
        flat = x.flatten(2) if across else x
        if kind == "layer":
            want = functional.layer_norm(flat, (size,), weight, offset, 1e-5)
        else:
            want = functional.rms_norm(flat, (size,), weight, 1e-5) + offset
        torch.testing.assert_close(y, want.view(x.shape), rtol=1e-12, atol=1e-12)


@on_every_backend
@every_dtype
def test_tokens_without_a_row_are_normalised_alone(backend, dtype):
    query, key = heads(dtype, device_of(backend))
    plain = qk_norm_rope(query, key, backend=backend)
    for first, rows in ((0, 1), (1, 2), (2, 0), (1, 1)):
        found = qk_norm_rope(query, key, **turn(query.device, rows), rotate_from=first, backend=backend)
        for x, y in zip(plain, found, strict=True):
            assert torch.equal(x[:, :first], y[:, :first]) and torch.equal(x[:, first + rows :], y[:, first + rows :])
            assert rows == 0 or (x[:, first : first + rows] != y[:, first : first + rows]).any(-1).all()
    unturned = qk_norm_rope(query, key, **turn(query.device), rotate_key=False, backend=backend)
    assert torch.equal(unturned[1], plain[1]) and not torch.equal(unturned[0], plain[0])


@on_every_backend
def test_an_infinite_channel_of_an_unturned_token_stays_alone(backend):
    query, key = heads(device=device_of(backend))
    query[0, 0, 0, 3] = math.inf
    found = qk_norm_rope(query, key, **turn(query.device, 2), rotate_from=1, kind="none", backend=backend)
    assert torch.equal(found[0][:, 0], query[:, 0])


@on_every_backend
def test_heads_viewed_as_one_take_a_table_of_all_channels(backend):
    query, key = heads(device=device_of(backend))
    cos, sin = turn(query.device)["cos"], turn(query.device)["sin"]
    one = [x.view(B, N, 1, H * K) for x in (query, key)]
    wide = qk_norm_rope(*one, cos=cos.repeat(1, H), sin=sin.repeat(1, H), kind="none", backend=backend)
    apart = qk_norm_rope(query, key, cos=cos, sin=sin, kind="none", backend=backend)
    assert same([x.view(B, N, H, K) for x in wide], apart)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_layer_norm_is_as_exact_as_that_of_torch_however_large_the_mean(mean):
    query, key = heads()
    query += mean
    exact = functional.layer_norm(query.double(), (K,), eps=1e-6)
    theirs = functional.layer_norm(query, (K,), eps=1e-6)
    ours = qk_norm_rope(query, key, kind="layer")[0]
    assert spec.error_of(ours, exact) <= 2.0 * spec.error_of(theirs, exact) + 2.0**-24


# --- layouts -------------------------------------------------------------------------------------------------------


@on_fast_backends
@every_dtype
@pytest.mark.parametrize("pairs", ["interleaved", "half"])
def test_bits_do_not_depend_on_where_heads_lie(backend, dtype, pairs):
    query, key = heads(dtype, device_of(backend))
    options = {**turn(query.device, pairs=pairs), "backend": backend}
    want = qk_norm_rope(query, key, **options)
    assert all(x.is_contiguous() for x in want)
    for layout in (fused, permuted):
        assert same(qk_norm_rope(*layout(query, key), **options), want)
    longer = [torch.zeros(B, N + 2, H, K + 4, dtype=dtype, device=query.device) for _ in range(2)]
    out = tuple(x[:, 2:, :, :K] for x in longer)
    assert qk_norm_rope(query, key, out=out, **options) is out and same(out, want)
    assert not any(x[:, :2].any() or x[..., K:].any() for x in longer)
    assert same(qk_norm_rope(query, key, out=(query, key), **options), want) and same((query, key), want)


@on_fast_backends
def test_tables_by_sample_and_shared_ones_give_the_same_bits(backend):
    query, key = heads(device=device_of(backend))
    cos, sin = turn(query.device)["cos"], turn(query.device)["sin"]
    want = qk_norm_rope(query, key, cos=cos, sin=sin, backend=backend)
    for batch in (1, B):
        by_sample = {"cos": cos.expand(batch, N, K), "sin": sin.expand(batch, N, K).clone()}
        assert same(qk_norm_rope(query, key, **by_sample, backend=backend), want)


@pytest.mark.backend("cpu")
@every_dtype
def test_bits_do_not_depend_on_the_threads(dtype):
    query, key = heads(dtype, shape=(1, 513, 24, 64))  # enough work for several
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(qk_norm_rope(query, key))
    finally:
        torch.set_num_threads(before)
    assert all(same(found[0], other) for other in found[1:])


# --- arguments -----------------------------------------------------------------------------------------------------

X, W, C = torch.zeros(2, 3, 4, 6), torch.ones(6), torch.zeros(3, 6)
REFUSED = [
    ({"query": X.half(), "key": X.half()}, DtypeError, "query is float16"),
    ({"query": X[0]}, ShapeError, r"query has shape \(3, 4, 6\), needs \[B, N, H, K\]"),
    ({"key": X.double()}, DtypeError, "key is float64, needs float32"),
    ({"key": X[:1]}, ShapeError, r"needs \[2, M, H2, 6\] beside query"),
    ({"key": X[..., :4]}, ShapeError, r"needs \[2, M, H2, 6\] beside query"),
    ({"key": X.transpose(2, 3).contiguous().transpose(2, 3)}, ShapeError, "key has stride 4 along its last axis"),
    ({"key": X.to("meta")}, ArgumentError, "key is on meta"),
    ({"kind": "l2"}, ArgumentError, "kind is 'l2'"),
    ({"pairs": "thirds"}, ArgumentError, "pairs is 'thirds'"),
    ({"eps": -1.0}, ArgumentError, "eps is -1.0"),
    ({"eps": math.nan}, ArgumentError, "eps is nan"),
    ({"query_weight": W[:5]}, ShapeError, r"query_weight has shape \(5,\), needs \[6\] or \[24\]"),
    ({"key_bias": W.half()}, DtypeError, "key_bias is float16"),
    ({"query_weight": W, "query_bias": torch.ones(24)}, ShapeError, r"shapes \(6,\) and \(24,\)"),
    ({"query_weight": W, "kind": "none"}, ArgumentError, "weight or bias of query is given with kind 'none'"),
    ({"cos": C}, ArgumentError, "one of them is None"),
    ({"cos": C, "sin": C[:2]}, ShapeError, r"cos has shape \(3, 6\), sin \(2, 6\)"),
    ({"cos": C[:, :3], "sin": C[:, :3]}, ShapeError, r"needs \[R, 6\] or \[2, R, 6\]"),
    ({"cos": C.bfloat16(), "sin": C.bfloat16()}, DtypeError, "cos is bfloat16, needs float32"),
    ({"cos": C, "sin": C, "rotate_from": 1}, ShapeError, "3 rows for the tokens from 1 on, there are 3"),
    ({"cos": C, "sin": C, "rotate_from": -1}, ShapeError, "from -1 on"),
    ({"cos": C, "sin": C, "key": X[:, :2]}, ShapeError, "there are 2 tokens"),
    ({"out": (X, X[:, :2])}, ShapeError, r"out\[1\] has shape"),
    ({"out": (X.double(), X)}, DtypeError, r"out\[0\] is float64"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=f"qk_norm_rope: .*{words}"):
        qk_norm_rope(**({"query": X, "key": X} | change))


def test_an_odd_head_cannot_be_turned():
    with pytest.raises(ShapeError, match="heads of 5 channels cannot be turned"):
        qk_norm_rope(X[..., :5], X[..., :5], cos=C[:, :5], sin=C[:, :5])


@pytest.mark.backend("cpu")
def test_float64_runs_in_the_reference_and_is_refused_by_name_elsewhere():
    query, key = (x.double() for x in heads())
    assert same(qk_norm_rope(query, key, **turn()), qk_norm_rope(query, key, **turn(), backend="reference"))
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        qk_norm_rope(query, key, backend="cpu")
