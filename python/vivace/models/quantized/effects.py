"""What 8 bits in one part of a trajectory do to its end: the measure by which rows are advised to stay high.

    effect(g) = rms over pictures of |x_g - x| / |x|

x: the final latent of a full-precision run, x_g: that of a run in which only evaluations of timestep group g are in 8
bits. An error of a prediction may be undone by later evaluations, or go into the picture as it is: only a run tells.
Effects of rows are taken as independent: one row of a group of m has effect(g) / sqrt(m).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vivace.engine.calibrate.draw import Progress, group_of
from vivace.engine.denoiser import Denoiser
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.plan import Plan, Variant
from vivace.engine.request import Request
from vivace.engine.session import Session
from vivace.models.quantized.reach import with_linears
from vivace.models.quantized.sensitivity import MOST_WORK, Trial, work_of

PICTURES = 4  # one where that is too much work
ENDS = 4  # at most one in so many evaluations is advised to run high at either end


class Switched:
    """A denoiser that runs `trial` in the evaluations of some groups and its own network in the others."""

    def __init__(self, plain: Denoiser, trial: Trial, edges: Sequence[float]) -> None:
        self.plain, self.trial, self.edges = plain, trial, edges
        self.quantized = with_linears(plain, {name: trial.stand(name) for name in trial.layers})
        self.chosen: frozenset[int] = frozenset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        """Predictions of samples that share a timestep."""
        self.trial.group = group_of(self.edges, timesteps[0])
        run = self.quantized if self.trial.group in self.chosen else self.plain
        return run.evaluate(x, timesteps, conditions, variant)


def effects(
    denoiser: Denoiser,
    trial: Trial,
    plan: Plan,
    prompts: Sequence[Any],
    edges: Sequence[float],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """effect(g) of every timestep group, [G]: one run of the plan a group, for the first pictures of the seed.

    Four of them, or one where runs of four are more than `MOST_WORK` multiply-adds.
    """
    groups = len(edges) + 1
    pictures = PICTURES if (groups + 1) * work_of(denoiser, plan.branch_evals * PICTURES) < MOST_WORK else 1
    switched: Any = Switched(denoiser, trial, edges)
    shape = denoiser.spec.latent_shape if plan.binding is None else plan.binding.latent_shape
    exact = torch.float64 if denoiser.dtype == torch.float64 else torch.float32
    session = Session(
        switched,
        [plan],
        EagerExecutor(switched),
        shape=shape,
        state_dtype=exact,
        probed=False,
        expand=lambda given: given.bind(denoiser.spec, shape),
    )
    ends: list[Tensor] = []
    for chosen in (frozenset[int](), *(frozenset((g,)) for g in range(groups))):
        switched.chosen = chosen
        ends.append(_ends(session, prompts, seed, pictures))
        if progress is not None:
            progress("effects on pictures", len(ends), groups + 1)
    size = ends[0].flatten(1).square().sum(1).clamp_min(1e-30)
    return torch.stack([((end - ends[0]).flatten(1).square().sum(1) / size).mean().sqrt() for end in ends[1:]])


@torch.no_grad()
def _ends(session: Session, prompts: Sequence[Any], seed: int, pictures: int) -> Tensor:
    """Final latents of the first pictures, float32 on the CPU."""
    asked = (Request(prompts[picture % len(prompts)], seed=seed, index=picture) for picture in range(pictures))
    states = [session.begin(request) for request in asked]
    try:
        while not states[0].done:
            session.step(states)
        slot = states[0].entry.lowered.slots["x"]
        return torch.cat([state.pool.state[slot, list(state.lanes)].float().cpu() for state in states])
    finally:
        for state in states:
            session.abort(state)


def of_rows(effect: Sequence[float], edges: Sequence[float], timesteps: Sequence[float]) -> list[float]:
    """The effect of every evaluation of a plan, from those of groups; timesteps: of the evaluations."""
    groups = [group_of(edges, t) for t in timesteps]
    sizes = Counter(groups)
    return [float(effect[g]) / sizes[g] ** 0.5 for g in groups]


def advise(effect: Sequence[float], multiple: float | None) -> dict[str, int | str]:
    """Arguments of `apply_precision`: how many first and last evaluations run high.

    Those from an end on whose effect exceeds `multiple` times the median over all evaluations, a quarter of them at
    most. effect: of every evaluation, in order; multiple None: none.
    """
    if multiple is None:
        return {"first": 0, "last": 0, "high": "bf16"}
    limit, most = multiple * median(effect), len(effect) // ENDS

    def run(of: Sequence[float]) -> int:
        return min(most, next((i for i, e in enumerate(of) if e <= limit), len(of)))

    return {"first": run(effect), "last": run(effect[::-1]), "high": "bf16"}
