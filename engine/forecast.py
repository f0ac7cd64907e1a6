"""Values carried forward from earlier evaluations: their weights, and what these do to noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vivace.errors import ArgumentError

FORMS = ("newton", "taylor")


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


def stored_gain(weights: Sequence[float]) -> float:
    """sum_i (w_i + w_{i+1} + ...)^2: by how much a forecast multiplies the variance of rounding to the store.

    Kept are the newest value and its backward differences, D_{j+1} = D_j - Q(D_j of the row before), Q rounding each
    once (`cache_update`). So what the newest value was rounded by counts with the sum of all weights, that of value i
    with the sum of those from i on: order 1, k ahead of two values that lie one apart, multiplies by 1 + k^2, where
    differences of rounded values multiply by `noise_gain`, (1 + k)^2 + k^2. The rounding of the differences themselves
    is left out: it is smaller as they are.

    Args:
        weights: on values, newest first, of `forecast_weights` or `node_weights`.
    """
    return math.fsum(math.fsum(weights[i:]) ** 2 for i in range(len(weights)))


def node_weights(nodes: Sequence[float], at: float, form: str = "newton") -> tuple[float, ...]:
    """Weights of values computed at `nodes`, newest first, for a forecast of order len(nodes) - 1 at another place.

    Args:
        nodes: distinct, in any variable; at: where the value is wanted, in the same variable.
        form: "newton": the polynomial through all values, exact on polynomials of the order. "taylor": sum_m D_m k^m/m!
            with D_0 = f, D_{m+1} = (D_m(newest) - D_m(the one before)) / (their distance), k = at - newest: the
            published rule of TaylorSeer, which is the same up to order 1.
    Returns: the weights; they add up to 1. Raises: ArgumentError.
    Source: Newton's divided differences; Liu et al. 2025 (TaylorSeer), eq. 7 to 9.
    """
    if form not in FORMS:
        raise ArgumentError(f"node_weights: form {form!r}; use {' or '.join(FORMS)}")
    if not nodes or len(set(nodes)) < len(nodes) or not all(math.isfinite(t) for t in (*nodes, at)):
        raise ArgumentError(f"node_weights: nodes {tuple(nodes)} and place {at}; distinct finite numbers are needed")
    count = len(nodes)
    levels = [[1.0 if i == j else 0.0 for i in range(count)] for j in range(count)]  # D_m at node j, as weights
    total, factor = list(levels[0]), 1.0
    for m in range(1, count):
        apart = [nodes[j] - nodes[j + (m if form == "newton" else 1)] for j in range(count - m)]
        levels = [[(a - b) / apart[j] for a, b in zip(levels[j], levels[j + 1], strict=True)] for j in range(count - m)]
        factor *= (at - nodes[m - 1]) if form == "newton" else (at - nodes[0]) / m
        total = [have + factor * weight for have, weight in zip(total, levels[0], strict=True)]
    return tuple(total)
