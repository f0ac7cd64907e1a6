"""From what a planner wants to what rows can do: values that exist, weights, and what must be kept for whom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vivace.engine.forecast import node_weights
from vivace.engine.plan import Plan
from vivace.engine.planners.base import Schedule, Track, evaluated, required


def settle(schedule: Schedule, plan: Plan) -> Schedule:
    """The schedule as far as the plan allows it.

    Evaluations of `required`, and those that nothing was computed for, compute. An order is lowered to the values there
    are: computed by the same model, for every branch of the row, at distinct finite places. Weights of a schedule count
    only where the order stays.
    """
    full, before = required(plan), predecessors(plan)
    return replace(schedule, tracks=tuple(_settled(schedule, track, full, before) for track in schedule.tracks))


def predecessors(plan: Plan) -> list[list[int]]:
    """Of every evaluation those before it whose values it may read, newest first.

    They are of its model and ran all its branches. What lies behind an evaluation of the model that lacked a branch is
    left out, so that the branches of a row always have the same history.
    """
    steps = evaluated(plan)
    out: list[list[int]] = []
    for i, step in enumerate(steps):
        found: list[int] = []
        for j in reversed(range(i)):
            variant, mine = steps[j].variant, step.variant
            assert variant is not None and mine is not None
            if variant.model != mine.model:
                continue
            if not set(mine.branches) <= set(variant.branches):
                break
            found.append(j)
        out.append(found)
    return out


def nodes(track: Track, before: list[int]) -> list[int]:
    """Evaluations among `before` that computed, newest first."""
    return [j for j in before if track.orders[j] is None]


def _settled(schedule: Schedule, track: Track, full: frozenset[int], before: list[list[int]]) -> Track:
    orders, weights = list(track.orders), dict(track.weights)
    for i, order in enumerate(track.orders):
        found = [j for j in before[i] if orders[j] is None]
        if order is None or i in full or not found:
            orders[i] = None
        elif i not in weights or len(found) <= order:
            orders[i] = _reach(schedule.times, i, found[: order + 1])
        if orders[i] != order:
            weights.pop(i, None)
    return replace(track, orders=tuple(orders), weights=weights)


def _reach(times: tuple[float, ...], i: int, found: list[int]) -> int:
    """The highest order of a polynomial in `times` through the newest of `found`."""
    if not math.isfinite(times[i]):
        return 0
    seen: set[float] = {times[i]}
    for count, j in enumerate(found):
        if not math.isfinite(times[j]) or times[j] in seen:
            return max(0, count - 1)
        seen.add(times[j])
    return len(found) - 1


def weights_of(schedule: Schedule, track: Track, i: int, found: list[int]) -> tuple[float, ...]:
    """Weights on the values of `found`, newest first, of evaluation i; its order is settled."""
    order = track.orders[i]
    assert order is not None
    if i in track.weights:
        return track.weights[i]
    if order == 0:
        return (1.0,)
    return node_weights([schedule.times[j] for j in found[: order + 1]], schedule.times[i], schedule.form)


@dataclass(frozen=True, slots=True)
class Reads:
    """What one evaluation reads: the evaluations its values come from, newest first, and their weights."""

    sources: tuple[int, ...]
    weights: tuple[float, ...]


def reads_of(schedule: Schedule, track: Track, before: list[list[int]]) -> dict[int, Reads]:
    """What every evaluation of a settled track that does not compute reads."""
    out = {}
    for i, order in enumerate(track.orders):
        if order is not None:
            found = nodes(track, before[i])[: order + 1]
            out[i] = Reads(tuple(found), weights_of(schedule, track, i, found))
    return out


def kept_of(reads: Mapping[int, Reads]) -> dict[int, int]:
    """Evaluations whose values are read later -> how many earlier values must be kept beside them."""
    kept: dict[int, int] = {}
    for read in reads.values():
        for age, source in enumerate(read.sources):
            kept[source] = max(kept.get(source, 0), len(read.sources) - 1 - age)
    return kept


def tail_of(schedule: Schedule, plan: Plan, first: int) -> Schedule:
    """The schedule of a settled run without its first evaluations: the new first one computes, others stay.

    Weights stay where all values that they weigh are still there.
    """
    before = predecessors(plan)
    tracks = []
    for track in schedule.tracks:
        reads = reads_of(schedule, track, before)
        weights = {i - first: w for i, w in track.weights.items() if min(reads[i].sources) >= first}
        tracks.append(Track(track.site, track.blocks, (None, *track.orders[first + 1 :]), weights))
    noise = {i - first: factor for i, factor in schedule.noise.items() if i > first}
    return Schedule(tuple(tracks), schedule.times[first:], schedule.form, noise)
