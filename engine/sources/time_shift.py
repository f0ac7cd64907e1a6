"""Time-Shift: after every row the time that fits the state's own variance takes the place of the scheduled one.

x of row i was made for time t_{i+1}. Among t' = t_{i+1} + k, |k| <= window / 2, the row i + 1 is fed, and steps from,
the one with sigma(t')^2 nearest to the variance of x over its elements; the row still ends at t_{i+2}. Rows whose
scheduled time is at or below `cutoff` keep it. Source: Li, Qu, Yao, Sun and Moens 2023 (arXiv 2305.15583), algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Args, Plan, Step
from vivace.engine.solvers import solver_options, solver_rows
from vivace.engine.sources.base import Common, Course, Measure, Window
from vivace.engine.timesteps import Grid, choose, make_grid
from vivace.errors import ArgumentError, StateError, UnsupportedError

NAME = "time_shift"


@dataclass(frozen=True, slots=True)
class TimeShift:
    """Any solver of one evaluation a row, with every picture's times shifted to fit its variance.

    Args:
        schedule, prediction: of the model; the schedule is VP.
        solver, steps, grid, final: as in `make_plan`; options: of the solver.
        window: width, in training timesteps, of the times looked at around the scheduled one; 0: the solver itself.
        cutoff: rows scheduled at or below this timestep keep their time.
        guidance, rescale: of classifier-free guidance, as in `passes.apply_guidance`; 1: none.
    A shifted time stays below that of the row before and above the time its own row steps to.
    Raises: ArgumentError; UnsupportedError for other schedules and for solvers with inner evaluations.
    Source: as in the head of the file; the defaults are the published ones of a few large steps.
    """

    schedule: NoiseSchedule
    prediction: str = "eps"
    solver: str = "ddim"
    steps: int = 10
    window: float = 30.0
    cutoff: float = 300.0
    grid: str | None = None
    final: str = "zero"
    options: Any = ()
    guidance: float = 1.0
    rescale: float = 0.0
    common: Common = field(init=False, repr=False, compare=False)
    planned: Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        common = Common(self.schedule, self.prediction, self.guidance, self.rescale).check(NAME)
        if self.schedule.kind != "vp":
            raise UnsupportedError(f"{NAME}: schedule of kind {self.schedule.kind!r}; variances are those of VP only")
        for name, value in (("window", self.window), ("cutoff", self.cutoff)):
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not fits or value < 0.0:
                raise ArgumentError(f"{NAME}: {name} must be a finite number of timesteps >= 0, got {value!r}")
        for name in Args.of(dict(self.options)).to_dict():
            choose(f"{self.solver}: option", name, tuple(solver_options(self.solver)))
        object.__setattr__(self, "options", Args.of(dict(self.options)))
        object.__setattr__(self, "common", common)
        object.__setattr__(self, "planned", make_grid(self.schedule, self.steps, grid=self.grid, final=self.final))
        common.plan(self.rows(()))

    @property
    def name(self) -> str:
        """Of the method."""
        return NAME

    def start(self) -> Course:
        """A new picture."""
        return _Course(self)

    def rows(self, times: tuple[float, ...]) -> tuple[Step, ...]:
        """Rows on the planned grid with its first times replaced by these."""
        planned = self.planned
        levels = [
            planned.level(row) if t == planned.timesteps[row] else (self.schedule.alpha(t), self.schedule.sigma(t))
            for row, t in enumerate(times)
        ]
        alphas, sigmas = (tuple(level[k] for level in levels) for k in (0, 1))
        count = len(times)
        grid = Grid(
            (*times, *planned.timesteps[count:]),
            (*alphas, *planned.alphas[count:]),
            (*sigmas, *planned.sigmas[count:]),
            self.schedule,
        )
        made = solver_rows(self.solver, grid, self.prediction, self.options.to_dict())
        if len(made.steps) != grid.steps or made.arrays or any(step.x != "x" for step in made.steps):
            raise UnsupportedError(f"{NAME}: solver {self.solver!r} has rows between its steps or tensors; use another")
        return made.steps

    def nearest(self, row: int, before: float, variance: float) -> float:
        """The time of row `row` for a state of this variance; before: the time of the row before it."""
        schedule, scheduled = self.schedule, self.planned.timesteps[row]
        half = int(self.window / 2.0)
        times = scheduled + np.arange(-half, half + 1, dtype=np.float64)
        after = schedule.data_end if row + 1 == self.planned.steps else self.planned.timesteps[row + 1]
        inside = (times < before) & (times > after) & (times <= schedule.noise_end)
        times = np.append(times[inside & (times != scheduled)], scheduled)
        gaps = np.abs(schedule.sigma(times) ** 2 - variance)
        best = gaps == gaps.min()
        return float(times[best][np.abs(times[best] - scheduled).argmin()])


class _Course:
    """The times of one picture."""

    def __init__(self, source: TimeShift) -> None:
        self.source = source
        self.times = source.planned.timesteps
        self.row = 0  # that runs next
        self.shifted = self.looked = 0
        self.rows = source.rows(())

    def next(self, measured: float | None) -> Window | None:
        """Choose the time of the next row, then say up to where no choice is left."""
        source, steps = self.source, self.source.planned.steps
        if self.row == steps:
            return None
        if self.row:
            if measured is None or not math.isfinite(measured):
                raise StateError(
                    f"{NAME}: the variance before row {self.row} is {measured}; predictions are not finite"
                )
            self.looked += 1
            time = source.nearest(self.row, self.times[self.row - 1], measured)
            if time != self.times[self.row]:
                self.shifted += 1
                self.times = (*self.times[: self.row], time, *self.times[self.row + 1 :])
                self.rows = (*self.rows[: self.row], *source.rows(self.times[: self.row + 1])[self.row :])
        first, self.row = self.row, self.row + 1
        choice = source.window > 0 and self.row < steps and source.planned.timesteps[self.row] > source.cutoff
        if not choice:
            self.row = steps
        return Window(self.recorded(), first, self.row, Measure("variance") if choice else None)

    def recorded(self) -> Plan:
        """All rows, those that were shifted at their shifted times."""
        return self.source.common.plan(self.rows)

    def told(self) -> dict[str, int]:
        """Tries are rows; looked: variances read; shifted: rows at another time than the scheduled one."""
        count = len(self.rows)
        return {"tries": count, "rejected": 0, "rows": count, "looked": self.looked, "shifted": self.shifted}
