"""Executors run groups of rows that share a structure. `BACKENDS` says which there are and what this release lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vivace.engine.compiled import Hoisted
from vivace.engine.denoiser import Denoiser
from vivace.engine.focusing import Together
from vivace.engine.guiding import Hearers
from vivace.engine.kept import KeptMemory, Seen, Turn
from vivace.engine.merging import Merging
from vivace.engine.plan import Plan, Variant
from vivace.engine.pool import Pool
from vivace.engine.receipt import KernelUse, Timeline
from vivace.engine.tokens import Focus
from vivace.errors import ArgumentError, BackendError, UnsupportedError

BACKENDS = ("eager", "cpu", "cuda_graph", "picard")
PLANNED = ("onnxruntime", "tensorrt")
COMPILED = {"cpu": "cpu", "cuda": "cuda_graph"}  # by device


@dataclass(frozen=True, slots=True)
class KernelRows:
    """One launch: `rows[i]` of the table for the sample at `positions[i]` of its group; all of them reduce, or none.

    fans: each is the first of one row a class of tokens; maps: each stands for a low-rank map and is not launched.
    """

    positions: tuple[int, ...]
    rows: tuple[int, ...]
    reduces: bool
    fans: bool = False
    maps: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Samples whose rows share a structure. Sequences are per sample, in the order of `lanes`.

    rows: of each sample's plan; hoisted: what left the loop of its request, None where nothing did; kernel_rows: what
    this plan row launches after the network, in order; row: of the first sample, for the timeline. outs: branches of
    the row's out slots, of which the variant runs some; given: their predictions, where they were made ahead; turns:
    what is kept and given again; resume: where a look at the first blocks ended; focus: tokens that the row computes;
    merging: which blocks merge tokens, and what they keep; tokens: who chooses what a row computes and holds what the
    others keep, None where no plan of the group speaks of tokens; hearers: who notes what the row predicts.
    """

    variant: Variant | None
    lanes: tuple[int, ...]
    timesteps: tuple[float, ...]
    conditions: tuple[Any, ...]
    rows: tuple[int, ...]
    hoisted: tuple[Hoisted | None, ...]
    kernel_rows: tuple[KernelRows, ...]
    seeds: tuple[int, ...]
    pictures: tuple[int, ...]
    row: int
    records: list[Any]
    outs: tuple[str, ...] = ()
    given: tuple[Tensor, ...] | None = None
    turns: tuple[Turn, ...] = ()
    resume: Seen | None = None
    focus: Focus | None = None
    merging: Merging | None = None
    tokens: Together | None = None
    hearers: Hearers | None = None


class Executor(Protocol):
    """Runs groups over a pool. It keeps nothing of a request. `one_by_one`: why samples must not share a forward."""

    name: str
    one_by_one: str | None

    @property
    def compiles(self) -> int:
        """Artefacts compiled so far."""
        ...

    def check(self, plan: Plan) -> None:
        """Raise UnsupportedError naming the first row that this executor cannot run."""
        ...

    def prepare(self, plan: Plan, shape: tuple[int, ...], samples: int, memory: KeptMemory) -> None:
        """Compile what `plan` needs for that many samples of latents of `shape`, who keep things in `memory`."""
        ...

    def hoist(self, plan: Plan, condition: Any) -> Hoisted | None:
        """What of a request does not depend on x, computed for all rows at once; None when nothing leaves the loop."""
        ...

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        """Evaluate the network for the group, then do its fused steps, writing the pool in place."""
        ...

    def predict(self, group: Group, pool: Pool) -> tuple[Tensor, ...]:
        """The network alone, for a group: one prediction [n, ...] an out slot, valid until the next call."""
        ...

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        """The network alone, as `run` evaluates it: predictions [n, ...] of x [n, ...], valid until the next call."""
        ...

    def look(self, group: Group, pool: Pool, metric: str, params: Sequence[float]) -> Seen:
        """The first blocks for the group, as far as a guard's metric needs them."""
        ...

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        """Which backend runs each kernel over this pool, and why."""
        ...

    def report(self) -> dict[str, Any]:
        """What was compiled and how, for the receipt; plain data."""
        ...


def make_executor(
    backend: str, denoiser: Denoiser, *, hoist: bool = True, tolerance: float | None = None, window: int | None = None
) -> Executor:
    """The executor of that name; "auto" is the compiled one of the model's device where it can, else eager.

    hoist: what does not depend on x leaves the loop. tolerance, window: of "picard", over the executor that "auto" is.
    Raises: BackendError, ArgumentError.
    """
    if backend == "picard":
        from vivace.engine.executors.picard import PicardExecutor

        given = {} if tolerance is None else {"tolerance": tolerance}
        return PicardExecutor(make_executor("auto", denoiser, hoist=hoist), window=window, **given)
    for name, value in (("tolerance", tolerance), ("window", window)):
        if value is not None:
            raise ArgumentError(f"compile: {name} is an option of backend='picard', not of {backend!r}")
    from vivace.engine.executors.eager import EagerExecutor

    if backend in PLANNED:
        raise BackendError(f"compile: backend {backend!r} is not part of this release; use {_either(BACKENDS)}")
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"compile: backend {backend!r} is unknown; use {_either(('auto', *BACKENDS))}")
    if backend == "eager":
        return EagerExecutor(denoiser)
    compiled = backend if backend != "auto" else COMPILED.get(denoiser.device.type, "eager")
    try:
        return _compiled(compiled, denoiser, hoist)
    except UnsupportedError as error:
        if backend != "auto":
            raise BackendError(f"compile: backend {backend!r} cannot run here: {error}; use backend='eager'") from error
        return EagerExecutor(denoiser, f"not {compiled}: {error}")


def _compiled(backend: str, denoiser: Denoiser, hoist: bool) -> Executor:
    """The executor of that name. Raises UnsupportedError, with the reason, when it cannot run this model here."""
    from vivace.engine.executors.cpu import CpuExecutor
    from vivace.engine.executors.cuda_graph import CudaGraphExecutor

    home = next((device for device, name in COMPILED.items() if name == backend), None)
    if home != denoiser.device.type:
        raise UnsupportedError(f"it runs models on {home}, this one is on {denoiser.device.type}")
    compiler: Any = denoiser.compiler()  # of the kind that the device takes
    return (CpuExecutor if backend == "cpu" else CudaGraphExecutor)(denoiser, compiler, hoist=hoist)


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
