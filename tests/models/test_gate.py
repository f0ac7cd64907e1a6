"""The bundled model is fit to judge solvers on: the gate in small, and the gate's own arithmetic."""

from dataclasses import replace

import numpy as np
import pytest

import vivace
from vivace.bench import gate
from vivace.errors import ArgumentError
from vivace.metrics import Features

SMALL = gate.Size(classes=10, seeds=2, prompts=2, evaluations=5, converged=40)


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


@pytest.fixture(scope="module")
def features(pipe):
    return Features.load(pipe.model.path.parent)


@pytest.fixture(scope="module")
def measured(pipe, features, tmp_path_factory):
    return gate.measure(pipe, features, 1.0, SMALL, folder=tmp_path_factory.mktemp("cache"))


def test_the_bundled_model_is_not_degenerate(measured):
    assert measured.passes
    assert measured.spread >= gate.SPREAD
    assert measured.difficulty >= gate.DIFFICULTY
    assert measured.pictures == 20


def test_its_pictures_look_like_their_names(measured):
    assert measured.top1 >= 0.5  # one in a thousand by chance


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        ({"within": 0.19}, False),  # same picture for every seed
        ({"mse_many": 0.11}, False),  # nothing left to gain after five evaluations
        ({"mse_many": 0.1}, True),
        ({"total": 2.6}, False),  # pictures of classes far apart hide how alike those of one class are
    ],
)
def test_both_conditions_are_needed(change, passes):
    base = gate.Gate("m", 1.0, 10, 0.25, 0.5, 1.0, 2.0, 1.0, 0.01, 1.0, None)
    assert replace(base, **change).passes is passes


def test_variances_are_unbiased():
    g = np.random.default_rng(0)
    x = 2.0 * g.standard_normal((4000, 1, 3)) + g.standard_normal((4000, 3, 3))
    within, total = gate.variances(x)
    assert within == pytest.approx(1.0, rel=0.03)
    assert total == pytest.approx(5.0, rel=0.03)
    assert gate.variances(np.repeat(x[:, :1], 2, axis=1))[0] == 0.0


def test_too_small_and_unknown_requests_are_refused(pipe, features):
    with pytest.raises(ArgumentError, match="at least two"):
        gate.measure(pipe, features, size=replace(SMALL, seeds=1))
    with pytest.raises(ArgumentError, match=r"gate\.spread"):
        gate.run(claim="gate.speed")
