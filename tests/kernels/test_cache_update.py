"""Kept planes: the same bits from every backend, what stays as it was, the sum of the residual, and what is refused."""

import math

import pytest
import torch

from vivace.engine.caching import plane_weights
from vivace.engine.forecast import forecast_weights, stored_gain
from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.cache_apply import cache_apply
from vivace.kernels.cache_update import SPEC, cache_update
from vivace.kernels.cache_update.cases import STORES
from vivace.kernels.gated_residual import gated_residual
from vivace.kernels.linear import linear, pack_weight
from vivace.kernels.quantize_tokens import quantize_tokens

# Triton's interpreter cuts bfloat16 off where devices round.
DTYPES = ("float32",) if spec.interpreted() else ("float32", "bfloat16")
CASES = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for case in SPEC.cases()
    for dtype in DTYPES
    if dtype in case.dtypes and not (spec.interpreted() and "bfloat16" in case.name)
]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
SHAPE = (2, 3, 200)
ALL_STORES = ("float32", *STORES)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def memory(backend, store="float32", planes=3, shape=SHAPE):
    """kept and lanes, and scales of int8 as an option."""
    device = device_of(backend)
    kept = torch.zeros((5, planes, *shape[1:]), dtype=getattr(torch, store), device=device)
    options = {"scales": torch.ones(kept.shape[:-1], device=device)} if store == "int8" else {}
    return kept, torch.tensor([4, 1], device=device), options


def value(kept, lane, j, options):
    """Plane j of a lane, as float32."""
    plane = kept[lane, j].float().clone()
    return plane * options["scales"][lane, j][..., None] if options else plane


def chosen(backend, rows, count, of):
    """ids int32 [rows, count]: ascending, other ones in each row."""
    g = torch.Generator().manual_seed(2)
    drawn = [torch.randperm(of, generator=g)[:count].sort().values for _ in range(rows)]
    return torch.stack(drawn).int().to(device_of(backend))


@on_every_backend
@pytest.mark.parametrize("store", ALL_STORES)
def test_some_tokens_have_the_bits_of_all_and_the_others_stay(backend, store):
    """Rows 0 and 1 are two samples in one branch, 2 and 3 in another: a sample has the same ids in both."""
    device = device_of(backend)
    kept, _, options = memory(backend, store, shape=(4, 7, 200))
    lanes, ids = torch.tensor([4, 1, 0, 3], device=device), chosen(backend, 2, 3, 7)
    every, spread = ids.repeat(2, 1).long(), torch.arange(4, device=device)[:, None]
    g = torch.Generator().manual_seed(1)
    first, second = (torch.randn(4, 7, 200, generator=g).to(device) for _ in range(2))
    cache_update(kept, lanes, first, backend=backend, **options)
    whole, beside = kept.clone(), {name: part.clone() for name, part in options.items()}
    before = {lane: [value(kept, lane, j, options) for j in range(2)] for lane in lanes.tolist()}
    cache_update(whole, lanes, second, made=1, backend=backend, **beside)
    cache_update(kept, lanes, second[spread, every].contiguous(), made=1, ids=ids, backend=backend, **options)
    weights = torch.tensor([[1.0, 0.5]] * 4, device=device)
    given = cache_apply(kept, lanes, weights, ids=ids, backend=backend, **options)
    wanted = cache_apply(whole, lanes, weights, backend=backend, **beside)[spread, every]
    assert torch.equal(given, wanted)
    for row, lane in enumerate(lanes.tolist()):
        others = torch.ones(7, dtype=torch.bool, device=device)
        others[every[row]] = False
        for j in range(2):
            now = value(kept, lane, j, options)
            assert torch.equal(now[others], before[lane][j][others])
            assert torch.equal(now[~others], value(whole, lane, j, beside)[~others])


