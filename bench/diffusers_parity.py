"""Parity with `diffusers`: random scheduler configs, run by the scheduler and by the plan made of it.

Both sides run the same denoiser (the closed form of a two-mode mixture, at the level of the network's own input) and
the same normal draws. The float64 run of a scheduler has its tables of that run cast to float64 and its own casts to
float32 widened; it is the referee: where the scheduler's float32 run is off it, the plan may be off as much.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from vivace.bench.diffusers_configs import Case, random_case
from vivace.engine.noise import normals
from vivace.engine.plan import Plan
from vivace.engine.sample import sample
from vivace.errors import VivaceError

SHAPE = (2, 3, 2, 2)
SEED = 7
TOLERANCE_64, TOLERANCE_32 = 1e-9, 1e-5
OWN_ERRORS = 16.0  # of the scheduler's own rounding, where that is more; in float64 it is 2^-29 of that in float32
NO_DIGIT = 0.1  # own rounding beyond which the scheduler's float32 run says nothing
# What a scheduler raises on a config or request it cannot run; its NotImplementedError is among them.
CANNOT = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
TABLES = (
    "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "alphas_cumprod", "final_alpha_cumprod", "betas", "alphas",
    "one",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "agree", "deviate", "refused" (why: the field) or "cannot" (why: what diffusers did)."""

    case: Case
    kind: str
    why: str = ""
    gap_64: float = 0.0
    gap_32: float = 0.0
    own_32: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self.case.name, "config": self.case.config, "request": self.case.request, "kind": self.kind,
            "why": self.why, "gap_64": self.gap_64, "gap_32": self.gap_32, "own_32": self.own_32,
        }  # fmt: skip


