"""What `bench e2e` draws: fixed labels and noises of a model, its converged solution, and the ways to draw them.

Noise i is the first draw of torch's generator seeded with i, which is what a diffusers pipeline starts from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vivace.bench.artefacts import Artefact
from vivace.bench.int8_weights import WEIGHTS, int8_weights
from vivace.bench.models import BenchModel
from vivace.bench.peers import Network
from vivace.bench.peers.eager import network
from vivace.bench.peers.loop import SOLVERS, SPACINGS, draw, scheduler
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.metrics.quality import psnr
from vivace.metrics.reference import reference_plan
from vivace.models.quantized.given import advised

TARGET = 30.0  # dB
STEPS = (*range(5, 21), 22, 25, 28, 32, 36, 40, 45, 50)  # tried in this order
PATIENCE = 3  # more steps that a rounding or caching runtime may take to reach the target
DEFAULT_STEPS = 50  # of DiTPipeline


@dataclass(frozen=True, eq=False)
class Case:
    """A model, n labels with one noise each, and the guidance scale of its card."""

    model: BenchModel
    labels: tuple[int, ...]
    guidance: float

    @property
    def noise(self) -> Tensor:
        """[n, C, H, W], float32."""
        return torch.cat([_noise(seed, self.model.opened.shape) for seed in range(len(self.labels))])

    @property
    def null(self) -> int:
        """Label of no class."""
        return self.model.opened.config.classes

    def plan(self, solver: str, steps: int) -> Plan:
        """Our plan: timesteps even over the whole range, full guidance."""
        opened = self.model.opened
        plan = make_plan(opened.schedule, solver, steps, prediction=opened.prediction)
        return apply_guidance(plan, self.guidance)

    def converged(self) -> Tensor:
        """The solution [n, C, H, W]: 200 evaluations in float64 from the same noises, computed once and kept."""
        plan = reference_plan(self.model.opened.spec, self.guidance)
        key = {
            "fingerprint": self.model.opened.fingerprint, "plan": plan.hash, "labels": list(self.labels),
            "noise": sha256(self.noise.numpy().tobytes()).hexdigest(),
        }  # fmt: skip

        def make(place: Path) -> None:
            latents = vivace_latents(self, compile_vivace(self, plan, "eager", "float64"), plan)
            save_file({"latents": latents.float().contiguous()}, place / "latents.safetensors")

        artefact = Artefact(f"converged-{self.model.short}", key, make)
        return load_file(artefact.get() / "latents.safetensors")["latents"]


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def quality(latents: Tensor, reference: Tensor) -> float:
    """Mean PSNR in dB, data range 2; 200 where they are equal to the bit."""
    return float(np.minimum(psnr(latents, reference), 200.0).mean())


# ---------------------------------------------------------------- vivace, by its public interface
@cache
def _loaded(folder: Path, quantized: Path | None) -> Any:
    import vivace

    return vivace.load(str(folder), quantized=quantized)


def compile_vivace(case: Case, plan: Plan, backend: str, dtype: str, *, hoist: bool = True) -> Any:
    """A session for the case's model, with torch's number of threads; "int8": quantized blocks, the rest bfloat16."""
    int8 = dtype == "int8"
    pipe = _loaded(case.model.folder, _weights(case) if int8 else None)
    dtype = "bfloat16" if int8 else dtype
    return pipe.compile(plan, backend=backend, dtype=dtype, threads=torch.get_num_threads(), hoist=hoist)


def planned(case: Case, dtype: str, solver: str, steps: int) -> Plan:
    """The case's plan; of "int8" on quantized weights, as they advise."""
    plan = case.plan(solver, steps)
    return plan if dtype != "int8" else advised(plan, _loaded(case.model.folder, _weights(case)).quantized)


def _weights(case: Case) -> Path:
    return int8_weights(case.model).get() / WEIGHTS


def vivace_latents(case: Case, session: Any, plan: Plan) -> Tensor:
    """Latents of every label through a session, all in flight together: the bits of each alone."""
    import vivace

    states = [
        session.begin(vivace.Request(label, plan=plan, latents=noise[None]))
        for label, noise in zip(case.labels, case.noise, strict=True)
    ]
    try:
        while not states[0].done:
            session.step(states)
        return torch.cat([session.finish(state).latents for state in states])
    finally:
        for state in states:
            session.abort(state)


@cache
def eager_vivace(case: Case, solver: str, steps: int) -> Tensor:
    """What our eager float32 session draws."""
    plan = case.plan(solver, steps)
    return vivace_latents(case, compile_vivace(case, plan, "eager", "float32"), plan)


