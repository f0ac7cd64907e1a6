"""What a search decides. A point of a space is options of `make_plan`: kinds that are drawn, numbers that are refined.

Times are held as sticks: row i takes the share 1 / (1 + e^-y_i) of what is left between the row before it and the end,
so any numbers y make a grid that falls, and y_i changes nothing before row i - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.solvers import solver_options
from vivace.engine.timesteps import make_grid, require_steps
from vivace.errors import ArgumentError

SEGMENTS = ("start", "middle", "end")  # thirds of the rows, which are decided together at first
STICK, FACTOR, SHIFT, LEVEL = 0.25, 0.3, 0.02, 0.3  # units of the refinement's steps
KARRAS = 7.0


@dataclass(frozen=True)
class Point:
    """kinds: options that are not numbers, one a row; values: numbers, one for every knob."""

    kinds: Mapping[str, Any]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Knob:
    """A number of a point: first: the row whose step it changes first; scale: its unit."""

    name: str
    first: int
    scale: float


class Space(Protocol):
    """Points of one solver."""

    @property
    def solver(self) -> str:
        """Its name."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON data: everything that points depend on."""
        ...

    def known(self) -> Sequence[Mapping[str, Any]]:
        """Parameters of `suggest` to begin with."""
        ...

    def suggest(self, trial: Any) -> Point:
        """A point from a trial's `suggest_categorical` and `suggest_float`, as `optuna` has them."""
        ...

    def knobs(self, point: Point) -> tuple[Knob, ...]:
        """What the values of a point are."""
        ...

    def options(self, point: Point) -> dict[str, Any]:
        """steps, timesteps and options of `make_plan`."""
        ...


def warped(steps: int, early: float, late: float) -> list[float]:
    """Shares s of the way from noise to data, one a row: s(u) = (1 - (1 - u)^(1/late))^(1/early), u = 0, 1/N, ...

    The quantiles of Kumaraswamy's law: early < 1 is denser at the noise end, late < 1 at the data end, (1, 1) even.
    """
    u = np.arange(steps) / steps
    return [float(s) for s in (1.0 - (1.0 - u) ** (1.0 / late)) ** (1.0 / early)]


def sticks_of(shares: Sequence[float]) -> list[float]:
    """y of shares that rise from 0."""
    parts = [(b - a) / (1.0 - a) for a, b in zip(shares, shares[1:], strict=False)]
    parts = [min(max(part, 1e-9), 1.0 - 1e-9) for part in parts]
    return [math.log(part) - math.log1p(-part) for part in parts]


def shares_of(sticks: Sequence[float]) -> list[float]:
    """Shares of sticks: 0 first, each below 1."""
    shares = [0.0]
    for y in sticks:
        part = 1.0 / (1.0 + math.exp(-min(max(y, -30.0), 30.0)))
        shares.append(shares[-1] + (1.0 - shares[-1]) * part)
    return shares


def timesteps_of(schedule: NoiseSchedule, shares: Sequence[float]) -> list[float]:
    """Timesteps at shares of the way from noise to data, in t (VP; flow before its shift) or sigma^(1/7) (EDM)."""
    way = np.asarray(shares, dtype=np.float64)
    if schedule.kind == "edm":
        high, low = (sigma ** (1.0 / KARRAS) for sigma in (schedule.sigma_max, schedule.sigma_min))
        times = (high + way * (low - high)) ** KARRAS
    elif schedule.kind == "flow":
        times = schedule.shifted(1.0 - way)
    else:
        times = schedule.noise_end + way * (schedule.data_end - schedule.noise_end)
    return [float(t) for t in schedule.timestep(times)]