def parity_report(count: int, seed: int = 0) -> dict[str, Any]:
    """Outcomes of `count` random configs.

    Returns: counts "agree", "deviate", "refused" (and "refused_by": field -> count), "cannot" (diffusers itself fails:
    "cannot_by"), "runnable" = count - cannot, "agree_fraction" of the runnable ones, "deviations" (list), worst gaps
    of those that agree, and the same counts by scheduler.
    """
    rng = np.random.default_rng(seed)
    return summary([run_case(random_case(rng)) for _ in range(count)])


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """The report of some outcomes."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    agreed = [outcome for outcome in outcomes if outcome.kind == "agree"]
    runnable = len(outcomes) - kinds["cannot"]
    by_scheduler: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        by_scheduler.setdefault(outcome.case.name, Counter())[outcome.kind] += 1
    return {
        "count": len(outcomes), "runnable": runnable,
        **{kind: kinds[kind] for kind in ("agree", "deviate", "refused", "cannot")},
        "agree_fraction": kinds["agree"] / max(runnable, 1),
        "refused_by": _reasons(outcomes, "refused"), "cannot_by": _reasons(outcomes, "cannot"),
        "worst_64": max((outcome.gap_64 for outcome in agreed), default=0.0),
        "worst_32": max((outcome.gap_32 for outcome in agreed), default=0.0),
        "beyond_32": sum(outcome.gap_32 > TOLERANCE_32 for outcome in agreed),
        "by_scheduler": {name: dict(counts) for name, counts in sorted(by_scheduler.items())},
        "deviations": [outcome.to_dict() for outcome in outcomes if outcome.kind == "deviate"],
    }  # fmt: skip


def _reasons(outcomes: list[Outcome], kind: str) -> dict[str, int]:
    found = Counter(f"{outcome.case.name}: {outcome.why}" for outcome in outcomes if outcome.kind == kind)
    return dict(found.most_common())


def run_case(case: Case) -> Outcome:
    """One config through both sides."""
    noise = np.random.default_rng(case.seed).normal(size=SHAPE).astype(np.float32).astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler = make_scheduler(case)
            tried = copy.deepcopy(scheduler)
            tried.set_timesteps(**case.theirs())
        except CANNOT as error:
            return Outcome(case, "cannot", f"{type(error).__name__} {error}"[:80])
        times = [float(t) for t in tried.timesteps[first_timestep(case, tried) :]]
        if min(times) < 0.0 and not case.name.startswith("EDM") and case.config.get("timestep_type") != "continuous":
            return Outcome(case, "cannot", "feeds a timestep below 0")
        try:
            plan = Plan.from_diffusers(scheduler, **case.ours())
        except VivaceError as error:
            plan, refusal = None, _named(error)
        denoiser = Mixture(plan, case, len(times))
        try:
            single, _ = run_diffusers(case, scheduler, denoiser, noise, torch.float32)
            shaken, _ = run_diffusers(case, scheduler, denoiser, noise, torch.float32, shake=True)
            exact, times = run_diffusers(case, scheduler, denoiser, noise, torch.float64)
        except CANNOT as error:
            return Outcome(case, "cannot", f"{type(error).__name__} {error}"[:80])
    if not (np.isfinite(exact).all() and np.isfinite(single).all()):
        return Outcome(case, "cannot", "NaN")
    own = max(gap(single, exact), gap(shaken, exact))
    if own > NO_DIGIT:
        return Outcome(case, "cannot", "no digit left in float32")
    if plan is None:
        return Outcome(case, "refused", refusal)
    if len(plan.steps) != len(times):
        return Outcome(case, "deviate", f"{len(plan.steps)} rows for {len(times)} timesteps")
    fed = np.array([step.timestep for step in plan.steps])
    if not np.allclose(fed, times, rtol=2e-6, atol=1e-3 if max(times) > 2.0 else 2e-6):
        return Outcome(case, "deviate", f"timesteps {fed.tolist()} for {times}")
    gaps = [
        gap(run_plan(plan, denoiser, noise, dtype), want) for dtype, want in ((np.float64, exact), (np.float32, single))
    ]
    limits = max(TOLERANCE_64, OWN_ERRORS * own * 2.0**-29), max(TOLERANCE_32, OWN_ERRORS * own)
    agree = gaps[0] <= limits[0] and gaps[1] <= limits[1]
    return Outcome(case, "agree" if agree else "deviate", "" if agree else "numbers", gaps[0], gaps[1], own)


def _named(error: VivaceError) -> str:
    """The field an error names, or its first words."""
    field = re.search(r": (\w+)=", str(error))
    return field[1] if field else f"{type(error).__name__}: {error}"[:80]


def gap(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest value."""
    difference = float(np.abs(got - want).max() / max(float(np.abs(want).max()), float(np.abs(got).max()), 1e-30))
    return difference if math.isfinite(difference) else math.inf


# ---------------------------------------------------------------- the two sides
def make_scheduler(case: Case) -> Any:
    """The scheduler of a case."""
    return getattr(import_module("diffusers.schedulers"), case.name)(**case.config)


def draw(k: int) -> np.ndarray:
    """The k-th normal draw of every sample, as `vivace.sample` makes it."""
    return np.stack([normals(SHAPE[1:], SEED, picture=j, draw=k) for j in range(SHAPE[0])])


def run_plan(plan: Plan, denoiser: Mixture, noise: np.ndarray, dtype: Any) -> np.ndarray:
    """The plan through `vivace.sample`."""
    rows = iter(range(len(plan.steps)))

    def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(denoiser(x.double().numpy(), next(rows))).to(x.dtype)

    inputs = {"start": torch.from_numpy(start_of(noise).astype(dtype))} if plan.inputs else None
    result = sample(call, plan, torch.from_numpy(noise.astype(dtype)), seed=SEED, inputs=inputs)
    return result.double().numpy()