# ---------------------------------------------------------------- diffusers
class Pixels(nn.Module):
    """Stands for a VAE where the latent is the picture; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.device, self.latents = SimpleNamespace(scaling_factor=1.0), torch.device("cpu"), None

    def decode(self, latents: Tensor) -> SimpleNamespace:
        self.latents = latents
        return SimpleNamespace(sample=latents)


class Default:
    """`DiTPipeline` as users of this class run it: 50 steps of DDIM, float32, eager, full guidance."""

    def __init__(self, case: Case) -> None:
        import diffusers

        begin = time.perf_counter()
        self.case, self.vae = case, Pixels()
        config = {name: value for name, value in case.model.scheduler.items() if not name.startswith("_")}
        solver = diffusers.DDIMScheduler.from_config(config)
        self.pipe = diffusers.DiTPipeline(case.model.transformer(), self.vae, solver)
        self.pipe.set_progress_bar_config(disable=True)
        self.seconds = time.perf_counter() - begin

    def __call__(self, i: int, steps: int) -> Tensor:
        """Latents [1, C, H, W] of label i."""
        kind = "pil" if self.case.model.opened.pixels else "np"
        generator = torch.Generator().manual_seed(i)
        self.pipe(
            [self.case.labels[i]], guidance_scale=self.case.guidance, generator=generator, num_inference_steps=steps,
            output_type=kind,
        )  # fmt: skip
        latents: Any = self.vae.latents
        return latents


def peer_picture(
    case: Case, call: Network, begin: Callable[[int], object], solver: str, spacing: str, steps: int, i: int = 0
) -> Callable[[], Tensor]:
    """A call that draws label i by a runtime in the loop of diffusers, latents [1, C, H, W]."""
    loop = scheduler(case.model.scheduler, solver, spacing)
    noise, label = _noise(i, case.model.opened.shape), torch.tensor([case.labels[i]])

    def picture() -> Tensor:
        begin(steps)
        return draw(call, loop, steps, noise, label, case.null, case.guidance)

    return picture


def peer_latents(
    case: Case, call: Network, begin: Callable[[int], object], solver: str, spacing: str, steps: int
) -> Tensor:
    """Latents of every label, one picture after the other."""
    pictures = range(len(case.labels))
    return torch.cat([peer_picture(case, call, begin, solver, spacing, steps, i)() for i in pictures])


@cache
def eager_diffusers(case: Case, solver: str, spacing: str, steps: int) -> Tensor:
    """What diffusers draws in eager mode in float32."""
    return peer_latents(case, network(case.model.transformer()), lambda steps: None, solver, spacing, steps)


# ---------------------------------------------------------------- the grid: fewest steps that reach the target
def vivace_grid(case: Case, reference: Tensor, solvers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """PSNR of our solvers in float32 at growing steps, each until it reaches the target."""
    session = compile_vivace(case, case.plan(solvers[0], STEPS[0]), "eager", "float32")
    for solver in solvers:
        for steps in STEPS:
            plan = case.plan(solver, steps)
            row = _grid_row("vivace", case, solver, steps, quality(vivace_latents(case, session, plan), reference))
            yield row
            if row["meets"]:
                break


def peer_grid(case: Case, reference: Tensor, call: Network) -> Iterator[dict[str, Any]]:
    """The same of the solvers of diffusers around its eager network, for every spacing."""
    labels = torch.tensor(case.labels)
    for solver in SOLVERS:
        for spacing in SPACINGS:
            loop = scheduler(case.model.scheduler, solver, spacing)
            for steps in STEPS:
                latents = draw(call, loop, steps, case.noise, labels, case.null, case.guidance)
                row = _grid_row("diffusers", case, solver, steps, quality(latents, reference)) | {"spacing": spacing}
                yield row
                if row["meets"]:
                    break


def _grid_row(backend: str, case: Case, solver: str, steps: int, decibels: float) -> dict[str, Any]:
    return {
        "op": "grid", "case": case.model.name, "backend": backend, "dtype": "float32", "solver": solver,
        "steps": steps, "nfe": steps, "psnr": decibels, "meets": decibels >= TARGET,
    }  # fmt: skip


def fewest(grid: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of a grid that reaches the target with the fewest steps, the best of those; None: none does."""
    reached = [row for row in grid if row["meets"]]
    return min(reached, key=lambda row: (row["steps"], -row["psnr"]), default=None)


def settle(draw_all: Callable[[int], Tensor], steps: int, reference: Tensor) -> tuple[int, float]:
    """(steps, PSNR) of the first of `steps`, `steps` + 1, ... that reaches the target, at most PATIENCE more."""
    decibels = quality(draw_all(steps), reference)
    for more in range(1, PATIENCE + 1):
        if decibels >= TARGET:
            return steps + more - 1, decibels
        decibels = quality(draw_all(steps + more), reference)
    return steps + PATIENCE, decibels
