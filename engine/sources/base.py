"""What a source of steps is, and what it asks of the run that follows it.

A source starts a `Course` for every picture. The course hands out rows (`Window`), the run executes them, measures what
was asked for, and the course decides by that one number what comes next: accept the rows and go on, or try others from
the same state. Rows tried on one state share its evaluation, so that a second try costs one evaluation less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes.guidance import apply_guidance
from vivace.engine.plan import PREDICTIONS, Affine, Plan, Step
from vivace.engine.timesteps import choose
from vivace.engine.verify import MAX_ROWS
from vivace.errors import ArgumentError, StateError

KINDS = ("error", "variance")
START = "start"  # names x as it was before the rows of a window, among the slots of `Measure.low`


@dataclass(frozen=True, slots=True)
class Measure:
    """One number about one picture after some rows.

    variance: sum((x - mean x)^2) / (D - 1) over its D elements.
    error: sqrt(mean(((x - low) / max(atol, rtol max(|low|, |before|)))^2)), low = sum of coef * slot, where the slot
        "start" is x before these rows and `before` is low of the last rows that were taken, at first x.
    """

    kind: str
    low: tuple[tuple[str, float], ...] = ()
    atol: float = 0.0
    rtol: float = 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """Rows `first` .. `stop` - 1 of `plan` are to run next, then `measure` is wanted.

    plan: has the row after them too, so that its input is written. offset: rows taken before the plan's own first one.
    retry: from the state before the last window, whose first row has the predictions that it had then.
    """

    plan: Plan
    first: int
    stop: int
    measure: Measure | None = None
    offset: int = 0
    retry: bool = False


class Course(Protocol):
    """The rows of one picture, as they are decided."""

    def next(self, measured: float | None) -> Window | None:
        """What runs next, told what was measured after the last window; None at the start and where nothing was.

        Returns None when the picture is finished. Raises: StateError when the method cannot go on.
        """
        ...

    def recorded(self) -> Plan:
        """The plan of the rows taken, unbound; whoever runs it verifies it."""
        ...

    def told(self) -> dict[str, int]:
        """Counts for the receipt: "tries", "rejected", "rows" and what else the method counts."""
        ...


@runtime_checkable
class StepSource(Protocol):
    """A method that decides rows at run time; immutable, shared by any number of pictures."""

    @property
    def name(self) -> str:
        """Of the method, for receipts."""
        ...

    @property
    def prediction(self) -> str:
        """What the network returns, "eps" | "x0" | "v" | "flow"."""
        ...

    def start(self) -> Course:
        """A new picture."""
        ...


def opened(given: Plan | StepSource) -> Plan:
    """A plan, or that of a source's first window: what a model must be able to run. Raises: ArgumentError."""
    if isinstance(given, Plan):
        return given
    if not isinstance(given, StepSource):
        raise ArgumentError(f"compile: a {type(given).__name__} is no plan; use make_plan, or a source of steps")
    window = given.start().next(None)
    if window is None:
        raise ArgumentError(f"{given.name}: the source gives no rows")
    return window.plan


@dataclass(frozen=True, slots=True)
class Common:
    """What every source here is told beside its own numbers: schedule, prediction, guidance."""

    schedule: NoiseSchedule
    prediction: str
    guidance: float = 1.0
    rescale: float = 0.0

    def check(self, name: str) -> Common:
        """Itself, when all of it can be used. Raises ArgumentError."""
        if not isinstance(self.schedule, NoiseSchedule):
            raise ArgumentError(f"{name}: schedule is {type(self.schedule).__name__}; a NoiseSchedule is needed")
        choose(f"{name}: prediction", self.prediction, PREDICTIONS)
        if self.guidance == 1.0 and self.rescale:
            raise ArgumentError(f"{name}: rescale {self.rescale} without guidance; give guidance= other than 1")
        self.plan(())  # guidance is checked by its pass
        return self

    @property
    def scale(self) -> float:
        """Factor of the noise in the first state."""
        return self.schedule.sigma_max if self.schedule.kind == "edm" else 1.0

    def plan(self, rows: tuple[Step, ...]) -> Plan:
        """A plan of these rows, which whoever runs it verifies; of one that does nothing when there are none."""
        level = self.schedule.data_end
        still = Step(
            self.schedule.timestep(level),
            self.schedule.alpha(level),
            self.schedule.sigma(level),
            (Affine("x", (("x", 1.0), ("out", 1.0))),),
        )
        made = Plan(rows or (still,), self.prediction, (Affine("x", (("noise:0", self.scale),)),))
        if self.guidance == 1.0:
            return made
        return apply_guidance(made, self.guidance, rescale=self.rescale)


def next_length(name: str, measured: float | None, tries: int, length: float, safety: float, power: float) -> float:
    """length * safety * error^-power; infinite for an error of 0. Raises StateError for NaN and for too many tries."""
    if measured is None or not math.isfinite(measured):
        raise StateError(
            f"{name}: the error of try {tries} is {measured}; the network's predictions are not finite there"
        )
    if tries >= MAX_ROWS // 4:
        raise StateError(f"{name}: {tries} tries and no end; use larger atol and rtol")
    return math.inf if measured == 0.0 else length * safety * measured**-power


def positive(name: str, **values: Any) -> None:
    """Raise ArgumentError unless each is a finite number above 0."""
    for option, value in values.items():
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or value <= 0.0:
            raise ArgumentError(f"{name}: {option} must be a finite number above 0, got {value!r}")
