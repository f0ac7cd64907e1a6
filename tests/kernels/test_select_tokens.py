"""Selected tokens: the same ids and ages from every backend, those of a transcription by hand; none waits too long."""

import math

import numpy as np
import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.select_tokens import SPEC, select_tokens

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
# Triton's interpreter runs one program after the other.
SIZES = ((5, 2), (24, 9)) if spec.interpreted() else ((5, 2), (24, 9), (64, 16), (100, 99), (300, 80))
one = np.float32


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def selected(call, backend):
    """ids and the ages they leave."""
    ids = select_tokens(*call.args, **call.kwargs, backend=backend)
    return ids.cpu(), call.args[2].cpu()


@on_every_backend
@pytest.mark.parametrize("case", SPEC.cases(), ids=lambda case: case.name)
def test_every_backend_has_the_ids_and_ages_of_the_definition(backend, case):
    for dtype in case.dtypes:
        ids, ages = selected(case.make(dtype, device_of(backend)), backend)
        expected, expected_ages = selected(case.make(dtype, "cpu"), "reference")
        assert ids.dtype == torch.int32 and torch.equal(ids, expected) and torch.equal(ages, expected_ages)


def by_hand(scores, ages, keep, drop_high, factors, bound, least):
    """The contract of one picture, sentence by sentence, in numpy scalars; ids and new ages."""
    tokens = len(scores)
    key = [(math.isnan(s), 0.0 if math.isnan(s) else float(s), p) for p, s in enumerate(scores)]
    rank = {p: r for r, p in enumerate(sorted(range(tokens), key=key.__getitem__))}
    dropped = tokens - keep
    low = dropped - math.floor(drop_high * dropped + 0.5)
    effective = {}
    for p in range(tokens):
        distance = one(abs(2 * rank[p] - (2 * low + keep - 1)))
        effective[p] = distance if factors is None else distance * factors[min(ages[p], len(factors) - 1)]
    forced = 0
    for d in range(1, bound + 2):
        forced = max(forced, sum(bound - age + 1 <= d for age in ages) - least * (d - 1))
    forced = min(forced, keep)
    first = sorted(range(tokens), key=lambda p: (-ages[p], effective[p], p))[:forced]
    others = sorted((p for p in range(tokens) if p not in first), key=lambda p: (effective[p], p))
    ids = sorted(first + others[: keep - forced])
    return ids, [0 if p in ids else age + 1 for p, age in enumerate(ages)]


@on_every_backend
@pytest.mark.parametrize(("tokens", "keep"), SIZES)
def test_ids_are_those_of_a_transcription_by_hand(backend, tokens, keep):
    rng, device = np.random.default_rng(tokens), device_of(backend)
    for trial in range(6):
        scores = rng.standard_normal((2, tokens)).astype(one)
        if trial % 2:
            scores = np.round(scores)  # ties
        if trial == 4:
            scores[:, ::4] = np.nan
        ages = rng.integers(0, 5, (2, tokens)).astype(np.int32)
        factors = None if trial == 3 else np.exp(-0.1 * np.arange(4)).astype(one)
        bound, least = int(rng.integers(-1, 7)), int(rng.integers(0, keep + 1))
        drop_high = float(rng.choice([0.0, 0.3, 0.5, 1.0]))
        after = torch.tensor(ages, device=device)
        ids = select_tokens(
            (), None, after, keep, scores=torch.tensor(scores, device=device), drop_high=drop_high, bound=bound,
            factors=None if factors is None else torch.tensor(factors, device=device), least=least, backend=backend,
        )  # fmt: skip
        for b in range(2):
            expected = by_hand(scores[b], ages[b].tolist(), keep, drop_high, factors, bound, least)
            assert (ids[b].tolist(), after[b].tolist()) == expected


def score_by_hand(planes, weights, patch, metric):
    """Scores of one picture [C, H, W] in numpy float32, pixel by pixel, in the order the contract states."""
    channels, height, width = planes[0].shape
    scores = []
    for top in range(0, height, patch[0]):
        for left in range(0, width, patch[1]):
            total = None
            for y in range(top, top + patch[0]):
                for x in range(left, left + patch[1]):
                    v = []
                    for c in range(channels):
                        value = weights[0] * planes[0][c, y, x]
                        for j in range(1, len(planes)):
                            value = value + weights[j] * planes[j][c, y, x]
                        v.append(value)
                    pixel = pixel_by_hand(v, metric)
                    total = pixel if total is None else total + pixel
            scores.append(total / one(patch[0] * patch[1]))
    return np.array(scores)


def pixel_by_hand(v, metric):
    def added(values):
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    if metric == "norm":
        return np.sqrt(added([each * each for each in v]))
    if len(v) == 1:
        return np.abs(v[0])
    mean = added(v) / one(len(v))
    return np.sqrt(added([(each - mean) * (each - mean) for each in v]) / one(len(v) - 1))


