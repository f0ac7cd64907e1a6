"""`sample_adjust`: dynamic threshold and guidance rescale against the torch ops that schedulers and pipelines run.

The peers do what `diffusers` does: the combination materialised, then torch.quantile (a sort) or torch.std, and the few
ops on [B] numbers after it. Ours computes the combination anew in each of its two or three passes, so bandwidth is told
for one pass over the sources and says little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.bench import device
from vivace.bench.harness import Candidate, Claim, interleave
from vivace.errors import BackendError
from vivace.kernels.sample_adjust import SPEC, sample_adjust
from vivace.kernels.sample_adjust.cost import bytes_moved
from vivace.kernels.solver_step import Reduction, StepTable, build_table
from vivace.kernels.solver_step.table import NONE, OUT, RESCALE, THRESHOLD
from vivace.kernels.spec import missing

SEED = 7
SHAPES = {"DiT-XL/2": (4, 32, 32), "SDXL": (4, 128, 128), "SD3": (16, 128, 128)}
BATCH = 8
RATIO, LIMIT, PHI, SCALE = 0.995, 100.0, 0.7, 7.5
X0 = (1.22, -0.7)  # x0 = 1.22 x - 0.7 eps
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


@dataclass(frozen=True, eq=False)
class Problem:
    """One call: slot x of every sample, both branches, a row of one kind."""

    kind: int
    pool: Tensor
    outs: tuple[Tensor, Tensor]
    table: StepTable
    lanes: Tensor

    @staticmethod
    def of(kind: int, latent: tuple[int, ...]) -> Problem:
        generator = torch.Generator().manual_seed(SEED)
        pool = 2.0 * torch.randn(1, BATCH, *latent, generator=generator)
        outs = tuple(torch.randn(BATCH, *latent, generator=generator) for _ in range(2))
        rows = {
            THRESHOLD: Reduction(THRESHOLD, [[(0, NONE, X0[0]), (OUT, NONE, X0[1])]], RATIO, LIMIT),
            RESCALE: Reduction(RESCALE, [[(OUT, NONE, SCALE), (OUT + 1, NONE, 1.0 - SCALE)], [(OUT, NONE, 1.0)]], PHI),
        }
        return Problem(kind, pool, (outs[0], outs[1]), build_table([rows[kind]]).to(), torch.arange(BATCH))

    def on(self, place: str) -> Problem:
        """The same on a device."""
        cond, uncond = (out.to(place) for out in self.outs)
        return Problem(self.kind, self.pool.to(place), (cond, uncond), self.table.to(place), self.lanes.to(place))

    def run(self, backend: str) -> Tensor:
        rows = torch.zeros_like(self.lanes)
        return sample_adjust(self.pool, self.outs, self.table, rows, self.lanes, backend=backend)

    def eager(self) -> Tensor:
        """The last of the three numbers, by torch."""
        cond, uncond = self.outs
        if self.kind == THRESHOLD:
            x0 = (self.pool[0] * X0[0]).add_(cond, alpha=X0[1])
            return 1.0 / torch.quantile(x0.flatten(1).abs_(), RATIO, dim=1).clamp_(1.0, LIMIT)
        guided = (cond - uncond).mul_(SCALE).add_(uncond)
        return PHI * (cond.flatten(1).std(1) / guided.flatten(1).std(1)) + (1.0 - PHI)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of ours, of the definition and of eager torch on known models; on the GPU where there is one."""
    if not device.present() and (reason := missing("cpu")) is not None:
        raise BackendError(f"bench sample_adjust: {reason}")
    found = []
    for name, latent in list(SHAPES.items())[: 1 if quick else None]:
        for kind, word in ((THRESHOLD, "dynamic threshold"), (RESCALE, "guidance rescale")):
            found += case_rows(f"{word}, {name} x{BATCH}", Problem.of(kind, latent), quick)
    return found


def case_rows(case: str, problem: Problem, quick: bool) -> list[dict[str, Any]]:
    """One row a backend, checked first, timed together."""
    traffic = bytes_moved(problem.pool, problem.outs, problem.table, [0] * BATCH, problem.lanes)
    if device.present():
        return device_rows(case, problem.on(device.PLACE), traffic, quick)
    check(problem)
    candidates = {name: Candidate(partial(problem.run, name)) for name in ("cpu", "reference")}
    times = interleave(candidates | {"eager": Candidate(problem.eager)}, seconds=0.5 if quick else 3.0)
    return [
        {
            "op": "sample_adjust", "backend": backend, "case": case, "shape": list(problem.outs[0].shape),
            "dtype": "float32", "ms": timing.to_dict(), "gb_per_s": traffic / timing.median / 1e6, "bytes": traffic,
            "percent_of_roofline": None, "over_eager": times["eager"].median / timing.median, "over_compile": None,
            "over_compile_reason": "torch.compile leaves the sort of torch.quantile as it is",
            "threads": torch.get_num_threads(), "seed": SEED,
        }
        for backend, timing in times.items()
    ]  # fmt: skip


def device_rows(case: str, problem: Problem, traffic: int, quick: bool) -> list[dict[str, Any]]:
    """The same on the GPU."""
    backend = device.backend(SPEC)
    check(problem, backend)
    work = device.Work(
        "sample_adjust", case, backend, lambda: problem.run(backend), problem.eager, (),
        tuple(problem.outs[0].shape), "float32", traffic,
    )  # fmt: skip
    return device.rows(work, quick)


def check(problem: Problem, backend: str = "cpu") -> None:
    """The kernel gives the definition's bits, on a GPU its numbers, as the peer does; raises BackendError otherwise."""
    exact, ours = problem.run("reference"), problem.run(backend)
    if not (torch.equal(exact, ours) if backend == "cpu" else torch.allclose(exact, ours, rtol=1e-5)):
        raise BackendError(f"bench sample_adjust: {backend} differs from the reference; nothing was timed")
    if not torch.allclose(exact[:, 2], problem.eager(), rtol=1e-5):
        raise BackendError("bench sample_adjust: the eager peer computes something else; nothing was timed")
