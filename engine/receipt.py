"""What a run did: planned against executed, predicted against measured, and which backend ran what, with the reason."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vivace import __version__
from vivace.engine.plan import Plan
from vivace.engine.precision import spelled

if TYPE_CHECKING:
    from vivace.engine.denoiser import Denoiser
    from vivace.engine.executors import Executor
    from vivace.engine.probe import Probe
    from vivace.engine.request import State


@dataclass(frozen=True, slots=True)
class Event:
    """A stretch of time on the session's clock: ms from its start, ms long; row -1: outside the loop."""

    name: str
    row: int
    start_ms: float
    ms: float
    batch: int = 1


class Timeline:
    """Stretches of time of one session without waiting for the device: on CUDA, events that are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.origin: Any = self._now()

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def span(self, records: list[Any], name: str, row: int, batch: int = 1) -> Iterator[None]:
        """Append (name, row, start, end, batch) of the enclosed work to `records`."""
        start = self._now()
        try:
            yield
        finally:
            records.append((name, row, start, self._now(), batch))

    def resolve(self, records: list[Any]) -> tuple[Event, ...]:
        """Records as events in ms; on CUDA this waits for the device once."""
        if self.cuda:
            torch.cuda.synchronize()
        return tuple(
            Event(name, row, self._ms(self.origin, start), self._ms(start, end), batch)
            for name, row, start, end, batch in records
        )

    def _ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self.cuda else (end - start) * 1e3


@dataclass(frozen=True, slots=True)
class KernelUse:
    """Which backend ran an op, and why."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class RowRecord:
    """One executed row. `batch`: samples that shared its launch; the ms are those of the launch.

    precision: what its blocks multiplied in, "model" where the plan says nothing.
    """

    row: int
    branches: tuple[str, ...]
    batch: int
    network_ms: float
    step_ms: float
    precision: str = "model"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a request cost. Milliseconds are wall time (device time on CUDA); memory in bytes.

    peak_memory: of the process (resident) or of the device; pool: the request's share of slots and network input.
    predicted_ms: of the launches this request shared, from the forwards timed at compile time; None: not timed.
    compiles: artefacts the session compiled so far, its whole life; hoisted: bytes of what left the loop, by part.
    compiled: how the model was compiled: what runs its rows and what was measured to decide it, buckets; plain data.
    details: what else took part, such as prompt cache, decoder and pieces that kept their own kernels; plain data.
    """

    plan_hash: str
    executor: str
    device: str
    dtype: str
    threads: int
    n: int
    nfe_planned: int
    nfe: int
    branch_evals_planned: int
    branch_evals: int
    rows: tuple[RowRecord, ...]
    phases: dict[str, float]
    measured_ms: float
    predicted_ms: float | None
    peak_memory: int
    pool: int
    kernels: tuple[KernelUse, ...]
    compiles: int = 0
    hoisted: dict[str, int] = field(default_factory=dict)
    compiled: dict[str, Any] = field(default_factory=dict)
    one_by_one: str | None = None
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = field(default=(), repr=False)

    @property
    def precisions(self) -> dict[str, int]:
        """Evaluated rows by precision."""
        evaluated = [row.precision for row in self.rows if row.branches]
        return {name: evaluated.count(name) for name in dict.fromkeys(evaluated)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the raw events."""
        data = asdict(self)
        del data["events"]
        return data | {"precisions": self.precisions}

    def __str__(self) -> str:
        """A short table a person reads."""
        predicted = "not timed" if self.predicted_ms is None else f"{self.predicted_ms:.0f} ms"
        lines = [
            f"plan      {self.plan_hash[:12]}  {self.nfe}/{self.nfe_planned} evaluations, "
            f"{self.branch_evals}/{self.branch_evals_planned} branch evaluations, {self.n} picture(s), "
            f"up to {max((row.batch for row in self.rows), default=0)} in a launch",
            f"ran on    {self.device} {self.dtype}, executor {self.executor}, {self.threads} thread(s)",
            f"time      {self.measured_ms:.0f} ms measured, {predicted} predicted: "
            + ", ".join(f"{name} {ms:.1f}" for name, ms in self.phases.items()),
            f"row       median {_median([r.network_ms for r in self.rows]):.2f} ms network, "
            f"{_median([r.step_ms for r in self.rows]):.3f} ms solver step",
            f"memory    {self.peak_memory / 2**20:.0f} MiB peak, {self.pool / 2**20:.2f} MiB of slots",
        ]
        if set(self.precisions) - {"model"}:
            rows = ", ".join(f"{name} in {count} rows" for name, count in self.precisions.items())
            lines.append(f"precision {rows}")
        if self.hoisted:
            parts = ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in self.hoisted.items())
            lines.append(f"hoisted   {parts}")
        if self.compiled:
            lines.append(f"compiled  {self.compiles} artefact(s); " + _spelled(self.compiled))
        lines += [f"kernel    {use.op}: {use.backend} ({use.reason})" for use in self.kernels]
        if self.one_by_one:
            lines.append(f"batching  one sample at a time: {self.one_by_one}")
        lines += [f"{name:<9} {value}" for name, value in self.details.items()]
        return "\n".join(lines + [f"warning   {text}" for text in self.warnings])


