"""The reverse SDE by stochastic improved Euler with a step size for every picture: "Gotta go fast".

With dx = f x dt + g dw the schedule's SDE (f = d log alpha/dt, g^2 = d sigma^2/dt - 2 f sigma^2), score s = -eps/sigma
and one draw z for both stages:
  u  = x - h f(t) x + h g(t)^2 s(x, t) + sqrt(h) g(t) z                                      (Euler-Maruyama)
  v  = x - h f(t-h) u + h g(t-h)^2 s(u, t-h) + sqrt(h) g(t-h) z
  x' = (u + v) / 2                                                                          (improved Euler)
  E  = rms((x' - u) / max(atol, rtol max(|u|, |u before|)));  taken where E <= 1;  h <- min(t - end, safety h E^-power)
Every try draws anew. The last row, of the result without noise, is x0 of the state at the smallest trained level.
Source: Jolicoeur-Martineau, Li, Piche-Taillefer, Kachman and Mitliagkas 2021 (arXiv 2105.14080), algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan, Step
from vivace.engine.prediction import to_eps, to_x0
from vivace.engine.solvers.rows import affine
from vivace.engine.sources.base import Common, Course, Measure, Window, next_length, positive
from vivace.engine.timesteps import FINALS, choose
from vivace.errors import ArgumentError, StateError

NAME = "adaptive_sde"


@dataclass(frozen=True, slots=True)
class AdaptiveSDE:
    """Stochastic improved Euler with adaptive steps, each picture its own.

    Args:
        schedule, prediction: of the model.
        rtol, atol: relative and absolute tolerance, in units of x; smaller is slower and finer.
        first: length of the first step, as a share of the whole span of t. safety, power: of the step size rule.
        final: "zero": x0 of the last state is the result (one evaluation more); "sigma_min": the last state is.
        guidance, rescale: of classifier-free guidance, as in `passes.apply_guidance`; 1: none.
    Raises: ArgumentError; StateError at run time when predictions are not finite or the steps get too small.
    Source: as in the head of the file; rtol 0.02 is the one of its table 1, atol one grey level of [-1, 1].
    """

    schedule: NoiseSchedule
    prediction: str = "eps"
    rtol: float = 0.02
    atol: float = 0.0078
    first: float = 0.01
    safety: float = 0.9
    power: float = 0.9
    final: str = "zero"
    guidance: float = 1.0
    rescale: float = 0.0
    common: Common = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        common = Common(self.schedule, self.prediction, self.guidance, self.rescale).check(NAME)
        positive(NAME, rtol=self.rtol, atol=self.atol, first=self.first, safety=self.safety, power=self.power)
        if self.first > 1.0 or self.safety >= 1.0:
            raise ArgumentError(f"{NAME}: first {self.first}, safety {self.safety}; need first <= 1 and safety < 1")
        choose(f"{NAME}: final", self.final, FINALS)
        object.__setattr__(self, "common", common)

    @property
    def name(self) -> str:
        """Of the method."""
        return NAME

    def start(self) -> Course:
        """A new picture."""
        return _Course(self)

    def tried(self, t: float, h: float, draw: int) -> tuple[Step, Step]:
        """The two rows of one try from t to t - h with draw number `draw`."""
        schedule, end = self.schedule, t - h
        (f, g2), (f_end, g2_end) = rates(schedule, t), rates(schedule, end)
        level, level_end = (schedule.alpha(t), schedule.sigma(t)), (schedule.alpha(end), schedule.sigma(end))
        noise, root = f"noise:{draw}", math.sqrt(h)
        p, q = to_eps(self.prediction, *level)
        push = -h * g2 / level[1]  # of eps
        euler = affine("u", ("x", 1.0 - h * f + push * p), ("out", push * q), (noise, root * math.sqrt(g2)))
        p, q = to_eps(self.prediction, *level_end)
        push = -h * g2_end / level_end[1]
        improved = affine(
            "x",
            ("x", 0.5),
            ("u", 0.5 * (1.0 - h * f_end + push * p)),
            ("out", 0.5 * push * q),
            (noise, 0.5 * root * math.sqrt(g2_end)),
        )
        return (
            Step(schedule.timestep(t), *level, (euler,)),
            Step(schedule.timestep(end), *level_end, (improved,), x="u"),
        )

    def last(self, t: float) -> Step:
        """The row that ends at x0."""
        level = self.schedule.alpha(t), self.schedule.sigma(t)
        p, q = to_x0(self.prediction, *level)
        return Step(self.schedule.timestep(t), *level, (affine("x", ("x", p), ("out", q)),))


def rates(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """(f, g^2) of the schedule's SDE per unit of t; VP: log alpha is linear between training timesteps, t counts down.

    At a training timestep the slope is that of the stretch towards less noise. flow: f = -1/(1-t), g^2 = 2t/(1-t).
    """
    if schedule.kind == "edm":
        return 0.0, 2.0 * t
    if schedule.kind == "flow":
        return -1.0 / (1.0 - t), 2.0 * t / (1.0 - t)
    upper = min(max(math.ceil(t), 1), len(schedule.log_alphas) - 1)
    slope = float(schedule.log_alphas[upper] - schedule.log_alphas[upper - 1])
    return slope, -2.0 * slope


class _Course:
    """Accept and reject."""

    def __init__(self, source: AdaptiveSDE) -> None:
        self.source = source
        schedule = source.schedule
        self.t, self.end = schedule.finite_end, schedule.data_end
        self.h = min(source.first * (self.t - self.end), self.t - self.end)
        self.taken: list[Step] = []
        self.tries = self.rejected = 0
        self.rows: tuple[Step, Step] | None = None  # on trial
        self.closed = False

    def next(self, measured: float | None) -> Window | None:
        """Decide on the rows on trial, then the next try, the last row, or the end."""
        retry = False
        if self.rows is not None:
            longer = next_length(NAME, measured, self.tries, self.h, self.source.safety, self.source.power)
            retry = measured is None or measured > 1.0
            if retry:
                self.rejected += 1
            else:
                self.taken += self.rows
                self.t = self._after(self.h)
            self.rows, self.h = None, min(longer, self.t - self.end)
        if self.t > self.end:
            return self._try(retry)
        if self.closed or self.source.final == "sigma_min":
            return None
        self.closed = True
        rows = (*self.taken[-2:], self.source.last(self.end))
        self.taken.append(rows[-1])
        return Window(self.source.common.plan(rows), 2, 3, offset=len(self.taken) - 3)

    def _after(self, h: float) -> float:
        """t behind a step; the end exactly, however t - (t - end) rounds."""
        return self.end if h >= self.t - self.end else self.t - h

    def _try(self, retry: bool) -> Window:
        after = self._after(self.h)
        if not after < self.t:
            raise StateError(f"{NAME}: step {self.h} at t {self.t} is lost in rounding; use larger atol and rtol")
        self.tries += 1
        self.rows = self.source.tried(self.t, self.t - after, self.tries)
        plan = self.source.common.plan((*self.rows, self.source.last(after)))
        measure = Measure("error", (("u", 1.0),), self.source.atol, self.source.rtol)
        return Window(plan, 0, 2, measure, len(self.taken), retry)

    def recorded(self) -> Plan:
        """The rows taken."""
        return self.source.common.plan(tuple(self.taken))

    def told(self) -> dict[str, int]:
        """tries, those rejected, rows taken."""
        return {"tries": self.tries, "rejected": self.rejected, "rows": len(self.taken)}
