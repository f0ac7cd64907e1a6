"""Values carried forward from earlier evaluations: their weights, and what these do to noise."""

from __future__ import annotations

import math

from vivace.errors import ArgumentError


def forecast_weights(order: int, ahead: float, apart: float = 1.0) -> tuple[float, ...]:
    """w of f(k) = sum_i w_i f(-i N): the polynomial through order + 1 computed values, taken k evaluations later.

    Args:
        order: of the polynomial, 0 (reuse) or more; ahead: k > 0, evaluations since the newest computed value; apart:
            N > 0, evaluations between computed values.
    Returns: order + 1 weights, newest first; of order 1 (1 + k/N, -k/N). They add up to 1.
    Raises: ArgumentError.
    Source: Lagrange's form; as a forecast of features Liu et al. 2025 (TaylorSeer), eq. 9.
    """
    if type(order) is not int or order < 0:
        raise ArgumentError(f"forecast_weights: order {order!r}; an integer of 0 or more is needed")
    for name, value in (("ahead", ahead), ("apart", apart)):
        if not (math.isfinite(value) and value > 0):
            raise ArgumentError(f"forecast_weights: {name}={value!r}; a positive number of evaluations is needed")
    k = ahead / apart
    return tuple(math.prod((k + j) / (j - i) for j in range(order + 1) if j != i) for i in range(order + 1))


def noise_gain(order: int, ahead: float, apart: float = 1.0) -> float:
    """sum_i w_i^2: by how much a forecast multiplies the variance of noise that is independent in every computed value.

    Reuse leaves it as it is; order 1 multiplies it by (1 + k)^2 + k^2 where computed values lie one apart. Rounding to
    8 bits is such noise. Where errors of neighbouring evaluations have the correlation r, order 1 multiplies by
    (1 + k)^2 + k^2 - 2 r k (1 + k), which is 1 at r = 1.

    Args, raises: of `forecast_weights`.
    """
    return math.fsum(weight * weight for weight in forecast_weights(order, ahead, apart))
