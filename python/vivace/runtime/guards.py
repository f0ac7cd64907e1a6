"""Run-time choices between two variants known beforehand: what a request's guards remember, and how they decide.

The same metrics, rules and defaults as in `engine.guards` and `engine.guiding`, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.engine.looking import EVERY_ROW
from vivace.engine.plan import Guard

Array: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Decision:
    """What guards chose in a row, by picture: whether they fired, and the value that was compared; None: sticky."""

    row: int
    fired: tuple[bool, ...]
    values: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; values that are not finite are None."""
        values = [value if value is not None and math.isfinite(value) else None for value in self.values]
        return {"row": self.row, "fired": list(self.fired), "values": values}


@dataclass(slots=True)
class _Picture:
    """What guards of one metric remember of one picture."""

    earlier: Array | None = None  # [branches, ...]
    total: float = 0.0  # of the polynomial since the last computed row
    fires: int = 0  # in a row
    stuck: bool = False


@dataclass(slots=True)
class Watch:
    """The guards of a request of n pictures. estimates: they leave out branches that are then estimated."""

    pictures: int
    estimates: bool = False
    decisions: list[Decision] = field(default_factory=list)
    cosines: Cosines = field(init=False)
    _of: dict[str, list[_Picture]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cosines = Cosines(self.pictures, self.estimates)

    def recall(self, guard: Guard, row: int) -> tuple[bool, ...]:
        """Whether a guard on what earlier rows predicted fires, by picture."""
        fired, values = self.cosines.decide(guard)
        self.decisions.append(Decision(row, fired, values))
        return fired

    def decide(self, guard: Guard, signal: Array, row: int) -> tuple[bool, ...]:
        """Whether the guard fires, by picture, for a signal [branches, n, ...]."""
        states = self._states(guard)
        chosen = [_decide(guard, state, signal[:, j]) for j, state in enumerate(states)]
        fired = tuple(fires for fires, _ in chosen)
        self.decisions.append(Decision(row, fired, tuple(value for _, value in chosen)))
        return fired

    def computed(self, guard: Guard, signal: Array) -> None:
        """A row without a guard was computed: later ones compare with it."""
        for j, state in enumerate(self._states(guard)):
            _reset(state, signal[:, j])

    def stuck(self, guard: Guard) -> bool:
        """The guard fired for every picture and stays so."""
        return guard.sticky and all(state.stuck for state in self._states(guard))

    def stay(self, row: int) -> tuple[bool, ...]:
        """The decision of a row whose guard is stuck."""
        self.decisions.append(Decision(row, (True,) * self.pictures, (None,) * self.pictures))
        return (True,) * self.pictures

    def _states(self, guard: Guard) -> list[_Picture]:
        return self._of.setdefault(guard.metric, [_Picture() for _ in range(self.pictures)])


class Cosines:
    """The last cosine between the branches of every picture, and the differences cond - uncond where they are kept."""

    def __init__(self, pictures: int, keeps: bool) -> None:
        self.keeps = keeps
        self.last = [math.nan] * pictures  # NaN: no row measured it yet
        self.stuck, self.fires = [False] * pictures, [0] * pictures
        self.differences: list[Array | None] = [None] * pictures

    def heard(
        self, names: Sequence[str], ran: Sequence[str], outs: Mapping[str, Array], pictures: Sequence[int]
    ) -> dict[str, Array]:
        """Predictions [n, ...] of the row's branches, noted where both ran; else with what is estimated of uncond."""
        made = dict(outs)
        if {"cond", "uncond"} <= set(ran):
            for j, cond, uncond in zip(pictures, outs["cond"], outs["uncond"], strict=True):
                self.last[j], self.fires[j] = cosine(cond, uncond), 0
                if self.keeps:
                    self.differences[j] = cond - uncond
        elif "uncond" in names and self.keeps:
            rows = zip(pictures, outs["cond"], strict=True)
            kept = [(cond, self.differences[j]) for j, cond in rows]
            made["uncond"] = np.stack([cond if each is None else cond - each for cond, each in kept])
        return made

    def decide(self, guard: Guard) -> tuple[tuple[bool, ...], tuple[float | None, ...]]:
        """Whether the guard fires, by picture, and the cosines compared, None where it fired for good before."""
        if guard.sticky and all(self.stuck):
            return (True,) * len(self.last), (None,) * len(self.last)
        stays = [guard.sticky and stuck for stuck in self.stuck]
        most = guard.params[0] if guard.params else math.inf  # rows in a row that an estimate serves
        fired = [
            stay or (count < most and _compared(guard, value))
            for stay, count, value in zip(stays, self.fires, self.last, strict=True)
        ]
        self.fires = [count + fires for count, fires in zip(self.fires, fired, strict=True)]
        self.stuck = [fires and guard.sticky for fires in fired]
        values = [None if stay or math.isnan(v) else v for stay, v in zip(stays, self.last, strict=True)]
        return tuple(fired), tuple(values)


def cosine(cond: Array, uncond: Array) -> float:
    """<a, b> / (|a| |b|) over all elements, in float64; NaN where one of them is 0."""
    a, b = cond.astype(np.float64).reshape(-1), uncond.astype(np.float64).reshape(-1)
    size = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / size if size else math.nan


def _change(signal: Array, earlier: Array | None) -> float:
    """mean|signal - earlier| / mean|earlier|; infinity where there is nothing to compare with."""
    if earlier is None:
        return math.inf
    with np.errstate(all="ignore"):
        return float(np.abs(signal - earlier).sum(dtype=np.float64) / np.abs(earlier).sum(dtype=np.float64))


def _decide(guard: Guard, state: _Picture, signal: Array) -> tuple[bool, float | None]:
    """Whether the guard fires for a picture, and what was compared. NaN never fires."""
    if guard.sticky and state.stuck:
        return True, None
    value = _change(signal, state.earlier)
    if guard.rule == "accumulated_below":
        state.total += _polynomial(guard.params, value)
        value = state.total
    fires = _compared(guard, value)
    if guard.metric == "first_block" and len(guard.params) > 1 and guard.params[1]:
        fires = fires and state.fires < guard.params[1]
    if not fires:
        _reset(state, signal)
        return False, value
    state.fires += 1
    state.stuck = guard.sticky
    if guard.metric in EVERY_ROW:
        state.earlier = signal.copy()
    return True, value


def _compared(guard: Guard, value: float) -> bool:
    return value > guard.threshold if guard.rule == "above" else value < guard.threshold


def _reset(state: _Picture, signal: Array) -> None:
    state.earlier, state.total, state.fires = signal.copy(), 0.0, 0


def _polynomial(coefficients: Sequence[float], value: float) -> float:
    """Horner's rule, highest power first; without coefficients the value itself."""
    total = 0.0
    for coefficient in coefficients or (1.0, 0.0):
        total = total * value + coefficient
    return total
