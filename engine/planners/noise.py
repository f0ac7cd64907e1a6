"""Orders of forecasts where 8 bits are: a forecast multiplies the noise of the values it reads.

A forecast of order 1, k evaluations after the newest of two values that lie one apart, multiplies independent noise in
variance by (1 + k)^2 + k^2; giving the newest value again by 1. What is computed in 8 bits has such noise. What is
only kept in 8 bits is rounded on storing, which order 1 multiplies by 1 + k^2 (`forecast.stored_gain`). So of all
orders up to the one asked for, the one with the least bias^2 + sum of gain * noise variance is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vivace.engine.forecast import node_weights, stored_gain
from vivace.engine.plan import Plan
from vivace.engine.planners.base import Schedule, Track, evaluated
from vivace.engine.planners.settle import nodes, predecessors
from vivace.engine.planners.tables import array, check_table

EIGHT_BITS = ("int8", "fp8")
# Where nothing was measured: what outputs of attention and MLP do in runs of 20 to 250 steps of the bundled model.
# CHANGE: of the root mean square over a whole run, the j-th difference going with its j-th power; ROUGHNESS: relative
# variance of the part that is new in every evaluation; NOISE: relative variance of what INT8 adds.
CHANGE, ROUGHNESS, NOISE = 2.5, 5e-4, 1.7e-4
# Relative variance of rounding on storing, measured on normals, rows of 384; bfloat16 has 3e-6 and is left out.
STORED = {"int8": 5e-5, "fp8": 7e-4}


def calmed(schedule: Schedule, plan: Plan, table: Any, store: str | None = None) -> Schedule:
    """The settled schedule with lower orders where values were computed or are kept in 8 bits and that is better.

    store: what values are kept in. table: a calibration table of kind "cache" with the arrays "change/<site>" or
    "forecast/<site>" and, where 8 bits were measured, the number or arrays "noise_variance/<site>"; None: the estimate
    at the top of this module; False: nothing is lowered. Weights that a planner gave stay.
    """
    if table is False:
        return schedule
    if table is not None:
        check_table("apply_block_cache", table, plan)
    noisy, stored = _noisy(plan), STORED.get(store or "", 0.0)
    if not any(noisy) and not stored:
        return schedule
    before = predecessors(plan)
    tracks = tuple(_calm(schedule, track, noisy, stored, before, table) for track in schedule.tracks)
    return schedule if tracks == schedule.tracks else replace(schedule, tracks=tracks)


def _noisy(plan: Plan) -> list[bool]:
    """Whether each evaluation computes some of its blocks in 8 bits."""
    variants = [step.variant for step in evaluated(plan)]
    return [any(rule.precision in EIGHT_BITS for rule in variant.rules) for variant in variants if variant is not None]


def _calm(
    schedule: Schedule, track: Track, noisy: list[bool], stored: float, before: list[list[int]], table: Any
) -> Track:
    orders = list(track.orders)
    for i, order in enumerate(track.orders):
        found = nodes(track, before[i])
        if order and i not in track.weights and (stored or any(noisy[j] for j in found[: order + 1])):
            risks = [_risk(schedule, i, found[: o + 1], noisy, stored, track.site, table) for o in range(order + 1)]
            orders[i] = min(range(order + 1), key=lambda o: risks[o])
    return replace(track, orders=tuple(orders))


def _risk(
    schedule: Schedule, i: int, found: list[int], noisy: list[bool], stored: float, site: str, table: Any
) -> float:
    """bias^2 + sum_j w_j^2 (noise variance of value j) + that of storing, relative to the squared size of the value."""
    order = len(found) - 1
    weights = node_weights([schedule.times[j] for j in found], schedule.times[i], schedule.form) if order else (1.0,)
    bias = None if table is None else _measured_bias(table, site, i, found, weights)
    if bias is None:
        bias = _estimated(i, found, len(schedule.times)) + ROUGHNESS * (1.0 + math.fsum(w * w for w in weights))
    computed = math.fsum(w * w * _noise_of(table, site, j) for w, j in zip(weights, found, strict=True) if noisy[j])
    return bias + computed + stored * stored_gain(weights)


def _measured_bias(table: Any, site: str, i: int, found: list[int], weights: tuple[float, ...]) -> float | None:
    """Squared relative error of that forecast in float rows, of the table; None where it was not measured."""
    ages = [i - j for j in found]
    if f"change/{site}" in table.arrays:
        change = array("apply_block_cache", table, f"change/{site}")  # [evaluations, ages, ages]
        if ages[-1] <= change.shape[1]:
            places = [age - 1 for age in ages]
            error = float(np.asarray(weights) @ change[i][np.ix_(places, places)] @ np.asarray(weights))
            return error if math.isfinite(error) else None
    measured = array("apply_block_cache", table, f"forecast/{site}")  # [evaluations, orders, lags] squared, relative
    order, lag = len(found) - 1, ages[0]
    if order >= measured.shape[1] or lag > measured.shape[2] or not np.isfinite(measured[found[0], order, lag - 1]):
        return None
    return float(measured[found[0], order, lag - 1])


def _noise_of(table: Any, site: str, evaluation: int) -> float:
    """Relative variance of what 8 bits add to a site in an evaluation: of the table, else the estimate.

    An evaluation that the table's runs did not compute in 8 bits has the mean of the others.
    """
    if table is None:
        return NOISE
    given = table.metadata.get("noise_variance")
    if isinstance(given, Mapping):
        given = given.get(site)
    if f"noise_variance/{site}" in table.arrays:
        measured = array("apply_block_cache", table, f"noise_variance/{site}")
        known = measured[np.isfinite(measured)]
        given = measured[evaluation] if np.isfinite(measured[evaluation]) else known.mean() if known.size else None
    return NOISE if given is None else float(given)


def _estimated(i: int, found: list[int], count: int) -> float:
    """(c^(o+1) / (o+1)! prod_j (i - j))^2, the remainder of interpolation; c: relative change of one evaluation."""
    change = CHANGE / count
    return (math.prod(change * (i - j) for j in found) / math.factorial(len(found))) ** 2
