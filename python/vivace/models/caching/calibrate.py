"""`vivace calibrate --cache`: what caches would do to pictures along the plan that they are for, as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace import __version__
from vivace.engine.caching import EVEN
from vivace.engine.calibrate.draw import Progress, evaluations_of, full_precision
from vivace.engine.calibrate.packing import pack
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.denoiser import Denoiser
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.plan import Plan, Variant
from vivace.engine.planners.noise import EIGHT_BITS
from vivace.engine.precision import named
from vivace.engine.request import Request, State
from vivace.engine.session import Session
from vivace.errors import ArgumentError, UnsupportedError
from vivace.models.caching.curves import Curves
from vivace.models.caching.effects import Slopes, effects_of
from vivace.models.caching.tape import Place, Tape, places_of, record, slope
from vivace.models.quantized.calibrate import default_prompts
from vivace.models.quantized.given import advised
from vivace.models.quantized.reach import denoiser_of, in_8_bits

KIND = "cache"
PICTURES, PROBES = 8, 8
AT_ONCE = 8  # pictures that run together
AGES = 24  # most evaluations between computing and reading that effects are measured for
LAGS = 8  # the same for error curves
MOST_BYTES = 2 << 30  # of the values of evaluations that are held at once


def calibrate_cache(
    pipe: Any,
    plan: Plan,
    *,
    pictures: int = PICTURES,
    probes: int = PROBES,
    seed: int = 0,
    prompts: Sequence[Any] | None = None,
    effects: bool = True,
    progress: Progress | None = None,
) -> CalibrationTable:
    """A table of kind "cache": error curves, magnitudes, TeaCache's fit, and effects on the final latent.

    The runs compute everything, so give the plan that caches will be written into: its solver, steps and guidance. They
    are of the model's own precision; of a model that was loaded with quantized weights every evaluation is also
    computed in 8 bits, from the same latent, and what that adds to the sites is measured: in the rows and blocks of the
    plan's precisions, or where it states none as the weights advise.

    Args:
        pipe: from `vivace.load`, best in float32.
        pictures: runs to measure on; probes: random signs a picture, see `effects`.
        seed: of noise, signs and drawn classes. The same seed gives the same table.
        prompts: of the pictures, in turn; None: classes drawn by the seed, for a class-conditional model.
        effects: measure them; without, no gradient is taken and `OptimalCache` cannot use the table.
        progress: called with (what, done, in all).
    Raises: ArgumentError, PlanError, PromptError, UnsupportedError.
    """
    _check(plan, pictures, probes)
    denoiser = denoiser_of(pipe)
    asked = default_prompts(pipe, pictures, seed) if prompts is None else list(prompts)
    if not asked:
        raise ArgumentError("calibrate: the list of prompts is empty; give one prompt or more")
    run = _Runs(denoiser, full_precision(plan), asked, seed, probes if effects else 0, pictures, progress)
    weights = pipe.quantized
    if weights is not None:
        run.measure_noise(in_8_bits(denoiser, weights), advised(plan, weights))
    measured = [run.chunk(range(i, min(i + AT_ONCE, pictures))) for i in range(0, pictures, AT_ONCE)]
    arrays: dict[str, Any] = run.curves.arrays()
    for name in measured[0]:
        arrays[f"effect/{name}"] = torch.cat([found[name] for found in measured], 3).numpy()
    bound, costs = run.plan, dict(denoiser.spec.costs or EVEN)
    outside = costs.pop("outside", 0.0)
    assert bound.binding is not None
    metadata = {
        "model": denoiser.spec.name,
        "plan_hash": plan.hash,
        "evaluations": bound.nfe,
        "timesteps": [step.timestep for _, step, _ in evaluations_of(bound)],
        "latent_shape": list(bound.binding.latent_shape),
        "sites": sorted({site for group in run.groups for site, _ in group}),
        "outside": outside / (outside + denoiser.spec.blocks * math.fsum(costs.values())),
        "prompts": pack(asked, "prompts", arrays),
        "seed": seed,
        "pictures": pictures,
        "probes": probes if effects else 0,
        "quantized": None if weights is None else {"format": weights.format, "digest": weights.digest},
        "versions": {"vivace": __version__, "torch": str(torch.__version__), "numpy": np.__version__},
    }
    return CalibrationTable(KIND, denoiser.spec.fingerprint, arrays, json.loads(json.dumps(metadata, allow_nan=False)))


def _check(plan: Plan, pictures: int, probes: int) -> None:
    """Raise ArgumentError for counts that are none, and a plan that saves work already."""
    for name, value in (("pictures", pictures), ("probes", probes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"calibrate: {name} is {value!r}; a positive integer is needed")
    if any(rule.action is not None for variant in plan.variants for rule in variant.rules):
        raise ArgumentError("calibrate: the plan has caches already; give the plan without them")
    if any(step.guard is not None for step in plan.steps):
        raise ArgumentError("calibrate: the plan has guards; give the plan without them")


class _Runs:
    """Runs of a plan, a few pictures at a time, that are measured as they go. probes 0: no effects."""

    def __init__(
        self,
        denoiser: Denoiser,
        plan: Plan,
        prompts: Sequence[Any],
        seed: int,
        probes: int,
        pictures: int,
        progress: Progress | None,
    ) -> None:
        self.denoiser, self.prompts, self.seed, self.probes, self.progress = denoiser, prompts, seed, probes, progress
        self.groups = tuple(group for group in places_of(denoiser) if group)
        if not self.groups:
            raise UnsupportedError(f"calibrate: {denoiser.spec.name!r} has no site that caches can keep")
        watched: Any = _Watched(denoiser, self._see)
        shape = denoiser.spec.latent_shape if plan.binding is None else plan.binding.latent_shape
        self.shape = shape
        self.session = Session(
            watched,
            [plan],
            EagerExecutor(watched),
            shape=shape,
            state_dtype=torch.float64 if denoiser.dtype == torch.float64 else torch.float32,
            probed=False,
            expand=lambda given: given.bind(denoiser.spec, shape),
        )
        self.plan = self.session.plans[0]
        count = self.plan.nfe
        self.curves = Curves(count, max(1, min(LAGS, count - 1)))
        self.done, self.total = 0, count * -(-pictures // AT_ONCE) * (2 if probes else 1)
        self.low: tuple[Denoiser, list[Variant]] | None = None  # what runs in 8 bits, and how each evaluation does
        self._start()

    def measure_noise(self, low: Denoiser, plan: Plan) -> None:
        """Also compute every evaluation as `plan` says that it runs in 8 bits, with `low`."""
        bound = plan if plan.binding is not None else plan.bind(self.denoiser.spec, self.shape)
        self.low = low, [variant for _, _, variant in evaluations_of(bound)]

    def _start(self) -> None:
        self.tapes: list[Tape] = []  # of all evaluations; values are kept of the newest only
        self.slopes: list[dict[str, Slopes]] = []
        self.held: list[Tape] = []

    @torch.no_grad()
    def chunk(self, pictures: Sequence[int]) -> dict[str, Tensor]:
        """Run these pictures together and measure. Returns: effects by group, empty without probes."""
        self._start()
        asked = [Request(self.prompts[p % len(self.prompts)], seed=self.seed, index=p) for p in pictures]
        states: list[State] = []
        try:
            for request in asked:
                states.append(self.session.begin(request))
            while not states[0].done:
                self.session.step(states)
        finally:
            for state in states:
                self.session.abort(state)
        self.held = []
        if not self.probes:
            return {}
        return effects_of(
            self.denoiser,
            self.plan,
            self.tapes,
            self.slopes,
            pictures,
            ages=max(1, min(AGES, self.plan.nfe - 1)),
            probes=self.probes,
            seed=self.seed,
            done=self._tell,
        )

    def _see(self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant) -> Tape:
        """Record an evaluation and measure it against those before."""
        with torch.inference_mode(False), torch.no_grad():
            number = len(self.tapes)
            tape = record(self.denoiser, x.clone(), timesteps, conditions, variant, self.groups)
            alike = [
                old if (old.variant.model, old.variant.branches) == (variant.model, variant.branches) else None
                for old in self.held
            ]
            missing: list[Tape | None] = [None] * (number - len(alike))
            self.curves.see([*missing, *alike, tape], self.groups)
            trunk = next((group for group in self.groups if group[0][0] == "residual"), ())
            self.curves.trunk(number, alike[-1] if alike else None, tape, trunk)
            self.curves.inputs(self.denoiser, number, tape)
            self._see_noise(number, tape)
            self.slopes.append({name_of(group): self._slopes(tape, alike, group) for group in self.groups})
            self.tapes.append(Tape(tape.x, tape.timesteps, tape.conditions, variant, tape.outs, {}))
            most = max(1, min(AGES, MOST_BYTES // max(1, tape.nbytes)))
            self.held = [*self.held, tape][-most:]
        self._tell()
        return tape

    def _see_noise(self, number: int, tape: Tape) -> None:
        """The same evaluation in 8 bits, where it runs in them."""
        if self.low is None or not named(self.low[1][number]) & set(EIGHT_BITS):
            return
        variant = replace(tape.variant, rules=self.low[1][number].rules)
        given = tape.x, tape.timesteps, tape.conditions, variant
        self.curves.noise(number, tape, record(self.low[0], *given, self.groups), self.groups)

    def _slopes(self, tape: Tape, past: Sequence[Tape | None], group: tuple[Place, ...]) -> Slopes:
        """By age, until one of another kind."""
        found: list[Tensor] = []
        for old in reversed(past if self.probes else ()):
            if old is None:
                break
            found.append(slope(self.denoiser, tape, old, group))
        return found

    def _tell(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress("evaluations", self.done, self.total)


class _Watched:
    """A denoiser whose evaluations are seen."""

    def __init__(self, plain: Denoiser, see: Any) -> None:
        self.plain, self.see = plain, see

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        """Predictions of pictures that share a timestep."""
        tape: Tape = self.see(x, timesteps, conditions, variant)
        return tape.outs


def name_of(group: tuple[Place, ...]) -> str:
    """The sites of a group: "attn+mlp", "residual"."""
    return "+".join(dict.fromkeys(sorted(site for site, _ in group)))