def run_diffusers(
    case: Case, scheduler: Any, denoiser: Mixture, noise: np.ndarray, dtype: torch.dtype, *, shake: bool = False
) -> tuple[np.ndarray, list[float]]:
    """(result, timesteps) of the own loop of a copy of the scheduler in `dtype`; its draws are those of `draw`.

    shake: network outputs off by up to one rounding of float32, which shows how far rounding alone can carry.
    """
    scheduler = copy.deepcopy(scheduler)
    module = import_module(type(scheduler).__module__)
    draws, tremor = iter(range(1, 10_000)), np.random.default_rng(case.seed)

    def randn(shape: Any, *args: Any, **named: Any) -> torch.Tensor:
        return torch.from_numpy(draw(next(draws))).to(dtype)

    with ExitStack() as stack:
        if hasattr(module, "randn_tensor"):
            stack.enter_context(patch.object(module, "randn_tensor", randn))
        scheduler.set_timesteps(**case.theirs())
        if dtype == torch.float64:
            stack.enter_context(widened(module))
            cast_tables(scheduler)
        first = first_timestep(case, scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = torch.from_numpy(noise).to(dtype)
        if "strength" in case.request:
            x = noised(
                scheduler, torch.from_numpy(start_of(noise)).to(dtype), x, scheduler.timesteps[first : first + 1]
            )
        else:
            x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for row, t in enumerate(scheduler.timesteps[first:]):
            fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = denoiser(fed.double().numpy(), row)
            if shake:
                out = out * (1.0 + 2.0**-23 * tremor.uniform(-1.0, 1.0, size=SHAPE))
            out = torch.from_numpy(out).to(dtype)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        times = [float(t) for t in scheduler.timesteps[first:]]
    return x.double().numpy(), times


def first_timestep(case: Case, scheduler: Any) -> int:
    """Where an image-to-image pipeline begins in `scheduler.timesteps`."""
    if "strength" not in case.request or case.name == "LCMScheduler":
        return 0
    steps = case.request["steps"]
    return int(scheduler.order) * max(steps - int(steps * case.request["strength"]), 0)


def noised(scheduler: Any, start: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The first state of an image-to-image run."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(start, time, noise)
    return scheduler.add_noise(start, noise, time)


def start_of(noise: np.ndarray) -> np.ndarray:
    """A start latent, another for every noise."""
    return np.sin(3.0 * noise[::-1]).astype(np.float32).astype(np.float64)


class Double:
    """`torch` in which float32 is float64, for a scheduler's module."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def from_numpy(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def widened(module: Any) -> Iterator[None]:
    """What a scheduler's module makes and casts is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(module, "torch", Double()):
            yield
    finally:
        torch.set_default_dtype(before)


def cast_tables(scheduler: Any) -> None:
    """The scheduler's tables, as it has them, in float64."""
    for name in TABLES:
        table = getattr(scheduler, name, None)
        if isinstance(table, torch.Tensor) and table.is_floating_point():
            setattr(scheduler, name, table.double())


class Mixture:
    """E[prediction | x] of data whose elements are N(0.3 +- 0.8, 0.3^2) in equal shares, at the level of every row."""

    CENTRE, MEAN, STD = 0.3, 0.8, 0.3

    def __init__(self, plan: Plan | None, case: Case, rows: int) -> None:
        self.kind, self.sign = "eps", 1.0
        self.levels = [(math.cos(1.5 * (1 - row / rows)), math.sin(1.5 * (1 - row / rows))) for row in range(rows)]
        if plan is None:
            return
        data = case.config.get("sigma_data", 0.5) if case.name.startswith("EDM") else 1.0
        levels = [(step.alpha * step.x_scale * data, step.sigma * step.x_scale) for step in plan.steps]
        self.levels = levels + levels[-1:] * (rows - len(levels))
        self.kind = plan.prediction
        if case.name.startswith("EDM") and case.config.get("prediction_type", "epsilon") == "epsilon":
            self.sign = -1.0

    def __call__(self, x: np.ndarray, row: int) -> np.ndarray:
        alpha, sigma = self.levels[row]
        sigma = max(sigma, 1e-4)
        spread = (alpha * self.STD) ** 2 + sigma**2
        centred = x - alpha * self.CENTRE
        mode = self.MEAN * np.tanh(np.clip(alpha * self.MEAN * centred / spread, -40.0, 40.0))
        x0 = self.CENTRE + mode + alpha * self.STD**2 / spread * (centred - alpha * mode)
        eps = (x - alpha * x0) / sigma
        values: Mapping[str, np.ndarray] = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
        return self.sign * values[self.kind]
