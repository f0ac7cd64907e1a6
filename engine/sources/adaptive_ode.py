"""DPM-Solver-12 and -23 with a step size for every picture: two orders from the same evaluations, their gap the error.

A step from lam to lam + h, inner evaluations at shares r of it (order 2: 1/2; order 3: 1/3 and 2/3):
  low   order p - 1: the first-order step (p = 2), or the second-order one with r = 1/3 (p = 3)
  x'    the singlestep rule of order p
  E = rms((x' - low) / max(atol, rtol max(|low|, |low before|)));  taken where E <= 1
  h <- min(remaining, safety h E^(-1/p))
Source: Lu, Zhou, Bao, Chen, Li and Zhu 2022 (DPM-Solver), appendix C; in x0 form as DPM-Solver++.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes.guidance import rename
from vivace.engine.plan import Affine, Plan, Step
from vivace.engine.prediction import to_x0
from vivace.engine.solvers.rows import Level, affine, require_order
from vivace.engine.solvers.singlestep import singlestep_rows, stage_update
from vivace.engine.sources.base import START, Common, Course, Measure, Window, next_length, positive
from vivace.engine.timesteps import FINALS, Grid, choose
from vivace.errors import ArgumentError, StateError

NAME = "adaptive_ode"
PLACES = {2: (0.5,), 3: (1.0 / 3.0, 2.0 / 3.0)}  # shares of a step, in lam
STAGES = ("u", "w")  # slots of the inner states
Low = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class AdaptiveODE:
    """DPM-Solver of order 2 or 3 with adaptive steps in lam, each picture its own.

    Args:
        schedule, prediction: of the model.
        order: 2 ("12", two evaluations a try) or 3 ("23", three).
        form: "eps" (DPM-Solver) or "x0" (DPM-Solver++).
        rtol, atol: relative and absolute tolerance, in units of x.
        first: length of the first step in lam; safety: of the step size rule.
        final: "zero": x0 of the last state is the result (one evaluation more); "sigma_min": the last state is.
        guidance, rescale: of classifier-free guidance, as in `passes.apply_guidance`; 1: none.
    Raises: ArgumentError; StateError at run time when predictions are not finite or the steps get too small.
    Source: as in the head of the file; defaults are those of the authors' code.
    """

    schedule: NoiseSchedule
    prediction: str = "eps"
    order: int = 2
    form: str = "eps"
    rtol: float = 0.05
    atol: float = 0.0078
    first: float = 0.05
    safety: float = 0.9
    final: str = "zero"
    guidance: float = 1.0
    rescale: float = 0.0
    common: Common = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        common = Common(self.schedule, self.prediction, self.guidance, self.rescale).check(NAME)
        if require_order(NAME, self.order, 3) == 1:
            raise ArgumentError(f"{NAME}: order 1 has no lower one to compare with; use 2 or 3")
        choose(f"{NAME}: form", self.form, ("eps", "x0"))
        positive(NAME, rtol=self.rtol, atol=self.atol, first=self.first, safety=self.safety)
        if self.safety >= 1.0:
            raise ArgumentError(f"{NAME}: safety {self.safety}; need safety < 1")
        choose(f"{NAME}: final", self.final, FINALS)
        object.__setattr__(self, "common", common)

    @property
    def name(self) -> str:
        """Of the method."""
        return NAME

    def start(self) -> Course:
        """A new picture."""
        return _Course(self)

    def tried(self, lam: float, h: float) -> tuple[tuple[Step, ...], Low]:
        """The rows of one try from lam to lam + h, and the lower-order result as a sum of slots."""
        places = (0.0, *PLACES[self.order], 1.0)
        points = [self.at(lam + place * h) for place in places]
        grid = _grid(points, self.schedule)
        steps = list(singlestep_rows(grid, self.prediction, [self.order], "midpoint", form=self.form))
        if self.order == 3:  # the second inner state has a slot of its own: the lower order reads the first one
            *kept, write = steps[1].ops
            assert isinstance(write, Affine)
            steps[1] = replace(steps[1], ops=(*kept, replace(write, dst=STAGES[1])))
            ops = tuple(rename(op, {STAGES[0]: STAGES[1]}) for op in steps[2].ops)
            steps[2] = replace(steps[2], x=STAGES[1], ops=ops)
        return tuple(steps), self._low(grid, points)

    def at(self, lam: float) -> tuple[float, Level]:
        """Timestep and level of a log-SNR."""
        return Grid((), (1.0,), (1.0,), self.schedule).at_lam(lam)

    def last(self, lam: float) -> Step:
        """The row that ends at x0."""
        timestep, level = self.at(lam)
        p, q = to_x0(self.prediction, *level)
        return Step(timestep, *level, (affine("x", ("x", p), ("out", q)),))

    def _low(self, grid: Grid, points: list[tuple[float, Level]]) -> Low:
        """The result of order p - 1 from x at the start and the inner states, which stand for the predictions.

        u = a x + b m0 gives m0 = (u - a x) / b; w = a x + b1 m1 + b0 m0 gives m1. low = keep x + sum of weights m.
        """
        inner = stage_update(grid, 0, 1, "midpoint", self.form, last=False)
        m0 = {START: -inner.keep / inner.weights[0], STAGES[0]: 1.0 / inner.weights[0]}
        if self.order == 2:
            low = stage_update(_grid([points[0], points[2]], self.schedule), 0, 1, "midpoint", self.form, last=True)
            return _sum((low.keep, {START: 1.0}), (low.weights[0], m0))
        second = stage_update(grid, 0, 2, "heun", self.form, last=False)
        newest, oldest = second.weights
        m1 = dict(_sum((1.0 / newest, {STAGES[1]: 1.0, START: -second.keep}), (-oldest / newest, m0)))
        whole = _grid([points[0], points[1], points[3]], self.schedule)
        low = stage_update(whole, 0, 2, "midpoint", self.form, last=True)
        return _sum((low.keep, {START: 1.0}), (low.weights[0], m1), (low.weights[1], m0))


def _sum(*parts: tuple[float, dict[str, float]]) -> Low:
    """Sum of factor * (sum of coefficient * slot)."""
    total: dict[str, float] = {}
    for factor, terms in parts:
        for slot, coef in terms.items():
            total[slot] = total.get(slot, 0.0) + factor * coef
    return tuple(total.items())


def _grid(points: list[tuple[float, Level]], schedule: NoiseSchedule) -> Grid:
    """Evaluations at all points but the last, which is where the step ends."""
    alphas, sigmas = zip(*(level for _, level in points), strict=True)
    return Grid(tuple(timestep for timestep, _ in points[:-1]), alphas, sigmas, schedule)


class _Course:
    """Accept and reject."""

    def __init__(self, source: AdaptiveODE) -> None:
        self.source = source
        schedule = source.schedule
        self.lam, self.end = schedule.lam(schedule.finite_end), schedule.lam(schedule.data_end)
        self.h = min(source.first, self.end - self.lam)
        self.taken: list[Step] = []
        self.tries = self.rejected = 0
        self.rows: tuple[Step, ...] = ()  # on trial
        self.plan: Plan | None = None
        self.closed = False

    def next(self, measured: float | None) -> Window | None:
        """Decide on the rows on trial, then the next try, the last row, or the end."""
        source, retry = self.source, False
        if self.rows:
            longer = next_length(NAME, measured, self.tries, self.h, source.safety, 1.0 / source.order)
            retry = measured is None or measured > 1.0
            if retry:
                self.rejected += 1
            else:
                self.taken += self.rows
                self.lam = self._after()
            self.rows, self.h = (), min(longer, self.end - self.lam)
        if self.lam < self.end:
            return self._try(retry)
        if self.closed or source.final == "sigma_min" or self.plan is None:
            return None
        self.closed = True
        self.taken.append(source.last(self.end))
        return Window(self.plan, source.order, source.order + 1, offset=len(self.taken) - source.order - 1)

    def _after(self) -> float:
        """lam behind the step; the end exactly, however the sum rounds."""
        return self.end if self.h >= self.end - self.lam else self.lam + self.h

    def _try(self, retry: bool) -> Window:
        source, after = self.source, self._after()
        if not after > self.lam:
            raise StateError(f"{NAME}: step {self.h} at lam {self.lam} is lost in rounding; use larger atol and rtol")
        self.tries += 1
        self.rows, low = source.tried(self.lam, after - self.lam)
        self.plan = source.common.plan((*self.rows, source.last(after)))
        return Window(
            self.plan, 0, source.order, Measure("error", low, source.atol, source.rtol), len(self.taken), retry
        )

    def recorded(self) -> Plan:
        """The rows taken."""
        return self.source.common.plan(tuple(self.taken))

    def told(self) -> dict[str, int]:
        """tries, those rejected, rows taken."""
        return {"tries": self.tries, "rejected": self.rejected, "rows": len(self.taken)}
