"""What `bench caching` draws: base plans of the bundled model, caches on them, their quality and what they compute.

Calibration tables belong to one plan of one model; they are made by `make bench-setup`, from pictures that are never
drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vivace
from vivace.bench.artefacts import Artefact
from vivace.bench.e2e_cases import Case, compile_vivace
from vivace.bench.models import MODELS, BenchModel, flops
from vivace.engine import planners
from vivace.engine.caching import computed_share
from vivace.engine.passes import apply_block_cache, apply_guards
from vivace.engine.plan import Plan
from vivace.metrics.quality import Array, psnr
from vivace.models.dit_config import DiTConfig

FORMAT = 1  # of calibration tables; raise it when calibration changes
TABLE = "table.safetensors"
CALIBRATED = 8  # pictures of a table
SEED = 1000  # of their noise
FIXED = ("Fora", "TaylorSeer", "SmoothCache", "MagCache")  # rules that do not look at the compute budget
MEASURED = ("SmoothCache", "MagCache", "TeaCache", "OptimalCache")  # they need a table
BEST_DB = 200.0  # of pictures that are equal to the bit


@dataclass(frozen=True)
class Base:
    """The run that caches are put on: our solver, its steps."""

    solver: str
    steps: int


@dataclass(frozen=True)
class Method:
    """A planner of `vivace.planners` with its arguments; "none": no cache."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def told(self) -> str:
        """The arguments as text."""
        return ", ".join(f"{name} {value}" for name, value in self.options.items()) or "-"


def each(name: str, **options: Sequence[Any]) -> tuple[Method, ...]:
    """A method for every place of the options' values."""
    return tuple(
        Method(name, dict(zip(options, values, strict=True))) for values in zip(*options.values(), strict=True)
    )


NONE = Method("none")
UNIPC, DDIM = Base("unipc", 20), Base("ddim", 50)
BASES = (UNIPC, DDIM)
RULES: tuple[Method, ...] = (
    *each("Fora", interval=(2, 3, 4, 5)),
    *each("TaylorSeer", interval=(2, 2, 3, 3, 4, 4), order=(1, 2, 1, 2, 1, 2), first=(1,) * 6),
    *each("TaylorSeer", interval=(2, 3, 3, 4), order=(2, 1, 2, 2), first=(1, 1, 3, 3), last=(0,) * 4),
    *each("SmoothCache", alpha=(0.05, 0.1, 0.18, 0.3, 0.5)),
    *each("MagCache", threshold=(0.06, 0.12, 0.24, 0.5), most=(3, 3, 3, 5)),
)
GUARDED: tuple[Method, ...] = (
    *each("FirstBlockCache", threshold=(0.05, 0.1, 0.2, 0.3)),
    *each("TeaCache", threshold=(0.1, 0.2, 0.4)),
)
BUDGETS = (0.65, 0.5, 0.41, 0.31)
OURS = each("OptimalCache", budget=BUDGETS)
METHODS = (*RULES, *GUARDED, *OURS)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures of a plan: latents [n, C, H, W], and the share of work computed for each."""

    latents: Tensor
    shares: tuple[float, ...]

    @property
    def share(self) -> float:
        """Mean over the pictures."""
        return float(np.mean(self.shares))


def decibels(latents: Any, reference: Any) -> Array:
    """PSNR of every picture, data range 2; 200 where they are equal to the bit."""
    return np.minimum(psnr(latents, reference), BEST_DB)


def plain(case: Case, base: Base) -> Plan:
    """The uncached plan."""
    return case.plan(base.solver, base.steps)


def planned(case: Case, base: Base, method: Method) -> Plan:
    """The plan with the cache; from its table where the method measures."""
    plan = plain(case, base)
    if method == NONE:
        return plan
    options = dict(method.options)
    if method.name in MEASURED:
        options["table"] = table(case, base)
    planner: Any = getattr(planners, method.name)(**options)
    return apply_guards(plan, planner) if isinstance(planner, planners.Guarded) else apply_block_cache(plan, planner)


@cache
def table(case: Case, base: Base) -> Any:
    """The calibration table of a base plan."""
    from vivace.engine.calibrate.table import CalibrationTable

    return CalibrationTable.load(table_artefact(case, base).get() / TABLE)


def table_artefact(case: Case, base: Base) -> Artefact:
    """Measured on classes and seeds that the bench does not draw."""
    plan, known = plain(case, base), case.model.opened.config.classes
    labels = [label for label in range(3, known, max(1, known // CALIBRATED)) if label not in case.labels]
    labels = labels[:CALIBRATED]
    key = {
        "format": FORMAT, "fingerprint": case.model.opened.fingerprint, "plan": plan.hash, "labels": labels,
    }  # fmt: skip

    def make(place: Path) -> None:
        from vivace.models.caching.calibrate import calibrate_cache

        pipe = vivace.load(str(case.model.folder))
        calibrate_cache(pipe, plan, pictures=len(labels), prompts=labels, seed=SEED).save(place / TABLE)

    return Artefact(f"cache-{base.solver}-{base.steps}-{case.model.short}", key, make)


def costs(config: DiTConfig) -> tuple[tuple[str, float], ...]:
    """Operations of a DiT's sites, one block each, and of what is outside of blocks; modulation is hoisted."""
    width, tokens = config.width, config.grid[0] * config.grid[1]
    attn, mlp = 8.0 * tokens * width**2 + 4.0 * tokens**2 * width, 16.0 * tokens * width**2
    outside = flops(config, modulation=False) - config.layers * (attn + mlp)
    return (("attn", attn), ("mlp", mlp), ("outside", outside))


def share(case: Case, plan: Plan) -> float:
    """Share of a plan's operations that is computed, if no guard fires."""
    opened = case.model.opened
    return computed_share(plan.bind(opened.spec), costs(opened.config))


@cache
def session(model: str, dtype: str, backend: str) -> Any:
    """A session of the bundled model, or of another of `MODELS`; every plan of the bench runs in it."""
    case = Case(MODELS[model], (0,), 1.0)
    return compile_vivace(case, case.plan("unipc", 4), backend, dtype)


def draw(case: Case, run: Any, plan: Plan) -> Drawn:
    """Latents of every label, all in flight together: the bits of each alone."""
    guarded = any(step.guard is not None for step in plan.steps)
    states = [
        run.begin(vivace.Request(label, plan=plan, latents=noise[None]))
        for label, noise in zip(case.labels, case.noise, strict=True)
    ]
    try:
        while not all(state.done for state in states):
            run.step([state for state in states if not state.done])
        results = [run.finish(state) for state in states]
    finally:
        for state in states:
            run.abort(state)
    latents = torch.cat([result.latents for result in results])
    if guarded:
        return Drawn(latents, tuple(float(result.receipt.caches.get("computed_share", 1.0)) for result in results))
    return Drawn(latents, (share(case, plan),) * len(results))


def described(model: BenchModel, base: Base, method: Method, drawn: Drawn) -> dict[str, Any]:
    """Columns that every row has before it is judged and timed."""
    low, high = min(drawn.shares), max(drawn.shares)
    return {
        "op": "caching", "case": model.name, "backend": "vivace", "method": method.name, "setting": method.told,
        "solver": base.solver, "steps": base.steps, "dtype": "float32", "share": drawn.share,
        "shares": None if low == high else [low, high], "pictures": len(drawn.latents),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