def test_ids_that_do_not_fit_are_refused():
    kept, lanes, _ = memory("reference")
    fresh = torch.zeros(2, 2, 200)
    ids = chosen("reference", 2, 2, 3)
    cache_update(kept, lanes, fresh, ids=ids)
    for bad, error, said in (
        (ids.long(), DtypeError, "ids are int64, need int32"),
        (ids.repeat(2, 1)[:3], ShapeError, "2 lanes, a multiple of n"),
        (ids[0], ShapeError, "ids have shape"),
        (ids + 2, ArgumentError, "leave the 3 tokens kept"),
        (ids - 1, ArgumentError, "leave the 3 tokens kept"),
        (ids[:, :1].contiguous(), ShapeError, "fresh has shape"),
    ):
        with pytest.raises(error, match=said):
            cache_update(kept, lanes, fresh, ids=bad)
        with pytest.raises(error, match=said.replace("fresh", "hidden")):
            cache_apply(kept, lanes, torch.ones(2, 1), hidden=fresh, ids=bad)


def bits(tensor):
    """As integers, NaN all alike."""
    wide = tensor.cpu().double()
    return wide.nan_to_num(12345.0, posinf=1e300, neginf=-1e300), torch.signbit(wide) & ~wide.isnan()


@on_every_backend
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_every_backend_has_the_bits_of_the_definition(backend, case, dtype):
    here, there = case.make(dtype, device_of(backend)), case.make(dtype, "cpu")
    cache_update(*here.args, **here.kwargs, backend=backend)
    cache_update(*there.args, **there.kwargs, backend="reference")
    for found, expected in zip(here.writes, there.writes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(bits(found), bits(expected), strict=True))


@on_every_backend
@pytest.mark.parametrize("store", ALL_STORES)
@pytest.mark.parametrize("gated", [False, True])
def test_the_sum_is_the_gated_residual_of_what_was_computed_whatever_is_kept(backend, store, gated):
    device = device_of(backend)
    fresh, hidden = (torch.randn(SHAPE, device=device) for _ in range(2))
    gate = torch.randn(2, 1, 200, device=device) if gated else None
    kept, lanes, options = memory(backend, store)
    expected = gated_residual(hidden, fresh, gate, backend=backend)
    found = cache_update(kept, lanes, fresh, hidden=hidden, gate=gate, made=1, backend=backend, **options)
    assert torch.equal(found, expected)
    assert cache_update(kept, lanes, fresh, hidden=hidden, gate=gate, out=hidden, backend=backend, **options) is hidden
    assert torch.equal(hidden, expected)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_in_two_steps_has_the_bits_of_its_epilogue(dtype):
    x, hidden = (torch.randn(SHAPE).to(dtype) for _ in range(2))
    gate, bias = torch.randn(2, 1, 200), torch.randn(200)
    weight = pack_weight((torch.randn(200, 200) / 14.0).to(dtype))
    whole = linear(x, weight, bias, gate=gate, residual=hidden, backend="cpu")
    fresh = linear(x, weight, bias, out_dtype=torch.float32, backend="cpu")
    kept, lanes, _ = memory("cpu")
    assert torch.equal(cache_update(kept, lanes, fresh, hidden=hidden, gate=gate, backend="cpu"), whole)
    assert torch.equal(cache_apply(kept, lanes, torch.ones(2, 1), hidden=hidden, gate=gate, backend="cpu"), whole)


@on_every_backend
def test_differences_of_whole_numbers_are_exact_and_planes_beyond_them_stay(backend):
    device = device_of(backend)
    kept, lanes, _ = memory(backend, planes=4)
    kept.fill_(-1.0)
    f = [torch.randint(-99, 99, SHAPE, device=device).float() for _ in range(3)]
    for made, fresh in enumerate(f):
        assert cache_update(kept, lanes, fresh, made=made, backend=backend) is None
    expected = (f[2], f[2] - f[1], f[2] - 2.0 * f[1] + f[0])
    for j, plane in enumerate(expected):
        assert torch.equal(kept[lanes, j], plane)
    assert torch.equal(kept[lanes, 3], torch.full(SHAPE, -1.0, device=device))
    assert torch.equal(kept[[0, 2, 3]], torch.full((3, 4, *SHAPE[1:]), -1.0, device=device))


