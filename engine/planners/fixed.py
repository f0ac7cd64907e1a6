"""Planners that need no measurement: an interval (FORA, TaylorSeer), a mask, a schedule written out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vivace.engine.plan import Plan
from vivace.engine.planners.base import (
    STEP,
    Planner,
    Schedule,
    Track,
    ends,
    evaluated,
    outside,
    require_blocks,
    require_count,
    require_sites,
    required,
    spaced,
    times_of,
)
from vivace.errors import ArgumentError

INNER = ("attn", "mlp")


@dataclass(frozen=True, slots=True)
class Fora(Planner):
    """FORA: attention and MLP outputs are given again between every `interval`-th evaluation.

    interval: evaluations from one that computes to the next; 1 computes always.
    sites: what is kept, of every block in `blocks`; a mode of its own is sites=("residual",), the whole range at once.
    first, last: evaluations at both ends that compute. window: shares of the run (0 = noise end) outside of which all
        evaluations compute, as pyramid attention broadcast has it.
    Source: Selvaraju et al. 2024, arXiv 2407.01425; windows: Zhao et al. 2024 (PAB), arXiv 2408.12588.
    """

    interval: int = 3
    sites: tuple[str, ...] = INNER
    first: int = 1
    last: int = 1
    blocks: tuple[int, int] = (0, 0)
    window: tuple[float, float] = (0.0, 1.0)

    def schedule(self, plan: Plan) -> Schedule:
        """0 (given again) where neither the interval nor an end asks for a computation."""
        computed = _computed("Fora", self, plan, self.window)
        orders = tuple(None if full else 0 for full in computed)
        sites, blocks = require_sites("Fora", self.sites), require_blocks("Fora", self.blocks)
        return Schedule(tuple(Track(site, blocks, orders) for site in sites), times_of(plan, STEP))


@dataclass(frozen=True, slots=True)
class TaylorSeer(Planner):
    """TaylorSeer: attention and MLP outputs are forecast from their differences.

    interval, sites, first, last, blocks: as in `Fora`. order: of the polynomial, 0 is FORA; as long as fewer values
        were computed, it is lower. variable: "step" evaluation numbers, "lam" log(alpha/sigma).
    form: "taylor", the published sum; "newton", exact on polynomials of the order (see `forecast.node_weights`). They
        differ from order 2 on, most of all behind the first evaluations, where newton's weights are larger.
    Source: Liu et al. 2025, arXiv 2503.06923, eq. 7 to 9.
    """

    interval: int = 4
    order: int = 2
    first: int = 3
    last: int = 1
    sites: tuple[str, ...] = INNER
    blocks: tuple[int, int] = (0, 0)
    variable: str = STEP
    form: str = "taylor"

    def schedule(self, plan: Plan) -> Schedule:
        """`order` where neither the interval nor an end asks for a computation; what is possible is settled later."""
        computed = _computed("TaylorSeer", self, plan)
        order = require_count("TaylorSeer", "order", self.order)
        if order > 4:
            raise ArgumentError(f"TaylorSeer: order={order}; at most 4 (each order keeps one more tensor a layer)")
        orders = tuple(None if full else order for full in computed)
        sites, blocks = require_sites("TaylorSeer", self.sites), require_blocks("TaylorSeer", self.blocks)
        tracks = tuple(Track(site, blocks, orders) for site in sites)
        return Schedule(tracks, times_of(plan, self.variable), self.form)


def _computed(name: str, rule: Any, plan: Plan, window: Any = (0.0, 1.0)) -> tuple[bool, ...]:
    """Whether each evaluation computes, by `interval`, `first`, `last` of a rule and a window."""
    interval = require_count(name, "interval", rule.interval, 1)
    first = require_count(name, "first", rule.first, 1)
    last = require_count(name, "last", rule.last)
    count = plan.nfe
    full = required(plan) | ends(count, first, last) | outside(name, window, count)
    return spaced(count, interval, full)


@dataclass(frozen=True, slots=True)
class StepMask(Planner):
    """A mask: 1 computes, 0 adds the kept residual of the blocks between the first and the last few.

    mask: one 0 or 1 an evaluation, or their text "1,1,0,1"; first_blocks, last_blocks: blocks that always run.
    Source: cache-dit 1.5.3 (vipshop), `steps_computation_mask` with the "static" policy.
    """

    mask: Sequence[int]
    first_blocks: int = 8
    last_blocks: int = 0

    def schedule(self, plan: Plan) -> Schedule:
        """0 (given again) where the mask says 0 and the evaluation is not required to compute."""
        first = require_count("StepMask", "first_blocks", self.first_blocks)
        last = require_count("StepMask", "last_blocks", self.last_blocks)
        mask = [int(part) for part in self.mask.split(",")] if isinstance(self.mask, str) else list(self.mask)
        if any(type(value) is not int or value not in (0, 1) for value in mask) or len(mask) != plan.nfe:
            raise ArgumentError(
                f"StepMask: mask {mask!r:.60} of {len(mask)} entries; one 0 or 1 for each of the plan's {plan.nfe} "
                "evaluations is needed"
            )
        full = required(plan)
        orders = tuple(None if value or i in full else 0 for i, value in enumerate(mask))
        return Schedule((Track("residual", (first, -last), orders),), times_of(plan, STEP))


@dataclass(frozen=True, slots=True)
class Scheduled(Planner):
    """A schedule written out, such as one that was cut to the tail of a run, or found by a search.

    tracks: objects with "site", "blocks", "orders" (one an evaluation: null computes, 0 is given again, o is a forecast
    of order o) and, where weights are not those of the polynomial, "weights": {"evaluation": [newest, older, ...]}.
    times: place of every evaluation, null where it is infinite; None: their numbers. form: of the polynomial.
    noise: {"evaluation": c}: before it x <- x + c times the noise that the run began with. by: the planner it is of.
    """

    tracks: Sequence[Mapping[str, Any]]
    times: Sequence[float | None] | None = None
    form: str = "newton"
    noise: Mapping[str, float] = field(default_factory=dict)
    by: str = ""

    def schedule(self, plan: Plan) -> Schedule:
        """The tracks as they are given."""
        count = len(evaluated(plan))
        given = times_of(plan, STEP) if self.times is None else self.times
        times = tuple(math.inf if time is None else float(time) for time in given)
        if len(times) != count:
            raise ArgumentError(f"Scheduled: {len(times)} times; the plan has {count} evaluations, one each is needed")
        noise = {int(i): float(factor) for i, factor in self.noise.items()}
        return Schedule(tuple(_track(item, count) for item in self.tracks), times, self.form, noise)


def _track(item: Mapping[str, Any], count: int) -> Track:
    """A track of its JSON data. Raises ArgumentError naming the field."""
    unknown = set(item) - {"site", "blocks", "orders", "weights"}
    if unknown or not {"site", "blocks", "orders"} <= set(item):
        raise ArgumentError(f"Scheduled: a track has the fields {sorted(item)}; need site, blocks, orders, or weights")
    (site,) = require_sites("Scheduled", item["site"])
    orders = tuple(item["orders"])
    if len(orders) != count or any(o is not None and (type(o) is not int or o < 0) for o in orders):
        raise ArgumentError(
            f"Scheduled: orders {orders!r:.60} of {site}; null, 0, 1, ... for each of {count} evaluations is needed"
        )
    weights = {int(i): tuple(map(float, values)) for i, values in dict(item.get("weights", {})).items()}
    for i, values in weights.items():
        order = orders[i] if 0 <= i < count else None
        if order is None or len(values) != order + 1:
            raise ArgumentError(f"Scheduled: {len(values)} weights of {site} for evaluation {i} of order {order}")
    return Track(site, require_blocks("Scheduled", item["blocks"]), orders, weights)


def written(schedule: Schedule, planner: Planner) -> dict[str, Any]:
    """The arguments of the `Scheduled` that says what a planner said."""
    tracks: list[dict[str, Any]] = []
    for track in schedule.tracks:
        item: dict[str, Any] = {"site": track.site, "blocks": list(track.blocks), "orders": list(track.orders)}
        if track.weights:
            item["weights"] = {str(i): list(values) for i, values in track.weights.items()}
        tracks.append(item)
    times = [time if math.isfinite(time) else None for time in schedule.times]
    noise = {str(i): factor for i, factor in schedule.noise.items()}
    by = planner.by if isinstance(planner, Scheduled) else type(planner).__name__
    return {"tracks": tracks, "times": times, "form": schedule.form, "noise": noise, "by": by}
