"""Reductions over a sample: the quantile of torch, its awkward inputs, deviations, and what is refused."""

import math

import numpy as np
import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.sample_adjust import SPEC, sample_adjust
from vivace.kernels.sample_adjust.cases import rescale_row
from vivace.kernels.sample_adjust.reference import TORCH_LIMIT, quantile
from vivace.kernels.solver_step import Output, Reduction, build_table, solver_step
from vivace.kernels.solver_step.cases import euler_row
from vivace.kernels.solver_step.table import NOISE, NONE, OUT, RESCALE, TENSOR, THRESHOLD

CASES = [pytest.param(c, d, id=f"{c.name}-{d}") for c in SPEC.cases() for d in c.dtypes]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_fast_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.impls]
)
RATIOS = (0.0, 0.005, 0.25, 0.5, 0.9, 0.995, 0.9999, 1.0)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def plain_row(ratio=0.5):
    return Reduction(THRESHOLD, [[(0, NONE, 1.0)]], ratio, 10.0)


def thresholds(values, ratios, backend, limit=math.inf):
    """s of |values| [n] for every ratio, one sample each."""
    table = build_table([Reduction(THRESHOLD, [[(0, NONE, 1.0)]], ratio, limit) for ratio in ratios])
    pool = torch.as_tensor(values, dtype=torch.float32).expand(1, len(ratios), -1).contiguous().to(device_of(backend))
    lanes = range(len(ratios))
    low, s, gain = sample_adjust(pool, [], table, lanes, lanes, backend=backend).cpu().unbind(1)
    assert torch.equal(low, -s) or bool(s.isnan().any())
    assert torch.equal(gain.nan_to_num(), (1.0 / s).nan_to_num())
    return s