@on_every_backend
@pytest.mark.parametrize("store", ALL_STORES)
def test_differences_are_those_of_the_new_value_itself_to_the_old_one_as_it_is_stored(backend, store):
    if spec.interpreted() and store == "bfloat16":
        return  # cut off there, see above
    device = device_of(backend)
    kept, lanes, options = memory(backend, store)
    first, second = (torch.randn(SHAPE, device=device) for _ in range(2))
    cache_update(kept, lanes, first, backend=backend, **options)
    old = [value(kept, lane, 0, options) for lane in lanes.tolist()]
    cache_update(kept, lanes, second, made=1, backend=backend, **options)
    apart = memory(backend, store)
    cache_update(apart[0], lanes, second, backend=backend, **apart[2])
    for new, lane, before in zip(second, lanes.tolist(), old, strict=True):
        newest = value(kept, lane, 0, options)
        assert torch.equal(newest, value(apart[0], lane, 0, apart[2]))
        again = memory(backend, store)
        one = (new - before)[None]
        cache_update(again[0], lanes[:1], one, backend=backend, **again[2])
        assert torch.equal(value(kept, lane, 1, options), value(again[0], int(lanes[0]), 0, again[2]))


@pytest.mark.parametrize("store", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(("order", "k"), [(0, 1), (1, 1), (1, 3), (2, 1), (2, 2)])
def test_forecasts_multiply_the_variance_of_rounding_as_planners_reckon(store, order, k):
    torch.manual_seed(order)
    shape, part = (1, 500, 384), 0.03  # of a value that is new each time: what its difference is rounded by is part^2
    kept, options = torch.zeros(1, 3, *shape[1:], dtype=getattr(torch, store)), {}
    if store == "int8":
        options["scales"] = torch.ones(kept.shape[:-1])
    lanes, values = torch.zeros(1, dtype=torch.int64), [torch.randn(shape)]
    values += [values[0] + part * torch.randn(shape) for _ in range(2)]
    for made, fresh in enumerate(values):
        cache_update(kept, lanes, fresh, made=made, **options)
    weights = forecast_weights(order, k)
    planes = torch.tensor([plane_weights(weights)])
    found = cache_apply(kept, lanes, planes, **options).double()
    exact = sum(w * value.double() for w, value in zip(weights, reversed(values), strict=False))
    one = (value(kept, 0, 0, options).double() - values[-1]).square().mean()
    ratio = float((found - exact).square().mean() / one) / stored_gain(weights)
    differences = sum(float(weight) ** 2 * math.comb(2 * j, j) for j, weight in enumerate(planes[0]) if j)
    count = values[0].numel()
    assert abs(ratio - 1.0) < 10 * math.sqrt(2 / count) + part**2 * differences  # five deviations of each variance


@on_every_backend
def test_integers_and_scales_are_those_of_quantize_tokens(backend):
    kept, lanes, options = memory(backend, "int8")
    fresh = torch.randn(SHAPE, device=device_of(backend))
    cache_update(kept, lanes, fresh, backend=backend, **options)
    q, scale = quantize_tokens(fresh, backend=backend)
    assert torch.equal(kept[lanes, 0], q) and torch.equal(options["scales"][lanes, 0], scale)


@on_every_backend
def test_every_number_of_e4m3_is_kept_and_its_neighbours_are_rounded_to_even(backend):
    device = device_of(backend)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ends = torch.tensor([464.0, 465.0, 1e9, -448.5, 2.0**-10, 2.0**-10 * 1.0001, -(2.0**-11), 3e-45, 0.0, -0.0])
    tried = [numbers, ends]  # and ties, and what lies next to them
    tie = (numbers[:126] + numbers[1:127]) / 2.0
    tried += [tie, torch.nextafter(tie, torch.tensor(0.0)), torch.nextafter(tie, torch.tensor(900.0))]
    fresh = torch.cat(tried).to(device)[None, None]
    kept = torch.zeros(1, 1, *fresh.shape[1:], device=device, dtype=torch.float8_e4m3fn)
    lanes = torch.zeros(1, dtype=torch.int64, device=device)
    cache_update(kept, lanes, fresh, backend=backend)
    expected = fresh.cpu().clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
    found = cache_apply(kept, lanes, torch.ones(1, 1, device=device), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(bits(found), bits(expected), strict=True))


@on_every_backend
@pytest.mark.parametrize("shape", [(2, 200), (2, 3, 4, 200)])
@pytest.mark.parametrize("store", ["float32", "int8"])
def test_other_ranks_are_samples_tokens_and_elements(backend, shape, store):
    kept, lanes, options = memory(backend, store, shape=shape)
    fresh, hidden = (torch.randn(shape, device=device_of(backend)) for _ in range(2))
    gate = torch.randn(200, device=device_of(backend))
    found = cache_update(kept, lanes, fresh, hidden=hidden, gate=gate, backend=backend, **options)
    assert torch.equal(found, hidden + gate * fresh)
    assert cache_update(kept, lanes, fresh, hidden=hidden, gate=gate, out=hidden, backend=backend, **options) is hidden
    assert torch.equal(hidden, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_float16_and_float64_run_on_the_reference(dtype):
    kept, lanes, _ = memory("cpu")
    fresh = torch.randn(SHAPE).to(dtype)
    kept = kept.to(torch.float64) if dtype == torch.float64 else kept
    found = cache_update(kept, lanes, fresh, hidden=fresh)
    assert found.dtype == dtype and torch.equal(kept[lanes, 0].to(dtype), fresh)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("store", ["float32", "int8"])
def test_bits_do_not_depend_on_the_threads(store):
    shape = (2, 700, 2050)  # enough work for several
    fresh, hidden = torch.randn(shape), torch.randn(shape)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            kept, lanes, options = memory("cpu", store, shape=shape)
            results.append((kept, cache_update(kept, lanes, fresh, hidden=hidden, made=2, **options)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


REFUSED = {
    r"kept is int64, needs one of": {"kept": torch.zeros(5, 3, 3, 200, dtype=torch.int64)},
    r"kept has shape \(3, 200\), needs \[L, P, \.\.\., W\]": {"kept": torch.zeros(3, 200)},
    r"in one piece, P of 1": {"kept": torch.zeros(5, 3, 3, 400)[..., ::2]},
    r"kept is int8: scales are for": {"kept": torch.zeros(5, 3, 3, 200, dtype=torch.int8)},
    r"kept is float32: scales are for": {"scales": torch.zeros(5, 3, 3)},
    r"scales have shape \(5, 3\)": {
        "kept": torch.zeros(5, 3, 3, 200, dtype=torch.int8),
        "scales": torch.zeros(5, 3),
    },
    r"kept is float64, beside rows of float32": {"kept": torch.zeros(5, 3, 3, 200, dtype=torch.float64)},
    r"lanes have shape \(\), need": {"lanes": torch.tensor(1)},
    r"lanes are int32, need int64": {"lanes": torch.tensor([1, 2], dtype=torch.int32)},
    r"lanes \[1, 5\] leave the 5": {"lanes": torch.tensor([1, 5])},
    r"lanes \[-1, 2\] leave the 5": {"lanes": torch.tensor([-1, 2])},
    r"lanes \[2, 2\] hold one twice": {"lanes": torch.tensor([2, 2])},
    r"fresh has shape \(2, 3, 200\), needs \(1, 3, 200\)": {"lanes": torch.tensor([2])},
    r"fresh is int64": {"fresh": torch.zeros(SHAPE, dtype=torch.int64)},
    r"fresh is on meta": {"fresh": torch.zeros(SHAPE, device="meta")},
    r"fresh has stride 2": {"fresh": torch.zeros(2, 3, 400)[..., ::2]},
    r"base has shape \(2, 3, 100\)": {"base": torch.zeros(2, 3, 100)},
    r"base is bfloat16, needs float32": {"base": torch.zeros(SHAPE, dtype=torch.bfloat16)},
    r"made is 3, needs 0 to 2": {"made": 3},
    r"made is -1": {"made": -1},
    r"gate and out are for a sum": {"gate": torch.zeros(200)},
    r"hidden has shape \(3, 200\)": {"hidden": torch.zeros(3, 200)},
    r"gate has shape \(100,\)": {"hidden": torch.zeros(SHAPE), "gate": torch.zeros(100)},
    r"out is bfloat16, needs float32": {
        "hidden": torch.zeros(SHAPE),
        "out": torch.zeros(SHAPE, dtype=torch.bfloat16),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_illegal_calls_are_refused(message):
    arguments = {"kept": torch.zeros(5, 3, 3, 200), "lanes": torch.tensor([4, 1]), "fresh": torch.zeros(SHAPE)}
    with pytest.raises((ShapeError, DtypeError, ArgumentError), match="^cache_update: .*" + message):
        cache_update(**(arguments | REFUSED[message]))
