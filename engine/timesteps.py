"""Grids: the noise levels at which the network is evaluated, and the level of the result.

Explicit `timesteps` are what the network is fed; explicit `sigmas` are sigma/alpha for VP (the convention of
`diffusers` and k-diffusion), sigma for EDM, t for flow; both are taken as they are, without shift.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vivace.engine.noise_schedule import FloatArray, NoiseSchedule, as_numpy
from vivace.errors import ArgumentError

GRIDS = ("uniform", "linspace", "leading", "trailing", "logsnr", "karras", "exponential", "beta")
BETA_SHAPE = 0.6  # both parameters of the "beta" grid
SPACINGS = ("linspace", "leading", "trailing")
FINALS = ("zero", "sigma_min")


@dataclass(frozen=True, slots=True)
class Grid:
    """N rows and a final level. timesteps [N]: as fed to the network; alphas, sigmas [N + 1]: last of the result.

    schedule: where the levels come from; solvers that evaluate between two rows, or interpolate in t, need it.
    first: rows of the full grid before these, of a tail.
    """

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    schedule: NoiseSchedule | None = field(default=None, compare=False, repr=False)
    first: int = field(default=0, compare=False, repr=False)

    @property
    def steps(self) -> int:
        """Number of rows N."""
        return len(self.timesteps)

    def level(self, index: int) -> tuple[float, float]:
        """(alpha, sigma) before row `index`; index N: of the result."""
        return self.alphas[index], self.sigmas[index]

    def lam(self, index: int) -> float:
        """log(alpha / sigma) of level `index`. Only for levels with both above 0."""
        return math.log(self.alphas[index]) - math.log(self.sigmas[index])

    def tail(self, first: int) -> Grid:
        """The grid from row `first` on."""
        cut = self.timesteps[first:], self.alphas[first:], self.sigmas[first:]
        return Grid(*cut, self.schedule, self.first + first)

    def known_schedule(self) -> NoiseSchedule:
        """`schedule`. Raises ArgumentError when the grid was made without one."""
        if self.schedule is None:
            raise ArgumentError("grid: levels between rows are needed; use a grid of make_grid or give it a schedule")
        return self.schedule

    def at_lam(self, lam: float) -> tuple[float, tuple[float, float]]:
        """(timestep, (alpha, sigma)) at a finite log-SNR; VP timesteps are clipped to the trained range."""
        schedule = self.known_schedule()
        if schedule.kind == "edm":
            level = 1.0, math.exp(-lam)
        elif schedule.kind == "flow":
            level = 1.0 / (1.0 + math.exp(-lam)), 1.0 / (1.0 + math.exp(lam))
        else:
            level = 1.0 / math.sqrt(1.0 + math.exp(-2.0 * lam)), 1.0 / math.sqrt(1.0 + math.exp(2.0 * lam))
        return schedule.timestep(schedule.t_of_lam(lam)), level


def make_grid(
    schedule: NoiseSchedule,
    steps: int,
    *,
    grid: str | None = None,
    timesteps: Any = None,
    sigmas: Any = None,
    final: str = "zero",
) -> Grid:
    """The grid of a plan: named, or explicit timesteps or sigmas, one per step.

    Args:
        steps: rows N, at least 1; VP: at most the number of training timesteps.
        grid: one of `GRIDS`; None: "karras" for EDM, else "uniform".
            uniform: t evenly spaced, unrounded. linspace, leading, trailing: integer training timesteps, spaced and
            rounded as the multistep schedulers of `diffusers` do. logsnr: lam evenly spaced. karras:
            (sigma/alpha)^(1/rho) evenly spaced (Karras et al. 2022, eq. 5; rho 7 except for EDM). exponential: log
            sigma evenly spaced, sigma as in explicit `sigmas`: for VP and EDM the same as logsnr. beta: t at evenly
            spaced quantiles of Beta(0.6, 0.6), denser at both ends (Lee et al. 2024). Flow grids are shifted.
        timesteps, sigmas: strictly towards less noise. A VP sigma beyond the trained range keeps its level; the network
            is fed the nearest trained timestep.
        final: "zero": the result has no noise; the last four grids spread N points down to sigma_min before it.
            "sigma_min": the result has the smallest trained level (VP: that of timestep 0); they spread N + 1 points.
    Raises: ArgumentError.
    """
    count = require_steps(steps)
    choose("final", final, FINALS)
    if schedule.kind == "vp" and schedule.train_steps is not None and count > schedule.train_steps:
        raise ArgumentError(f"steps: {count} is more than the {schedule.train_steps} training timesteps")
    if sum(given is not None for given in (grid, timesteps, sigmas)) > 1:
        raise ArgumentError("grid: give only one of grid, timesteps and sigmas")
    end = (1.0, 0.0) if final == "zero" else (schedule.alpha(schedule.data_end), schedule.sigma(schedule.data_end))
    if sigmas is not None:
        return _from_sigmas(schedule, numbers(sigmas, "sigmas", count), end)
    if timesteps is not None:
        times = numbers(timesteps, "timesteps", count) / schedule.timestep_scale
        return _from_times(schedule, times, end)
    name = grid if grid is not None else ("karras" if schedule.kind == "edm" else "uniform")
    choose("grid", name, GRIDS)
    return _from_times(schedule, _named(schedule, name, count, final)[:count], end, name)


def _named(schedule: NoiseSchedule, name: str, steps: int, final: str) -> FloatArray:
    """t of a named grid: at least `steps` points."""
    if name == "uniform":
        stop = schedule.data_end
        if schedule.kind == "flow":  # before the shift
            stop = 0.0 if final == "zero" else 1.0 / (schedule.train_steps or 1)
        return schedule.shifted(np.linspace(schedule.noise_end, stop, steps + 1))
    if name in SPACINGS:
        if schedule.train_steps is None:
            raise ArgumentError(f"grid {name!r}: needs training timesteps, edm has none; use karras, logsnr or uniform")
        index = spaced(name, schedule.train_steps, steps).astype(np.float64)
        return schedule.shifted((index + 1.0) / schedule.train_steps) if schedule.kind == "flow" else index
    points = steps if final == "zero" else steps + 1
    if name == "beta":
        return _beta(schedule, points)
    if name == "exponential" and schedule.kind == "flow":
        return np.exp(np.linspace(0.0, math.log(schedule.data_end), points))
    low, high = schedule.lam(schedule.finite_end), schedule.lam(schedule.data_end)
    if name in ("logsnr", "exponential"):
        lams = np.linspace(low, high, points)
    else:
        rho = schedule.rho
        lams = -rho * np.log(np.linspace(math.exp(-low / rho), math.exp(-high / rho), points))
    times = schedule.t_of_lam(lams)
    if points > 1:
        times[-1] = schedule.data_end
    times[0] = schedule.noise_end
    return times


def spaced(
    kind: str, train_steps: int, steps: int, *, offset: int = 0, points: int | None = None, last: int | None = None
) -> FloatArray:
    """Integer training timesteps, most noise first, spaced and rounded as `diffusers` does.

    linspace: round(linspace(0, last - 1, points)); leading: k * floor(last / points) + offset; both without the
    smallest where points = steps + 1. trailing: round(last - k * train_steps / steps) - 1 while above -1.
    Args:
        points: points spaced, steps + 1 (default) or steps; last: timesteps used, default all.
    Source: Lin et al. 2023, table 2.
    """
    points = steps + 1 if points is None else points
    last = train_steps if last is None else last
    if kind == "linspace":
        return np.asarray(np.linspace(0.0, last - 1, points).round()[::-1][:steps], dtype=np.float64)
    if kind == "leading":
        return np.arange(points, dtype=np.float64)[::-1][:steps] * (last // points) + offset
    return np.arange(last, 0, -train_steps / steps, dtype=np.float64).round()[:steps] - 1.0


def _beta(schedule: NoiseSchedule, points: int) -> FloatArray:
    """t at the quantiles of Beta(0.6, 0.6) from `noise_end` to `data_end`, before the shift of a flow."""
    shares = beta_quantile(np.linspace(1.0, 0.0, points), BETA_SHAPE, BETA_SHAPE)
    low = 1.0 / (schedule.train_steps or 1) if schedule.kind == "flow" else schedule.data_end
    return schedule.shifted(low + shares * (schedule.noise_end - low))


def beta_quantile(shares: FloatArray, a: float, b: float) -> FloatArray:
    """x with I_x(a, b) = share, the inverse of the regularised incomplete beta function, by bisection.

    shares: float64 [n] in [0, 1]; a, b > 0. Absolute error below 1e-14 where the density is above 1.
    """
    shares = np.asarray(shares, dtype=np.float64)
    low, high = np.zeros_like(shares), np.ones_like(shares)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = _incomplete_beta(middle, a, b) < shares
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares <= 0.0, 0.0, np.where(shares >= 1.0, 1.0, 0.5 * (low + high)))


def _incomplete_beta(x: FloatArray, a: float, b: float) -> FloatArray:
    """I_x(a, b): x^a / B(a, b) sum_n (1 - b)_n x^n / (n! (a + n)) for x <= 1/2, else 1 - I_{1-x}(b, a)."""
    flipped = x > 0.5
    z, one, two = np.where(flipped, 1.0 - x, x), np.where(flipped, b, a), np.where(flipped, a, b)
    term, total = np.ones_like(z), 1.0 / one
    for n in range(1, 64):
        term = term * (n - two) / n * z
        total = total + term / (one + n)
    share = z**one * total * math.gamma(a + b) / (math.gamma(a) * math.gamma(b))
    return np.where(flipped, 1.0 - share, share)


def resolution_shift(
    tokens: float,
    base_tokens: float = 256,
    max_tokens: float = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """mu, linear in the number of image tokens; `NoiseSchedule.flow(shift=math.exp(mu))` is the shift it stands for.

    mu = base_shift at base_tokens, max_shift at max_tokens; beyond both the line goes on. Raises: ArgumentError.
    Source: Esser et al. 2024, section 5.3.2 (shift with resolution), in its exponential form.
    """
    values = numbers((tokens, base_tokens, max_tokens, base_shift, max_shift), "resolution_shift")
    if values[:3].min() <= 0.0 or base_tokens == max_tokens:
        raise ArgumentError(
            f"resolution_shift: needs token counts above 0 and base_tokens != max_tokens, got {tokens}, {base_tokens}, "
            f"{max_tokens}"
        )
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(base_shift + slope * (tokens - base_tokens))


def _from_times(schedule: NoiseSchedule, times: FloatArray, end: tuple[float, float], name: str = "") -> Grid:
    """The grid of points t."""
    fed = schedule.timestep(times)
    what = f"grid {name!r}" if name else "timesteps"
    return _checked(schedule, fed, schedule.alpha(times), schedule.sigma(times), end, what)


def _from_sigmas(schedule: NoiseSchedule, sigmas: FloatArray, end: tuple[float, float]) -> Grid:
    """The grid of explicit sigmas."""
    if (sigmas <= 0.0).any():
        at = int(np.argmax(sigmas <= 0.0))
        raise ArgumentError(f"sigmas[{at}] = {sigmas[at]}: needs a level above 0; the final 0 is added by final='zero'")
    if schedule.kind != "vp":
        times = schedule.t_of_sigma(sigmas)
        return _checked(schedule, schedule.timestep(times), schedule.alpha(times), schedule.sigma(times), end, "sigmas")
    alphas = 1.0 / np.sqrt(1.0 + sigmas**2)
    return _checked(schedule, schedule.timestep(schedule.t_of_sigma(sigmas)), alphas, sigmas * alphas, end, "sigmas")


def _checked(
    schedule: NoiseSchedule,
    times: FloatArray,
    alphas: FloatArray,
    sigmas: FloatArray,
    end: tuple[float, float],
    what: str,
) -> Grid:
    """A grid whose noise falls strictly, the final level included."""
    alphas, sigmas = np.append(alphas, end[0]), np.append(sigmas, end[1])
    falls = sigmas[1:] * alphas[:-1] < sigmas[:-1] * alphas[1:]
    if not falls.all():
        at = int(np.argmin(falls))
        after = "the final level" if at == len(times) - 1 else f"row {at + 1} (timestep {times[at + 1]:g})"
        raise ArgumentError(
            f"{what}: noise must fall from row to row, but {after} is not below row {at} (timestep {times[at]:g}); "
            "use fewer steps or another grid"
        )
    return Grid(tuple(times.tolist()), tuple(alphas.tolist()), tuple(sigmas.tolist()), schedule)


def require_steps(steps: Any) -> int:
    """A number of steps: an integer of at least 1. Raises ArgumentError."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ArgumentError(f"steps: needs an integer of at least 1, got {steps!r}")
    return int(steps)


def numbers(values: Any, name: str, count: int | None = None) -> FloatArray:
    """Finite numbers as float64 [count]. Raises ArgumentError."""
    if isinstance(values, (str, bytes)) or not (isinstance(values, Iterable) or hasattr(values, "__array__")):
        raise ArgumentError(f"{name}: needs a list of numbers, got {values!r}")
    try:
        array = np.asarray(as_numpy(list(values) if isinstance(values, Sequence) else values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: needs a list of numbers ({error})") from error
    if array.ndim != 1 or array.size == 0:
        raise ArgumentError(f"{name}: needs a list of at least one number, got shape {array.shape}")
    if count is not None and array.size != count:
        raise ArgumentError(f"{name}: {array.size} given for steps={count}; give one per step")
    if not np.isfinite(array).all():
        at = int(np.argmin(np.isfinite(array)))
        raise ArgumentError(f"{name}[{at}]: needs a finite number, got {array[at]}")
    return array


def choose(what: str, name: Any, known: Sequence[str]) -> str:
    """`name` when it is one of `known`; else an ArgumentError that lists them and suggests the nearest."""
    if isinstance(name, str) and name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ArgumentError(f"{what}: unknown {name!r}; known: {', '.join(known) or 'none'}{hint}")
