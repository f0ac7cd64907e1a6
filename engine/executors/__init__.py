"""Executors run groups of rows that share a structure. `BACKENDS` says which there are and what this release lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vivace.engine.denoiser import Denoiser
from vivace.engine.plan import Plan, Variant
from vivace.engine.pool import Pool
from vivace.engine.receipt import KernelUse, Timeline
from vivace.errors import BackendError

BACKENDS = ("eager",)
PLANNED = ("cpu", "cuda_graph", "onnxruntime", "tensorrt", "picard")


@dataclass(frozen=True, slots=True)
class KernelRows:
    """One launch: `rows[i]` of the table for the sample at `positions[i]` of its group; all of them reduce, or none."""

    positions: tuple[int, ...]
    rows: tuple[int, ...]
    reduces: bool


@dataclass(frozen=True, slots=True)
class Group:
    """Samples whose rows share a structure. Sequences are per sample, in the order of `lanes`.

    kernel_rows: what this plan row launches after the network, in order.
    """

    variant: Variant | None
    lanes: tuple[int, ...]
    timesteps: tuple[float, ...]
    conditions: tuple[Any, ...]
    kernel_rows: tuple[KernelRows, ...]
    seeds: tuple[int, ...]
    pictures: tuple[int, ...]
    row: int
    records: list[Any]


class Executor(Protocol):
    """Runs groups over a pool. It keeps nothing of a request. `one_by_one`: why samples must not share a forward."""

    name: str
    one_by_one: str | None

    def check(self, plan: Plan) -> None:
        """Raise UnsupportedError naming the first row that this executor cannot run."""
        ...

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        """Evaluate the network for the group, then do its fused steps, writing the pool in place."""
        ...

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        """Which backend runs each kernel over this pool, and why."""
        ...


def make_executor(backend: str, denoiser: Denoiser) -> Executor:
    """The executor of that name; "auto" picks the fastest one present. Raises BackendError."""
    from vivace.engine.executors.eager import EagerExecutor

    if backend in ("auto", "eager"):
        return EagerExecutor(denoiser)
    if backend in PLANNED:
        raise BackendError(f"compile: backend {backend!r} is not part of this release; use {_either(BACKENDS)}")
    raise BackendError(f"compile: backend {backend!r} is unknown; use {_either(('auto', *BACKENDS))}")


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
