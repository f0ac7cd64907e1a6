"""Tokens are selected as by the engine's kernel, ties and NaN included, and its layouts are read the same way."""

import numpy as np
import pytest
import torch

from vivace.engine.token_layout import Layout
from vivace.kernels.select_tokens import select_tokens as public
from vivace.kernels.select_tokens.reference import select_tokens as theirs
from vivace.runtime.select import scores_of, select_tokens
from vivace.runtime.tokens import pixels_of, planes_of


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def both(scores, ages, keep, **options):
    ids, after = select_tokens(scores, ages, keep, **options)
    factors = options.pop("factors", None)
    told = torch.from_numpy(ages.copy())
    given = None if factors is None else torch.from_numpy(factors)
    wanted = theirs((), None, told, keep, scores=torch.from_numpy(scores), factors=given, **options)
    assert np.array_equal(ids, wanted.numpy()) and np.array_equal(after, told.numpy())
    assert ids.dtype == np.int64 and after.dtype == np.int32
    return ids


@pytest.mark.parametrize("keep", [0, 1, 8, 15, 16])
@pytest.mark.parametrize("drop_high", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bound", [-1, 0, 2, 7])
def test_ids_and_ages_are_those_of_the_kernel(keep, drop_high, bound):
    ages = np.random.default_rng(3).integers(0, 6, (3, 16)).astype(np.int32)
    factors = np.exp(-0.7 * np.arange(5)).astype(np.float32)
    for options in ({}, {"factors": factors}, {"factors": factors, "least": min(keep, 2)}):
        both(drawn(3, 16), ages, keep, drop_high=drop_high, bound=bound, **options)


def test_ties_and_nan_are_ranked_by_position():
    scores = np.array([[1.0, 1.0, np.nan, 1.0, 0.0, -0.0, np.nan, 1.0]], np.float32)
    for keep in range(9):
        both(scores, np.zeros((1, 8), np.int32), keep, drop_high=0.5)


def test_every_token_is_computed_within_its_bound():
    ages, waits = np.zeros((1, 24), np.int32), 0
    for row in range(40):
        _, ages = select_tokens(drawn(1, 24, seed=row), ages, 6, bound=5, drop_high=1.0)
        waits = max(waits, int(ages.max()))
    assert waits <= 5


@pytest.mark.parametrize("metric", ["deviation", "norm"])
@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_ids_by_predictions_are_those_of_the_kernel(metric, channels):
    planes, weights = [drawn(4, channels, 16, 24, seed=k) for k in range(2)], [1.5, -0.5]
    ages = np.zeros((4, 64), np.int32)
    ids, _ = select_tokens(scores_of(planes, weights, (2, 3), metric), ages, 20, drop_high=0.3)
    tensors, wide = [torch.from_numpy(plane) for plane in planes], torch.tensor([weights] * 4)
    given = {"patch": (2, 3), "metric": metric, "drop_high": 0.3}
    for backend in ("reference", "auto"):
        wanted = public(tensors, wide, torch.from_numpy(ages.copy()), 20, backend=backend, **given)
        assert np.array_equal(ids, wanted.numpy())


@pytest.mark.parametrize(
    "layout",
    [
        Layout((3, 8, 6), (3, 2, 3)),
        Layout((4, 2, 6, 4), (4, 1, 2, 2)),
        Layout((12, 16), (1, 16), 1, 4),
        Layout((2, 3, 8, 6), (1, 3, 2, 2), 1),
    ],
    ids=["picture", "film", "packed", "frames first"],
)
def test_layouts_are_read_as_by_the_engine(layout):
    latents = drawn(2, *layout.shape)
    assert np.array_equal(planes_of(layout, latents), layout.planes(torch.from_numpy(latents)).numpy())
    tokens = np.arange(2 * layout.tokens, dtype=np.float32).reshape(2, -1)
    assert np.array_equal(pixels_of(layout, tokens), layout.pixels(torch.from_numpy(tokens)).numpy())