def wanted(values, ratios, limit=math.inf):
    magnitudes = torch.as_tensor(values, dtype=torch.float32).abs()
    return torch.stack([torch.quantile(magnitudes, ratio).clamp(1.0, limit) for ratio in ratios])


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def above_one(n, seed=0):
    """Values whose every quantile is above 1, so that none is hidden by the lower limit of s."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(n + seed))
    return values + 1.0001 * values.sign()


# --- the quantile --------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("n", [1, 2, 3, 65, 1000, 2049])
def test_quantiles_are_those_of_torch_bit_for_bit(backend, n):
    for scale in (1.0, 1e-3, 1e30):  # bins of one key, of many keys, and beside the largest float
        values = above_one(n) * scale
        assert same(thresholds(values, RATIOS, backend), wanted(values, RATIOS))


@on_every_backend
def test_ties_zeros_and_neighbours_one_bit_apart(backend):
    for values in (
        torch.zeros(100),
        torch.full((77,), -2.5),
        torch.tensor([2.0] * 50 + [3.0] * 50),
        torch.tensor([1.5, -1.5, 2.0, -2.0, 2.0, 8.0] * 9),
        torch.arange(300, dtype=torch.int32).view(torch.float32) + 1.0,
        (torch.arange(300, dtype=torch.int32) + 0x40000000 - 150).view(torch.float32),  # around a power of two
        torch.tensor([1e-45, 3e-39, -0.0, 0.0, 4.0]),
    ):
        assert same(thresholds(values, RATIOS, backend), wanted(values, RATIOS))


@on_every_backend
def test_nan_and_infinity_give_what_torch_gives(backend):
    base = above_one(200)
    for odd in ([math.nan], [-math.nan], [math.inf], [math.inf, -math.inf], [math.inf] * 150, [math.inf, math.nan]):
        values = torch.cat((base, torch.tensor(odd)))
        assert same(thresholds(values, RATIOS, backend), wanted(values, RATIOS))


@on_every_backend
def test_the_threshold_lies_between_one_and_the_maximum(backend):
    values = torch.linspace(0.0, 4.0, 101)
    s = thresholds(values, (0.1, 0.25, 0.5, 0.75), backend, limit=2.5)
    assert s.tolist() == [1.0, 1.0, 2.0, 2.5]
    assert thresholds(values, (0.9,), backend, limit=0.5).tolist() == [0.5]  # as torch.clamp(q, 1, 0.5)


@pytest.mark.backend("cpu")
def test_random_quantiles_are_those_of_torch():
    rng = np.random.default_rng(5)
    for _ in range(300):
        n = int(rng.integers(1, 3000))
        values, ratios = above_one(n, int(rng.integers(1 << 20))), rng.random(4).tolist()
        assert same(thresholds(values, ratios, "cpu"), wanted(values, ratios))


@pytest.mark.backend("cpu")
def test_a_sample_larger_than_torch_takes_is_selected_all_the_same():
    n = TORCH_LIMIT + 1_000_001
    values = torch.arange(n, dtype=torch.int32).flip(0).float() + 1.0  # beyond 2^24 neighbours tie
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    ratios = (0.25, 0.995, 1.0)
    got = thresholds(values, ratios, "cpu")
    ordered = values.sort().values
    assert (ordered - got[0]).abs().min() <= 1.0
    assert torch.equal(got, torch.stack([quantile(values, float(np.float32(ratio))) for ratio in ratios]))


def test_the_definition_beyond_the_limit_of_torch_continues_it(monkeypatch):
    from vivace.kernels.sample_adjust import reference

    values = above_one(4001).abs()
    below = [quantile(values, ratio) for ratio in RATIOS]
    monkeypatch.setattr(reference, "TORCH_LIMIT", 0)
    assert same(torch.stack([quantile(values, ratio) for ratio in RATIOS]), torch.stack(below))
    assert quantile(torch.tensor([1.0, math.nan]), 0.5).isnan()


# --- numbers -------------------------------------------------------------------------------------------------------


@on_fast_backends
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_float32_has_the_bits_of_the_reference(backend, case, dtype):
    fast, slow = case.make(dtype, device_of(backend)), case.make(dtype, "cpu")
    got = sample_adjust(*fast.args, **fast.kwargs, backend=backend).cpu()
    want = sample_adjust(*slow.args, **slow.kwargs, backend="reference")
    if fast.args[2].facts.noise and device_of(backend) == "cuda":  # there the normals are within 4e-6 only
        assert torch.allclose(got, want, rtol=0.0, atol=1e-5)
    else:
        assert same(got, want)


@on_every_backend
def test_rescale_is_the_ratio_of_unbiased_deviations(backend):
    device, generator = device_of(backend), torch.Generator().manual_seed(1)
    cond, uncond = (torch.randn(2, 3, 40, generator=generator) + 1e3 for _ in range(2))  # a mean far from 0
    pool, table = torch.zeros(1, 2, 3, 40, device=device), build_table([rescale_row(5.0, 0.7)])
    outs = [cond.to(device), uncond.to(device)]
    got = sample_adjust(pool, outs, table, [0, 0], [0, 1], backend=backend).cpu()
    g = (5.0 * cond + -4.0 * uncond).double().flatten(1)
    wanted = 0.7 * cond.double().flatten(1).std(1) / g.std(1) + 0.3
    assert got[:, 0].tolist() == [-math.inf] * 2 and got[:, 1].tolist() == [math.inf] * 2
    assert torch.allclose(got[:, 2].double(), wanted, rtol=1e-6)
    pool, outs = torch.zeros(1, 1, 1, device=device), [torch.ones(1, 1, device=device)] * 2
    single = sample_adjust(pool, outs, table, [0], [0], backend=backend)
    assert single[0, 2].isnan()  # one element has no deviation, as in torch


@on_every_backend
def test_a_sample_without_elements_is_left_as_it_is(backend):
    pool = torch.zeros(1, 2, 0, device=device_of(backend))
    got = sample_adjust(pool, [], build_table([plain_row()]), [0, 0], [0, 1], backend=backend)
    assert got.tolist() == [[-math.inf, math.inf, 1.0]] * 2


@on_every_backend
def test_the_step_applies_what_the_reduction_found(backend):
    generator = torch.Generator().manual_seed(2)
    x0 = 3.0 * torch.randn(2, 50, generator=generator)
    pool = torch.stack((x0, torch.zeros(2, 50))).to(device_of(backend))
    marked = [Output(1, [(0, NONE, 1.0)], low=-0.1, high=0.1, adjusted=True), Output(0, [], prev=(2.0,))]
    table = build_table([plain_row(0.9), marked]).to(device_of(backend))
    adjust = sample_adjust(pool, [], table, [0, 0], [1, 0], backend=backend)
    solver_step(pool, [], table, [1, 1], [1, 0], adjust=adjust, backend=backend)
    s = torch.quantile(x0.abs(), 0.9, dim=1).clamp(1.0, 10.0)[:, None]
    assert torch.equal(pool[1].cpu(), x0.clamp(-s, s) * (1.0 / s))
    assert torch.equal(pool[0].cpu(), 2.0 * pool[1].cpu())
    adjust[0, :] = math.nan
    solver_step(pool, [], table, [1, 1], [1, 0], adjust=adjust, backend=backend)
    assert pool[:, 1].isnan().all() and pool[:, 0].isfinite().all()


# --- arguments -----------------------------------------------------------------------------------------------------


def arguments(**changes):
    """A legal call of a row that reads a branch, a tensor and noise; one change."""
    row = Reduction(THRESHOLD, [[(3, NONE, 1.0), (OUT, TENSOR, 1.0), (NOISE, NONE, 1.0)]], 0.5, 2.0)
    legal = {
        "pool": torch.zeros(4, 3, 5), "outs": [torch.zeros(2, 5)], "table": build_table([row, euler_row()]).to(),
        "rows": [0, 0], "index": [2, 0], "tensors": [torch.zeros(5)], "seeds": [1, 2], "pictures": [0, 0],
    }  # fmt: skip
    return legal | changes


REFUSED = [
    ({"pool": torch.zeros(4, 3, 5).half()}, DtypeError, "pool is float16"),
    ({"pool": torch.zeros(3, 3, 5)}, ArgumentError, "reach 4 pool slots, got 3"),
    ({"outs": []}, ArgumentError, "reach 1 outs, got 0"),
    ({"tensors": []}, ArgumentError, "reach 1 tensors, got 0"),
    ({"seeds": None}, ArgumentError, "a row reads noise"),
    ({"index": [1, 1]}, ArgumentError, "names a lane twice"),
    ({"rows": [0, 2]}, ArgumentError, "rows reach from 0 to 2, there are 2"),
    ({"rows": [0, 1]}, ArgumentError, r"rows \[0, 1\]: sample_adjust runs reduction rows"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_never_reach_a_kernel(change, error, words):
    sample_adjust(**arguments())
    with pytest.raises(error, match=f"sample_adjust: .*{words}"):
        sample_adjust(**arguments(**change))


def test_the_step_refuses_reduction_rows_and_marked_rows_without_adjust():
    marked = [Output(0, [(0, NONE, 1.0)], adjusted=True)]
    pool, table = torch.zeros(1, 1, 4), build_table([plain_row(), marked])
    with pytest.raises(ArgumentError, match="solver_step: rows .*sample_adjust runs reduction rows"):
        solver_step(pool, [], table, [0], [0])
    with pytest.raises(ArgumentError, match="adjusted outputs, adjust is None"):
        solver_step(pool, [], table, [1], [0])
    with pytest.raises(ShapeError, match=r"adjust has shape \(2, 3\), needs \(1, 3\)"):
        solver_step(pool, [], table, [1], [0], adjust=torch.zeros(2, 3))
    with pytest.raises(DtypeError, match="adjust is float64"):
        solver_step(pool, [], table, [1], [0], adjust=torch.zeros(1, 3).double())


@pytest.mark.parametrize(
    ("kind", "sums", "low", "high", "words"),
    [
        (3, 3, 0.5, 1.0, "kind 3"),
        (THRESHOLD, 2, 0.5, 1.0, "kind 1 of 2 sums"),
        (RESCALE, 1, 0.5, math.inf, "kind 2 of 1 sums"),
        (THRESHOLD, 1, 1.5, 1.0, "0 <= ratio <= 1"),
        (THRESHOLD, 1, math.nan, 1.0, "0 <= ratio <= 1"),
        (THRESHOLD, 1, 0.5, 0.0, "max > 0"),
        (RESCALE, 2, math.inf, math.inf, "finite phi"),
    ],
)
def test_reductions_that_make_no_sense_are_refused(kind, sums, low, high, words):
    with pytest.raises(ArgumentError, match=words):
        Reduction(kind, [[(0, NONE, 1.0)]] * sums, low, high)


def test_a_reduction_row_is_laid_out_as_the_table_says():
    table = build_table([rescale_row(3.0, 0.7), [Output(2, []), Output(1, [], adjusted=True)], plain_row(0.25)])
    ints, floats = table.ints, table.floats
    assert ints[:, 30].tolist() == [0, 2, 0] and ints[:, 31].tolist() == [RESCALE, 0, THRESHOLD]
    assert ints[0, 26:28].tolist() == [NONE, NONE] and floats[0, 64] == np.float32(0.7)
    assert (floats[2, 64], floats[2, 68]) == (0.25, 10.0)
    assert table.facts.adjusted and table.facts.reach[:, 5:].tolist() == [[0, RESCALE], [1, 0], [0, THRESHOLD]]
    for column, value in ((31, 3), (31, -1), (30, 4), (30, -1)):
        broken = ints.copy()
        broken[1, column] = value
        with pytest.raises(ArgumentError, match="unknown kind, or lacks the outputs"):
            type(table)(broken, floats)