def _spelled(report: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {', '.join(v) if isinstance(v, list) else v}" for name, v in report.items())


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the CUDA device, or resident of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_receipt(
    state: State,
    events: tuple[Event, ...],
    *,
    measured_ms: float,
    probe: Probe | None,
    executor: Executor,
    denoiser: Denoiser,
) -> Receipt:
    """The receipt of a finished request from the events of its rows."""
    plan, pool, n = state.plan, state.pool, state.request.n
    rows = []
    for i in range(len(plan.steps)):
        mine = {event.name: event for event in events if event.row == i}
        network, step = mine.get("network"), mine["solver_step"]
        branches, variant = (plan.steps[i].branches if network else ()), plan.steps[i].variant
        precision = "model" if variant is None else spelled(variant)
        rows.append(RowRecord(i, branches, step.batch, network.ms if network else 0.0, step.ms, precision))
    phases: dict[str, float] = {}
    for event in events:
        name = "start" if event.row < 0 and event.name == "solver_step" else event.name
        phases[name] = phases.get(name, 0.0) + event.ms
    evaluated = [row for row in rows if row.branches]
    return Receipt(
        plan_hash=plan.hash,
        executor=executor.name,
        device=str(pool.device),
        dtype=str(denoiser.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        n=n,
        nfe_planned=plan.nfe,
        nfe=len(evaluated),
        branch_evals_planned=plan.branch_evals,
        branch_evals=sum(len(row.branches) for row in evaluated),
        rows=tuple(rows),
        phases={name: round(ms, 4) for name, ms in phases.items()},
        measured_ms=measured_ms,
        predicted_ms=_predicted(probe, plan, evaluated),
        peak_memory=peak_memory(pool.device),
        pool=n * pool.lane_bytes(),
        kernels=executor.kernels(pool),
        compiles=executor.compiles,
        hoisted={} if state.hoisted is None else dict(state.hoisted.bytes),
        compiled=executor.report(),
        one_by_one=executor.one_by_one,
        warnings=state.warnings,
        versions={"vivace": __version__, "torch": torch.__version__},
        details={name: report for name, report in denoiser.reports().items() if report is not None},
        events=events,
    )


def _predicted(probe: Probe | None, plan: Plan, rows: list[RowRecord]) -> float | None:
    """What `rows` should have taken by the forwards timed at compile time; None where one was not timed."""
    if probe is None:
        return None
    variants = [(plan.steps[row.row].variant, row.batch) for row in rows]
    times = [probe.predict_ms(plan, variant, n) for variant, n in variants if variant is not None]
    return None if None in times else sum(ms for ms in times if ms is not None)