@on_every_backend
@pytest.mark.parametrize("metric", ["deviation", "norm"])
@pytest.mark.parametrize(("channels", "count"), [(1, 1), (3, 2), (4, 4)])
def test_scores_are_those_of_pixels_by_hand(backend, metric, channels, count):
    """Ranks tell scores apart: the lowest `keep` for every keep, so every order of two scores is seen."""
    rng, device, patch = np.random.default_rng(3), device_of(backend), (2, 3)
    planes = [rng.standard_normal((1, channels, 4, 9)).astype(one) for _ in range(count)]
    weights = rng.standard_normal((1, count)).astype(one)
    scores = score_by_hand([plane[0] for plane in planes], weights[0], patch, metric)
    order = np.argsort(scores, kind="stable")
    tensors = [torch.tensor(plane, device=device) for plane in planes]
    for keep in range(1, 7):
        ages = torch.zeros(1, 6, dtype=torch.int32, device=device)
        ids = select_tokens(
            tensors, torch.tensor(weights, device=device), ages, keep, patch=patch, metric=metric, backend=backend
        )
        assert ids[0].tolist() == sorted(order[:keep].tolist())


@on_every_backend
@pytest.mark.parametrize(("drop_high", "expected"), [(1.0, [0, 1, 2]), (0.0, [5, 6, 7]), (0.5, [2, 3, 4])])
def test_dropped_tokens_come_from_the_ends_that_drop_high_says(backend, drop_high, expected):
    scores = torch.arange(8.0, device=device_of(backend))[None]
    ages = torch.zeros(1, 8, dtype=torch.int32, device=scores.device)
    ids = select_tokens((), None, ages, 3, scores=scores, drop_high=drop_high, backend=backend)
    assert ids[0].tolist() == expected


@on_every_backend
def test_no_token_waits_longer_than_the_bound(backend):
    """Scores against it: what waits longest is ranked last; rows keep different numbers, never fewer than `least`."""
    rng, device = np.random.default_rng(1), device_of(backend)
    for tokens, bound, trials in ((7, 2, 12), (23, 5, 20), (64, 3, 20)):
        if spec.interpreted():
            trials //= 3
        least = -(-tokens // (bound + 1))
        ages = torch.zeros(2, tokens, dtype=torch.int32, device=device)
        for row in range(trials):
            scores = ages.float() + torch.tensor(rng.random((2, tokens)), dtype=torch.float32, device=device)
            if row % 5 == 4:
                scores = torch.full_like(scores, math.nan)
            keep = least if row % 3 else int(rng.integers(least, tokens + 1))
            select_tokens((), None, ages, keep, scores=scores, bound=bound, least=least, backend=backend)
            assert int(ages.max()) <= bound


@on_every_backend
def test_without_a_bound_the_same_tokens_may_be_left_for_ever(backend):
    scores = torch.arange(6.0, device=device_of(backend))[None]
    ages = torch.zeros(1, 6, dtype=torch.int32, device=scores.device)
    for _ in range(5):
        select_tokens((), None, ages, 2, scores=scores, backend=backend)
    assert ages[0].tolist() == [0, 0, 5, 5, 5, 5]


@on_every_backend
def test_planes_may_lie_anywhere(backend):
    device, options = device_of(backend), {"patch": (2, 2), "backend": backend}
    whole = torch.randn(5, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2)).to(device)
    weights = torch.ones(3, 2, device=device)
    views = [whole[2:, 1], whole.transpose(-1, -2)[2:, 0]]  # samples apart; not in one piece
    results = []
    for planes in (views, [view.contiguous() for view in views]):
        ages = torch.zeros(3, 16, dtype=torch.int32, device=device)
        results.append(select_tokens(planes, weights, ages, 5, **options).tolist())
    assert results[0] == results[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.backend("triton")
def test_nothing_waits_for_the_device():
    call = SPEC.cases()[0].make("bfloat16", "cuda")
    select_tokens(*call.args, **call.kwargs)  # compiled
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        select_tokens(*call.args, **call.kwargs, bound=3)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"keep": 25}, ArgumentError, "keep is 25, needs 0 .. 24"),
        ({"metric": "mean"}, ArgumentError, "metric is 'mean'"),
        ({"drop_high": 1.5}, ArgumentError, "drop_high is 1.5"),
        ({"bound": -2}, ArgumentError, "bound is -2"),
        ({"least": 9}, ArgumentError, "least 9"),
        ({"patch": (2, 5)}, ShapeError, "cannot be cut"),
        ({"patch": (2,)}, ShapeError, "an edge for every spatial axis"),
        ({"patch": (1, 2)}, ShapeError, "have 48 tokens"),
        ({"planes": ()}, ArgumentError, "0 planes with weights"),
        ({"weights": None}, ArgumentError, "without weights"),
        ({"weights": torch.zeros(2, 3)}, ShapeError, r"need \[2, 2\]"),
        ({"weights": torch.zeros(2, 2).half()}, DtypeError, "weights are float16"),
        ({"planes": [torch.zeros(2, 4, 8, 12).int()] * 2}, DtypeError, "planes are int32"),
        ({"ages": torch.zeros(2, 24)}, DtypeError, "ages are float32"),
        ({"scores": torch.zeros(2, 24)}, ArgumentError, "scores are given"),
        ({"planes": (), "weights": None, "scores": torch.zeros(2, 23)}, ShapeError, "scores have shape"),
        ({"factors": torch.zeros(0)}, ShapeError, "factors have shape"),
    ],
)
def test_what_makes_no_sense_is_refused(change, error, words):
    arguments = {
        "planes": [torch.zeros(2, 4, 8, 12)] * 2, "weights": torch.ones(2, 2),
        "ages": torch.zeros(2, 24, dtype=torch.int32), "keep": 8, "patch": (2, 2),
    }  # fmt: skip
    with pytest.raises(error, match=words):
        select_tokens(**(arguments | change))
