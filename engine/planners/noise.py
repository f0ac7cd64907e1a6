"""Orders of forecasts in rows of 8 bits: a forecast multiplies the noise of the values it reads.

A forecast of order 1, k evaluations after the newest of two values that lie one apart, multiplies independent noise in
variance by (1 + k)^2 + k^2; giving the newest value again by 1. Rounding to 8 bits is such noise. So of all orders up
to the one asked for, the one with the least bias^2 + gain * noise variance is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vivace.engine.forecast import node_weights
from vivace.engine.plan import Plan
from vivace.engine.planners.base import Schedule, Track, evaluated
from vivace.engine.planners.settle import nodes, predecessors
from vivace.engine.planners.tables import array, check_table

EIGHT_BITS = ("int8", "fp8")
# Where nothing was measured: what outputs of attention and MLP do in runs of 20 to 250 steps of the bundled model.
# CHANGE: of the root mean square over a whole run, the j-th difference going with its j-th power; ROUGHNESS: relative
# variance of the part that is new in every evaluation; NOISE: relative variance of what INT8 adds.
CHANGE, ROUGHNESS, NOISE = 2.5, 5e-4, 1.7e-4


def calmed(schedule: Schedule, plan: Plan, table: Any) -> Schedule:
    """The settled schedule with lower orders where values were computed in 8 bits and that is better.

    table: a calibration table of kind "cache" with the arrays "forecast/<site>" and, where 8 bits were measured, the
    number or array "noise_variance"; None: the estimate at the top of this module; False: nothing is lowered. Weights
    that a planner gave stay.
    """
    if table is False:
        return schedule
    if table is not None:
        check_table("apply_block_cache", table, plan)
    noisy = _noisy(plan)
    if not any(noisy):
        return schedule
    before = predecessors(plan)
    tracks = tuple(_calm(schedule, track, noisy, before, table) for track in schedule.tracks)
    return schedule if tracks == schedule.tracks else replace(schedule, tracks=tracks)


def _noisy(plan: Plan) -> list[bool]:
    """Whether each evaluation computes some of its blocks in 8 bits."""
    variants = [step.variant for step in evaluated(plan)]
    return [any(rule.precision in EIGHT_BITS for rule in variant.rules) for variant in variants if variant is not None]


def _calm(schedule: Schedule, track: Track, noisy: list[bool], before: list[list[int]], table: Any) -> Track:
    orders = list(track.orders)
    for i, order in enumerate(track.orders):
        found = nodes(track, before[i])
        if order and i not in track.weights and any(noisy[j] for j in found[: order + 1]):
            risks = [_risk(schedule, i, found[: o + 1], noisy, track.site, table) for o in range(order + 1)]
            orders[i] = min(range(order + 1), key=lambda o: risks[o])
    return replace(track, orders=tuple(orders))


def _risk(schedule: Schedule, i: int, found: list[int], noisy: list[bool], site: str, table: Any) -> float:
    """bias^2 + sum_j w_j^2 (noise variance of value j), relative to the squared size of the value."""
    order = len(found) - 1
    weights = node_weights([schedule.times[j] for j in found], schedule.times[i], schedule.form) if order else (1.0,)
    variance = NOISE
    bias = _estimated(i, found, len(schedule.times)) + ROUGHNESS * (1.0 + math.fsum(w * w for w in weights))
    if table is not None:
        measured = array(
            "apply_block_cache", table, f"forecast/{site}"
        )  # [evaluations, orders, lags] squared, relative
        lag = i - found[0]
        if order < measured.shape[1] and lag <= measured.shape[2] and np.isfinite(measured[found[0], order, lag - 1]):
            bias = float(measured[found[0], order, lag - 1])
        variance = _measured_noise(table, site)
    return bias + variance * math.fsum(w * w for w, j in zip(weights, found, strict=True) if noisy[j])


def _measured_noise(table: Any, site: str) -> float:
    """Relative variance of what 8 bits add to a site: of the table, the estimate where it was not measured."""
    given = table.metadata.get("noise_variance")
    if isinstance(given, Mapping):
        given = given.get(site)
    if f"noise_variance/{site}" in table.arrays:
        given = np.nanmean(array("apply_block_cache", table, f"noise_variance/{site}"))
    return NOISE if given is None else float(given)


def _estimated(i: int, found: list[int], count: int) -> float:
    """(c^(o+1) / (o+1)! prod_j (i - j))^2, the remainder of interpolation; c: relative change of one evaluation."""
    change = CHANGE / count
    return (math.prod(change * (i - j) for j in found) / math.factorial(len(found))) ** 2
