"""What solvers are calibrated on and judged by: a model or a closed-form oracle, prompts, guidance, numbered samples.

Sample j is picture j of the seed with prompt j mod their number, so calibration on samples 0 .. n - 1 and a judgement
on later ones share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.engine.denoiser import CallableDenoiser
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.noise import normals
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan, Variant
from vivace.engine.planning import make_plan
from vivace.engine.request import Request, State
from vivace.engine.session import Session
from vivace.engine.verify import verify
from vivace.errors import ArgumentError

BATCH = 32  # samples that run together


@dataclass(frozen=True)
class Problem:
    """A network behind a session, and the samples that are asked of it.

    session: evaluates and runs; schedule, prediction: what it was trained for; prompts: None for a network without;
    guidance: scale of classifier-free guidance, 1: none; seed: of the samples' noise.
    """

    session: Session
    schedule: NoiseSchedule
    prediction: str
    prompts: tuple[Any, ...] = (None,)
    guidance: float = 1.0
    seed: int = 0

    @classmethod
    def of_pipe(
        cls, pipe: Any, prompts: Sequence[Any], *, guidance: float = 1.0, seed: int = 0, backend: str = "auto"
    ) -> Problem:
        """The problem of a model from `vivace.load`."""
        spec = pipe.spec
        if not prompts:
            raise ArgumentError("calibrate: the list of prompts is empty; give one prompt or more")
        first = guided(make_plan(spec.schedule, "ddim", 2, prediction=spec.prediction), guidance)
        session = pipe.compile(first, backend=backend)
        return cls(session, spec.schedule, spec.prediction, tuple(prompts), float(guidance), seed)

    @classmethod
    def of_callable(
        cls,
        denoiser: Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction: str,
        shape: tuple[int, ...],
        *,
        guidance: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Problem:
        """The problem of a function as `vivace.sample` takes it; shape: of a sample, without batch."""
        like = torch.empty(0, dtype=dtype)
        wrapped = CallableDenoiser(denoiser, prediction, shape, like)
        first = guided(make_plan(schedule, "ddim", 2, prediction=prediction), guidance)
        session = Session(
            wrapped, [first], EagerExecutor(wrapped), shape=shape, state_dtype=dtype, probed=False, expand=verify
        )
        return cls(session, schedule, prediction, (None,), float(guidance), seed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a latent, without batch."""
        return self.session.pool.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of states: float64 or float32."""
        return self.session.pool.dtype

    @property
    def fingerprint(self) -> str:
        """Of the model; "callable" for a function."""
        return self.session.denoiser.spec.fingerprint

    @cached_property
    def _conditions(self) -> tuple[Any, ...]:
        return tuple(self.session.denoiser.encode(prompt) for prompt in self.prompts)

    def noise(self, samples: Sequence[int]) -> Tensor:
        """Unit normals [n, ...] that runs of these samples start from."""
        drawn = [normals(self.shape, self.seed, picture=j) for j in samples]
        return torch.from_numpy(np.stack(drawn)).to(self.session.pool.device, self.dtype)

    @torch.inference_mode()
    def branches(self, x: Tensor, timesteps: Sequence[float], samples: Sequence[int]) -> tuple[Tensor, ...]:
        """Raw predictions (cond,) or, under guidance, (cond, uncond), each [n, ...] as x, for states of `samples`.

        x: [n, ...] as the network is fed it (scaled by `x_scale` where the schedule has one).
        """
        variant = Variant() if self.guidance == 1.0 else Variant(branches=("cond", "uncond"))
        given = x.to(self.session.pool.net_dtype)
        outs: list[tuple[Tensor, ...]] = []
        for first in range(0, len(given), BATCH):
            part = slice(first, first + BATCH)
            conditions = [self._conditions[j % len(self._conditions)] for j in samples[part]]
            made = self.session.executor.evaluate(given[part], tuple(timesteps[part]), conditions, variant)
            outs.append(tuple(out.to(self.dtype, copy=True) for out in made))
        return tuple(torch.cat(branch) for branch in zip(*outs, strict=True))

    def predict(self, x: Tensor, timestep: float, samples: Sequence[int]) -> Tensor:
        """The guided prediction [n, ...] at one timestep: uncond + guidance (cond - uncond)."""
        outs = self.branches(x, [timestep] * len(x), samples)
        return outs[0] if len(outs) == 1 else outs[1] + self.guidance * (outs[0] - outs[1])

    def plan(self, solver: str, steps: int, **options: Any) -> Plan:
        """`make_plan` for this problem, guided as it is."""
        return guided(make_plan(self.schedule, solver, steps, prediction=self.prediction, **options), self.guidance)

    def run(self, plan: Plan, samples: Sequence[int]) -> Tensor:
        """Final latents [n, ...] of a plan."""
        return self.states(plan, samples, final=True)[0]

    def states(self, plan: Plan, samples: Sequence[int], *, final: bool = False) -> list[Tensor]:
        """Slot x [n, ...] before every row and after the last: rows + 1 tensors; final: the last one only."""
        made: list[list[Tensor]] = []
        for first in range(0, len(samples), BATCH):
            made.append(self._chunk(plan, samples[first : first + BATCH], final))
        return [torch.cat(parts) for parts in zip(*made, strict=True)]

    def _chunk(self, plan: Plan, samples: Sequence[int], final: bool) -> list[Tensor]:
        running: list[State] = []
        found: list[Tensor] = []
        try:
            for j in samples:
                prompt = self.prompts[j % len(self.prompts)]
                running.append(self.session.begin(Request(prompt, plan, seed=self.seed, index=j)))
            while not running[0].done:
                if not final:
                    found.append(_x(running))
                self.session.step(running)
            found.append(_x(running))
        finally:
            for state in running:
                self.session.abort(state)
        return found


def guided(plan: Plan, guidance: float) -> Plan:
    """The plan under guidance; scale 1 is none."""
    return plan if guidance == 1.0 else apply_guidance(plan, guidance)


def _x(running: Sequence[State]) -> Tensor:
    """Slot x of every state, which holds one picture each."""
    return torch.stack([state.pool.state[state.entry.lowered.slots["x"], state.lanes[0]] for state in running])