@dataclass(frozen=True)
class TimestepSpace:
    """Where a solver evaluates, everything else as it is. Source: Li et al. 2023 (AutoDiffusion), section 3.2."""

    solver: str
    schedule: NoiseSchedule
    steps: int
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_steps(self.steps)
        known = solver_options(self.solver)
        for name in ("table", "fed"):
            if self.fixed.get(name) is not None:
                raise ArgumentError(f"search: {name} belongs to given timesteps; drop it, or refine it afterwards")
        unknown = [name for name in self.fixed if name not in known]
        if unknown:
            raise ArgumentError(f"search: {self.solver} has no option {unknown[0]!r}; known: {', '.join(known)}")

    def describe(self) -> dict[str, Any]:
        """As in `Space`."""
        return {"space": "timesteps", "solver": self.solver, "steps": self.steps, "fixed": dict(self.fixed)}

    def known(self) -> Sequence[Mapping[str, Any]]:
        """The even grid, and one that is denser at the data end."""
        return ({"early": 1.0, "late": 1.0}, {"early": 1.2, "late": 0.65})

    def suggest(self, trial: Any) -> Point:
        """A warped grid."""
        return Point({}, tuple(sticks_of(_warp(trial, self.steps))))

    def knobs(self, point: Point) -> tuple[Knob, ...]:
        """One a row but the first."""
        return tuple(Knob(f"time {row}", row - 1, STICK) for row in range(1, self.steps))

    def options(self, point: Point) -> dict[str, Any]:
        """As in `Space`."""
        times = timesteps_of(self.schedule, shares_of(point.values))
        return {"steps": self.steps, "timesteps": times, **self.fixed}


