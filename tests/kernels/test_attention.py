"""Attention: as exact as torch's at every width, one set of bits for a row, layouts, and what is refused."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.attention import SPEC, attention
from vivace.kernels.attention.cases import fused, permuted

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_the_cpu = pytest.mark.backend("cpu")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def heads(batch, queries, keys, count, width, *, dtype=torch.float32, seed=3, backend="cpu"):
    """Normals [B, N, H, K], [B, M, H, K], [B, M, H, K], where the backend takes them."""
    generator, device = torch.Generator().manual_seed(seed), device_of(backend)
    tokens = (queries, keys, keys)
    return tuple(torch.randn(batch, n, count, width, generator=generator).to(device, dtype) for n in tokens)


def of_torch(query, key, value, **options):
    sides = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*sides, **options).transpose(1, 2)


# --- numbers -------------------------------------------------------------------------------------------------------


def test_the_definition_is_that_of_torch():
    inputs = [tensor.double() for tensor in heads(2, 5, 9, 3, 7)]
    torch.testing.assert_close(attention(*inputs), of_torch(*inputs), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(attention(*inputs, scale=0.3), of_torch(*inputs, scale=0.3), rtol=1e-12, atol=1e-14)


@on_the_cpu
@every_dtype
@pytest.mark.parametrize("width", [1, 8, 24, 32, 40, 64, 72, 80, 96, 128, 160, 256])
def test_it_is_as_exact_as_that_of_torch_in_the_same_dtype(width, dtype):
    for queries, keys, seed in ((33, 40, 1), (7, 300, 2), (50, 77, 3)):
        inputs = heads(1, queries, keys, 2, width, dtype=dtype, seed=seed)
        exact = attention(*(tensor.double() for tensor in inputs))
        holds, error, bound = spec.within_tolerance(attention(*inputs, backend="cpu"), of_torch(*inputs), exact)
        assert holds, f"{queries} queries, {keys} keys: {error:.3g} exceeds {bound:.3g}"


@on_the_cpu
@every_dtype
def test_long_sequences_stay_as_exact(dtype):
    inputs = heads(1, 40, 2500, 1, 64, dtype=dtype)
    exact = attention(*(tensor.double() for tensor in inputs))
    assert spec.within_tolerance(attention(*inputs, backend="cpu"), of_torch(*inputs), exact)[0]


@on_every_backend
@every_dtype
def test_large_scores_do_not_overflow(backend, dtype):
    query, key, value = heads(1, 4, 70, 1, 16, dtype=dtype, backend=backend)
    result = attention(1e4 * query, 1e4 * key, value, backend=backend)
    best = (query.double()[0, :, 0] @ key.double()[0, :, 0].T).argmax(dim=-1)  # it has all the weight
    assert torch.equal(result[0, :, 0], value[0, best, 0])


@on_every_backend
@every_dtype
def test_equal_scores_give_the_mean_and_no_keys_give_zero(backend, dtype):
    query, key, value = heads(2, 3, 64, 2, 24, dtype=dtype, backend=backend)
    value[:] = torch.arange(64.0).view(64, 1, 1)
    assert torch.equal(attention(torch.zeros_like(query), key, value, backend=backend), torch.full_like(query, 31.5))
    out = torch.full_like(query, math.nan)
    attention(query, key[:, :0], value[:, :0], out=out, backend=backend)
    assert torch.equal(out, torch.zeros_like(query))


# --- bits ----------------------------------------------------------------------------------------------------------


@on_the_cpu
@every_dtype
def test_a_row_has_the_same_bits_alone_and_among_others(dtype):
    query, key, value = heads(3, 300, 130, 4, 40, dtype=dtype)
    all_rows = attention(query, key, value)
    for b, n, h in ((0, 0, 0), (2, 299, 3), (1, 121, 2)):
        alone = attention(query[b : b + 1, n : n + 1, h : h + 1], *(x[b : b + 1, :, h : h + 1] for x in (key, value)))
        assert torch.equal(alone[0, 0, 0], all_rows[b, n, h])
    few = torch.cat((query[:, 20:27], query[:, :2]), dim=1)
    assert torch.equal(attention(few, key, value)[:, :7], all_rows[:, 20:27])


@on_the_cpu
@every_dtype
def test_bits_do_not_depend_on_the_threads(dtype):
    inputs = heads(2, 250, 250, 6, 64, dtype=dtype)  # enough work for several
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attention(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@on_the_cpu
@every_dtype
def test_bits_do_not_depend_on_the_layout(dtype):
    inputs = heads(2, 30, 30, 3, 72, dtype=dtype)
    want = attention(*inputs)
    for arranged in (fused(*inputs), permuted(*inputs)):
        out = torch.full((2, 3, 31, 75), math.nan, dtype=dtype)
        place = out[:, :, 1:, 3:].transpose(1, 2)
        assert attention(*arranged, out=place) is place and torch.equal(place, want)
        assert out[:, :, :1].isnan().all() and out[:, :, :, :3].isnan().all()


@on_every_backend
def test_a_result_may_take_the_place_of_the_queries(backend):
    query, key, value = heads(1, 200, 600, 1, 128, backend=backend)  # several blocks of keys
    want = attention(query, key, value, backend=backend)
    assert attention(query, key, value, out=query, backend=backend) is query and torch.equal(query, want)


@on_every_backend
@every_dtype
@pytest.mark.parametrize("width", [24, 72])
def test_kept_keys_have_the_bits_of_a_copy_of_them(backend, dtype, width):
    """Rows [K | V] of five lanes, of which three samples read two; fewer queries than keys."""
    query, kept, _ = heads(5, 9, 40, 4, width, dtype=dtype, backend=backend)
    query, (key, value) = query[:3, :, :2], kept.unflatten(2, (2, 2)).unbind(2)
    lanes = torch.tensor([4, 1, 4], device=query.device)
    found = attention(query, key, value, lanes=lanes, backend=backend)
    assert torch.equal(found, attention(query, key[lanes], value[lanes], backend=backend))


# --- arguments -----------------------------------------------------------------------------------------------------

X, KV = torch.zeros(2, 3, 4, 6), torch.zeros(2, 5, 4, 6)
REFUSED = [
    ((X.int(), KV, KV), {}, DtypeError, "query is int32, needs float32 or bfloat16"),
    ((X[0], KV, KV), {}, ShapeError, r"query has shape \(3, 4, 6\), needs \[B, N, H, K\]"),
    ((X, KV[:1], KV), {}, ShapeError, r"key has shape \(1, 5, 4, 6\), needs \[2, M, 4, 6\]"),
    ((X, KV[:, :, :2], KV), {}, ShapeError, r"key has shape \(2, 5, 2, 6\)"),
    ((X, KV[0], KV), {}, ShapeError, r"key has shape \(5, 4, 6\)"),
    ((X, KV, KV[:, 1:]), {}, ShapeError, r"value has shape \(2, 4, 4, 6\), needs \(2, 5, 4, 6\) as key"),
    ((X, KV.double(), KV), {}, DtypeError, "key is float64, needs float32 as query"),
    ((X, KV, KV.bfloat16()), {}, DtypeError, "value is bfloat16, needs float32 as query"),
    ((X, KV, KV.to("meta")), {}, ArgumentError, "value is on meta, query on cpu"),
    ((X.transpose(2, 3).contiguous().transpose(2, 3), KV, KV), {}, ShapeError, "query has stride 4 along its last"),
    ((X, KV, KV), {"scale": 0.0}, ArgumentError, "scale is 0.0, needs a finite number above 0"),
    ((X, KV, KV), {"scale": -1.0}, ArgumentError, "scale is -1.0"),
    ((X, KV, KV), {"scale": math.nan}, ArgumentError, "scale is nan"),
    ((X, KV, KV), {"out": KV}, ShapeError, r"out has shape \(2, 5, 4, 6\), needs \(2, 3, 4, 6\) as query"),
    ((X, KV, KV), {"out": X.double()}, DtypeError, "out is float64, needs float32"),
    ((X, KV, KV), {"lanes": torch.tensor([0, 2])}, ArgumentError, r"lanes \[0, 2\] leave the 2 that kept has"),
    ((X, KV, KV), {"lanes": torch.tensor([0])}, ShapeError, "1 lanes for 2 rows of query"),
    ((X, KV, KV), {"lanes": torch.zeros(2)}, DtypeError, "lanes are float32, need int64"),
    ((X, KV[..., :2, :], KV), {"lanes": torch.tensor([0, 1])}, ShapeError, r"needs \[L, M, 4, 6\]"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(args, kwargs, error, words):
    with pytest.raises(error, match=f"attention: .*{words}"):
        attention(*args, **kwargs)


@on_the_cpu
def test_float64_runs_in_the_reference_and_is_refused_by_name_elsewhere():
    inputs = [tensor.double() for tensor in heads(1, 2, 3, 1, 4)]
    assert torch.equal(attention(*inputs), attention(*inputs, backend="reference"))
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        attention(*inputs, backend="cpu")


def test_float16_is_for_gpus_and_the_reference():
    inputs = [tensor.half() for tensor in heads(1, 2, 3, 1, 4)]
    assert attention(*inputs, backend="reference").dtype == torch.float16
    with pytest.raises(BackendError, match="float16 runs on the reference"):
        attention(*inputs, backend="cpu")
