"""Kept planes read again: the same bits from every backend, reuse that is exact, and what is refused."""

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.cache_apply import SPEC, cache_apply
from vivace.kernels.cache_update import cache_update
from vivace.kernels.gated_residual import gated_residual

# Triton's interpreter cuts bfloat16 off where devices round.
DTYPES = ("float32",) if spec.interpreted() else ("float32", "bfloat16")
CASES = [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case in SPEC.cases() for dtype in DTYPES]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
SHAPE = (2, 3, 200)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def memory(backend, planes=3, shape=SHAPE):
    """kept, of unit normals, and lanes."""
    kept = torch.randn((5, planes, *shape[1:]), generator=torch.Generator().manual_seed(3))
    return kept.to(device_of(backend)), torch.tensor([4, 1], device=device_of(backend))


@on_every_backend
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_every_backend_has_the_bits_of_the_definition(backend, case, dtype):
    here, there = case.make(dtype, device_of(backend)), case.make(dtype, "cpu")
    found = cache_apply(*here.args, **here.kwargs, backend=backend).cpu()
    expected = cache_apply(*there.args, **there.kwargs, backend="reference")
    assert found.dtype == expected.dtype
    assert torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5))
    assert torch.equal(found.isnan(), expected.isnan())


@on_every_backend
@pytest.mark.parametrize("gated", [False, True])
def test_a_plane_of_weight_one_is_added_as_what_was_computed(backend, gated):
    device = device_of(backend)
    fresh, hidden = (torch.randn(SHAPE, device=device) for _ in range(2))
    gate = torch.randn(2, 1, 200, device=device) if gated else None
    kept, lanes = memory(backend)
    computed = cache_update(kept, lanes, fresh, hidden=hidden, gate=gate, backend=backend)
    ones = torch.ones(2, 1, device=device)
    reused = cache_apply(kept, lanes, ones, hidden=hidden, gate=gate, backend=backend)
    assert torch.equal(reused, computed)
    assert torch.equal(reused, gated_residual(hidden, fresh, gate, backend=backend))
    assert torch.equal(cache_apply(kept, lanes, ones, backend=backend), fresh)


@on_every_backend
def test_planes_are_summed_in_order_each_product_rounded(backend):
    kept, lanes = memory(backend)
    weights = torch.randn(2, 3).to(kept.device)
    v = weights[:, 0, None, None] * kept[lanes, 0]
    for j in (1, 2):
        v = v + weights[:, j, None, None] * kept[lanes, j]
    assert torch.equal(cache_apply(kept, lanes, weights, backend=backend), v)


@on_every_backend
def test_a_quadratic_is_forecast_without_error(backend):
    device = device_of(backend)
    kept, lanes = memory(backend)
    at = [torch.full(SHAPE, 3.0 * t * t - 2.0 * t + 1.0, device=device) for t in range(5)]
    for t in range(3):
        cache_update(kept, lanes, at[t], made=t, backend=backend)
    for ahead, weights in ((1, (1.0, 1.0, 1.0)), (2, (1.0, 2.0, 3.0))):  # 1, k, k (k + 1) / 2
        row = torch.tensor([weights] * 2, device=device)
        assert torch.equal(cache_apply(kept, lanes, row, backend=backend), at[2 + ahead])


@on_every_backend
def test_a_result_may_take_the_place_of_hidden(backend):
    kept, lanes = memory(backend)
    hidden, weights = torch.randn(SHAPE, device=kept.device), torch.randn(2, 2).to(kept.device)
    apart = cache_apply(kept, lanes, weights, hidden=hidden, backend=backend)
    assert cache_apply(kept, lanes, weights, hidden=hidden, out=hidden, backend=backend) is hidden
    assert torch.equal(apart, hidden)


@on_every_backend
@pytest.mark.parametrize("shape", [(2, 200), (2, 3, 4, 200)])
def test_other_ranks_are_samples_tokens_and_elements(backend, shape):
    kept, lanes = memory(backend, shape=shape)
    hidden, gate = torch.randn(shape, device=kept.device), torch.randn(200, device=kept.device)
    ones = torch.ones(2, 1, device=kept.device)
    found = cache_apply(kept, lanes, ones, hidden=hidden, gate=gate, backend=backend)
    assert torch.equal(found, hidden + gate * kept[lanes, 0])
    assert torch.equal(cache_apply(kept, lanes, ones, backend=backend), kept[lanes, 0])
    assert cache_apply(kept, lanes, ones, hidden=hidden, gate=gate, out=hidden, backend=backend) is hidden
    assert torch.equal(hidden, found)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_alone_takes_the_dtype_asked_for_or_that_of_out(backend, dtype):
    kept, lanes = memory(backend)
    kept = (kept * 4.0).round() / 4.0  # the same in both
    ones, out = torch.ones(2, 1, device=kept.device), torch.empty(SHAPE, dtype=dtype, device=kept.device)
    found = cache_apply(kept, lanes, ones, dtype=dtype, backend=backend)
    assert found.dtype == dtype and torch.equal(found, kept[lanes, 0].to(dtype))
    assert cache_apply(kept, lanes, ones, out=out, backend=backend) is out
    assert torch.equal(out, found)


@pytest.mark.backend("cpu")
def test_bits_do_not_depend_on_the_threads():
    kept, lanes = memory("cpu", shape=(2, 700, 2050))  # enough work for several
    weights, threads, results = torch.randn(2, 3), torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(cache_apply(kept, lanes, weights))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


DOUBLE = torch.zeros(2, 1, dtype=torch.float64)
REFUSED = {
    r"kept is int64, needs one of": {"kept": torch.zeros(5, 3, 3, 200, dtype=torch.int64)},
    r"kept is int8: scales are for": {"kept": torch.zeros(5, 3, 3, 200, dtype=torch.int8)},
    r"lanes \[1, 5\] leave the 5": {"lanes": torch.tensor([1, 5])},
    r"weights have shape \(2, 4\), need \[2, 1 to 3\]": {"weights": torch.zeros(2, 4)},
    r"weights have shape \(2, 0\)": {"weights": torch.zeros(2, 0)},
    r"weights have shape \(3, 1\)": {"weights": torch.zeros(3, 1)},
    r"weights are int64": {"weights": torch.zeros(2, 1, dtype=torch.int64)},
    r"weights is on meta": {"weights": torch.zeros(2, 1, device="meta")},
    r"hidden has shape \(2, 3, 100\)": {"hidden": torch.zeros(2, 3, 100)},
    r"gate is for a sum": {"gate": torch.zeros(200)},
    r"gate has shape \(100,\)": {"hidden": torch.zeros(SHAPE), "gate": torch.zeros(100)},
    r"hidden float32, dtype bfloat16 beside": {"hidden": torch.zeros(SHAPE), "dtype": torch.bfloat16},
    r"out is int8, needs float32": {"dtype": torch.int8},
    r"dtype float64 beside kept float32": {"dtype": torch.float64},
    r"hidden float32 beside kept float32, weights float64": {"hidden": torch.zeros(SHAPE), "weights": DOUBLE},
    r"out has shape \(3, 200\)": {"out": torch.zeros(3, 200)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_illegal_calls_are_refused(message):
    arguments = {"kept": torch.zeros(5, 3, 3, 200), "lanes": torch.tensor([4, 1]), "weights": torch.zeros(2, 1)}
    with pytest.raises((ShapeError, DtypeError, ArgumentError), match="^cache_apply: .*" + message):
        cache_apply(**(arguments | REFUSED[message]))