@dataclass(frozen=True)
class UsfSpace:
    """Everything `usf` decides. evaluations: of the network; free: whether a free first row may be tried;

    shift: also refine the timestep that the network is fed, apart from the level; highest: order tried.
    Source: Liu et al. 2023 (S3), section 3.3.
    """

    schedule: NoiseSchedule
    evaluations: int
    free: bool = True
    shift: bool = True
    highest: int = 3
    solver: str = "usf"

    def __post_init__(self) -> None:
        require_steps(self.evaluations)
        for name, value in (("free", self.free), ("shift", self.shift)):
            if not isinstance(value, bool):
                raise ArgumentError(f"search: {name} is true or false, got {value!r}")
        if isinstance(self.highest, bool) or not isinstance(self.highest, int) or not 1 <= self.highest <= 4:
            raise ArgumentError(f"search: highest order {self.highest!r}; usf has 1 to 4")
        make_grid(self.schedule, self.evaluations + 1)  # enough training timesteps

    def describe(self) -> dict[str, Any]:
        """As in `Space`."""
        flags = {"free": self.free, "shift": self.shift, "highest": self.highest}
        return {"space": "usf", "solver": self.solver, "steps": self.evaluations, **flags}

    def known(self) -> Sequence[Mapping[str, Any]]:
        """The second order in x0 and lam on three grids, and in t; the second order in eps at the start."""
        even, dense = {"early": 1.0, "late": 1.0}, {"early": 1.2, "late": 0.65}
        return (
            {**even, **_alike(min(2, self.highest), "x0", "lam")},
            {**dense, **_alike(min(2, self.highest), "x0", "lam")},
            {**dense, **_alike(min(2, self.highest), "x0", "t")},
            {**dense, **_alike(min(2, self.highest), "x0", "t"), "start.form": "eps"},
        )

    def suggest(self, trial: Any) -> Point:
        """A warped grid; order, form, variable, corrector and relaxation of every third of the rows."""
        free = self.free and trial.suggest_categorical("free", [False, True])
        rows = self.evaluations + int(free)
        sticks = sticks_of(_warp(trial, rows))
        columns: dict[str, list[Any]] = {"orders": [], "forms": [], "variables": [], "corrected": []}
        factors: list[float] = []
        chosen = {name: self._segment(trial, name) for name in SEGMENTS}
        for row in range(rows):
            order, form, variable, corrected, factor = chosen[SEGMENTS[len(SEGMENTS) * row // rows]]
            last = row == rows - 1
            columns["orders"].append(order)
            columns["forms"].append(form)
            columns["variables"].append("rho" if last and form == "eps" else variable)  # finite at sigma = 0
            columns["corrected"].append(corrected and not last)
            factors += [factor] * _differences(row, order, form, last)
        kinds = {**columns, "free": free}
        shifts = [0.0] * (rows - 1) if self.shift else []
        level = [trial.suggest_float("level", -0.5, 0.5)] if free else []
        return Point(kinds, (*sticks, *factors, *shifts, *level))

    def _segment(self, trial: Any, name: str) -> tuple[int, str, str, bool, float]:
        order = trial.suggest_int(f"{name}.order", 1, self.highest)
        form = trial.suggest_categorical(f"{name}.form", ["x0", "eps"])
        variable = trial.suggest_categorical(f"{name}.variable", ["lam", "rho", "t"])
        corrected = trial.suggest_categorical(f"{name}.corrected", [False, True])
        return order, form, variable, corrected, trial.suggest_float(f"{name}.factor", 0.0, 1.3)

    def knobs(self, point: Point) -> tuple[Knob, ...]:
        """Times, factors of divided differences, shifts, the level of the free row."""
        kinds = point.kinds
        rows = len(kinds["orders"])
        found = [Knob(f"time {row}", row - 1, STICK) for row in range(1, rows)]
        for row in range(rows):
            count = _differences(row, kinds["orders"][row], kinds["forms"][row], row == rows - 1)
            found += [Knob(f"factor {row}.{k}", row, FACTOR) for k in range(1, count + 1)]
        if self.shift:
            found += [Knob(f"shift {row}", row, SHIFT) for row in range(1, rows)]
        return (*found, Knob("level", 0, LEVEL)) if kinds["free"] else tuple(found)

    def options(self, point: Point) -> dict[str, Any]:
        """As in `Space`."""
        kinds, numbers = point.kinds, dict(zip((k.name for k in self.knobs(point)), point.values, strict=True))
        rows = len(kinds["orders"])
        times = timesteps_of(self.schedule, shares_of(point.values[: rows - 1]))
        relaxation = [
            [numbers[f"factor {row}.{k}"] for k in range(1, 4) if f"factor {row}.{k}" in numbers] for row in range(rows)
        ]
        made: dict[str, Any] = {name: list(kinds[name]) for name in ("orders", "forms", "variables", "corrected")}
        made |= {"steps": rows, "timesteps": times, "relaxation": relaxation}
        if self.shift:
            made["fed"] = [self._fed(time, numbers.get(f"shift {row}", 0.0)) for row, time in enumerate(times)]
        return made | ({"afs": numbers["level"]} if kinds["free"] else {})

    def _fed(self, time: float, shift: float) -> float:
        """A timestep moved by a share of the range, EDM by a factor; never outside."""
        high, low = (float(self.schedule.timestep(t)) for t in (self.schedule.noise_end, self.schedule.data_end))
        moved = time * math.exp(shift) if self.schedule.kind == "edm" else time + shift * (high - low)
        return min(max(moved, low), high)


def _warp(trial: Any, rows: int) -> list[float]:
    early = trial.suggest_float("early", 0.6, 2.5, log=True)
    return warped(rows, early, trial.suggest_float("late", 0.3, 1.2, log=True))


def _alike(order: int, form: str, variable: str) -> dict[str, Any]:
    """Parameters of a schedule whose rows are alike."""
    decided = {"order": order, "form": form, "variable": variable, "corrected": False, "factor": 1.0}
    return {"free": False} | {f"{part}.{name}": value for part in SEGMENTS for name, value in decided.items()}


def _differences(row: int, order: int, form: str, last: bool) -> int:
    """Divided differences that a row reads: of the rows there are; none in a step of x0 to sigma = 0."""
    return 0 if last and form == "x0" else min(order, row + 1) - 1
