"""Forecasts: exact on polynomials, and the variance of noise grows as stated."""

import numpy as np
import pytest

from vivace.engine.caching import plane_weights
from vivace.engine.forecast import forecast_weights, noise_gain, stored_gain
from vivace.errors import ArgumentError


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("ahead", "apart"), [(1, 1), (3, 1), (2, 5), (1.5, 0.5)])
def test_a_polynomial_of_the_order_is_met_exactly(order, ahead, apart):
    polynomial = np.polynomial.Polynomial(np.arange(1.0, order + 2))
    computed = [polynomial(-i * apart) for i in range(order + 1)]
    found = np.dot(forecast_weights(order, ahead, apart), computed)
    assert found == pytest.approx(polynomial(ahead), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_order_one_amplifies_by_the_stated_rule(k):
    assert noise_gain(1, k) == pytest.approx((1 + k) ** 2 + k**2, rel=1e-14)
    assert noise_gain(1, k, 3) == pytest.approx((1 + k / 3) ** 2 + (k / 3) ** 2, rel=1e-14)


@pytest.mark.parametrize("k", [1, 4])
def test_reuse_amplifies_nothing(k):
    assert forecast_weights(0, k) == (1.0,) and noise_gain(0, k) == 1.0


@pytest.mark.parametrize(("order", "k"), [(0, 3), (1, 1), (1, 3), (2, 2)])
def test_independent_noise_grows_as_predicted(order, k):
    count = 200_000
    noise = np.random.default_rng(0).standard_normal((order + 1, count))
    measured = float(np.dot(forecast_weights(order, k), noise).var())
    assert abs(measured / noise_gain(order, k) - 1.0) < 5 * np.sqrt(2 / count)  # five deviations of a variance


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_rounding_to_the_store_is_amplified_less(k):
    assert stored_gain(forecast_weights(0, k)) == 1.0
    assert stored_gain(forecast_weights(1, k)) == pytest.approx(1 + k**2, rel=1e-14)
    assert stored_gain(forecast_weights(1, k, 3)) == pytest.approx(1 + (k / 3) ** 2, rel=1e-14)
    assert stored_gain((0.5,)) == 0.25


@pytest.mark.parametrize(("order", "k"), [(0, 3), (1, 1), (1, 3), (2, 2), (3, 1)])
def test_rounding_of_values_that_differences_were_taken_from_grows_as_predicted(order, k):
    count, weights = 200_000, forecast_weights(order, k)
    noise = np.random.default_rng(2).standard_normal((order + 1, count))
    planes: list[np.ndarray] = []
    for rounding in noise[::-1]:  # values are 0; a value is rounded as it is stored, a difference is not
        exact, old = np.zeros(count), planes
        planes = [exact + rounding]
        for plane in old:
            exact = exact - plane
            planes.append(exact)
    measured = float(np.dot(plane_weights(weights), planes).var())
    assert abs(measured / stored_gain(weights) - 1.0) < 5 * np.sqrt(2 / count)  # five deviations of a variance


def test_correlated_noise_grows_less():
    r, k, count = 0.6, 2, 200_000
    newest, other = np.random.default_rng(1).standard_normal((2, count))
    older = r * newest + np.sqrt(1 - r * r) * other
    measured = float(np.dot(forecast_weights(1, k), [newest, older]).var())
    expected = (1 + k) ** 2 + k**2 - 2 * r * k * (1 + k)
    assert abs(measured / expected - 1.0) < 5 * np.sqrt(2 / count)


@pytest.mark.parametrize("arguments", [(-1, 1), (1.0, 1), (1, 0), (1, float("nan")), (1, 1, 0.0)])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ArgumentError, match="forecast_weights: (order|ahead|apart)"):
        noise_gain(*arguments)
