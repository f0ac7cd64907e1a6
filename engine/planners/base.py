"""What planners of caches share: what a planner is, and what it says of a plan.

A planner looks at a plan and says, evaluation by evaluation, which sites of which blocks compute and which are given
again or forecast. It never looks at a network; what it knows of one comes from a calibration table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from vivace.engine.caching import FEATURES
from vivace.engine.plan import Plan, Step
from vivace.errors import ArgumentError

STEP, LAM = "step", "lam"


@dataclass(frozen=True, slots=True)
class Track:
    """What one site of a range of blocks does, evaluation by evaluation.

    blocks: half-open, as in a rule: negative numbers count from the end and a last of 0 is the end.
    orders: None computes, 0 is given again, o > 0 is a forecast of that order.
    weights: evaluation -> weights on computed values, newest first, in place of those of the polynomial.
    """

    site: str
    blocks: tuple[int, int]
    orders: tuple[int | None, ...]
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a planner says of a plan.

    times: the place of every evaluation in the variable that forecasts are polynomials of. form: of these, see
    `forecast.node_weights`. noise: evaluation -> c; before it x <- x + c times the noise that the run began with.
    """

    tracks: tuple[Track, ...]
    times: tuple[float, ...]
    form: str = "newton"
    noise: Mapping[int, float] = field(default_factory=dict)

    @property
    def cached(self) -> tuple[int, ...]:
        """Evaluations that do not compute everything."""
        count = len(self.times)
        return tuple(i for i in range(count) if any(track.orders[i] is not None for track in self.tracks))


class Configured:
    """A frozen dataclass whose fields are its arguments, which a recipe repeats."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as JSON data: what is made of them plans the same."""
        return {item.name: plain(getattr(self, item.name)) for item in fields(self)}

    def measured(self) -> dict[str, Any] | None:
        """Of one with a table, what it was measured on: fingerprint, latent_shape. The plan carries it along."""
        return None


class Planner(Configured, ABC):
    """A rule by which caches are planned.

    searched: recipes repeat the schedule that was found, not the search.
    """

    searched: ClassVar[bool] = False

    @abstractmethod
    def schedule(self, plan: Plan) -> Schedule:
        """What every evaluation of `plan` does. Rows of `required` compute whatever it says."""


def plain(value: Any) -> Any:
    """A value as JSON data: arrays, ranges and tuples become lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


# ---------------------------------------------------------------- plans as evaluations
def evaluated(plan: Plan) -> list[Step]:
    """Rows that evaluate the network. Solvers with inner stages have several a step, each an evaluation of its own."""
    return [step for step in plan.steps if step.variant is not None]


def required(plan: Plan) -> frozenset[int]:
    """Evaluations that compute everything whatever a planner says.

    The first; the first of a model; both sides of a change of branches (the edge of a guidance interval); where numbers
    fed beside the timestep change; where noise rises above the level of two evaluations before (restarts).
    """
    steps = evaluated(plan)
    out = {0}
    for i in range(1, len(steps)):
        before, step = steps[i - 1], steps[i]
        assert before.variant is not None and step.variant is not None
        if before.branches != step.branches:
            out |= {i - 1, i}
        if before.variant.model != step.variant.model or before.net_inputs != step.net_inputs:
            out.add(i)
        if i > 1 and _level(step) > _level(steps[i - 2]):
            out.add(i)
    return frozenset(out)


def _level(step: Step) -> float:
    return math.atan2(step.sigma, step.alpha)


def times_of(plan: Plan, variable: str) -> tuple[float, ...]:
    """Places of the evaluations: their numbers ("step"), or lam = log(alpha/sigma) of their levels ("lam")."""
    if variable not in (STEP, LAM):
        raise ArgumentError(f"planner: variable {variable!r}; use {STEP!r} or {LAM!r}")
    steps = evaluated(plan)
    return tuple(float(i) if variable == STEP else step.lam for i, step in enumerate(steps))


def ends(count: int, first: int, last: int) -> set[int]:
    """The first and the last evaluations of `count`."""
    return {*range(min(first, count)), *range(max(0, count - last), count)}


def spaced(count: int, interval: int, full: Iterable[int]) -> tuple[bool, ...]:
    """Whether each evaluation computes: those of `full`, and the interval-th after the last one that did."""
    forced, since, out = set(full), 0, []
    for i in range(count):
        since = 1 if i in forced or since >= interval else since + 1
        out.append(since == 1)
    return tuple(out)


# ---------------------------------------------------------------- arguments
def require_count(planner: str, name: str, value: Any, low: int = 0) -> int:
    """An integer of `low` or more. Raises ArgumentError."""
    if type(value) is not int or value < low:
        raise ArgumentError(f"{planner}: {name}={value!r:.40}; an integer of {low} or more is needed")
    return value


def require_share(planner: str, name: str, value: Any, high: float = math.inf) -> float:
    """A finite number in [0, high]. Raises ArgumentError."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not 0.0 <= value <= high:
        span = f"from 0 to {high:g}" if math.isfinite(high) else "of 0 or more"
        raise ArgumentError(f"{planner}: {name}={value!r:.40}; a number {span} is needed")
    return float(value)


def require_sites(planner: str, sites: Any, allowed: Sequence[str] = FEATURES) -> tuple[str, ...]:
    """Distinct names of sites. Raises ArgumentError."""
    names = (sites,) if isinstance(sites, str) else tuple(sites) if isinstance(sites, (list, tuple)) else ()
    if not names or len(set(names)) < len(names) or any(name not in allowed for name in names):
        raise ArgumentError(f"{planner}: sites {sites!r:.60}; use some of {', '.join(allowed)}, each once")
    return names


def require_blocks(planner: str, blocks: Any) -> tuple[int, int]:
    """A pair of integers. Raises ArgumentError."""
    if not (isinstance(blocks, (tuple, list)) and len(blocks) == 2 and all(type(b) is int for b in blocks)):
        raise ArgumentError(f"{planner}: blocks {blocks!r:.40}; a pair of integers (first, last) is needed")
    return blocks[0], blocks[1]


def outside(planner: str, window: Any, count: int) -> set[int]:
    """Evaluations outside of a window (a, b), shares of the run with 0 = noise end: i < int(a n) or i >= int(b n)."""
    if not (isinstance(window, (tuple, list)) and len(window) == 2):
        raise ArgumentError(f"{planner}: window {window!r:.40}; a pair of shares of the run is needed")
    low, high = (require_share(planner, "window", value, 1.0) for value in window)
    if low >= high:
        raise ArgumentError(f"{planner}: window {window!r:.40}; need 0 <= a < b <= 1 (0 = noise end)")
    return {i for i in range(count) if not int(low * count) <= i < int(high * count)}
