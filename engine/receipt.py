"""What a run did: planned against executed, predicted against measured, and which backend ran what, with the reason."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from vivace import __version__
from vivace.engine import guided
from vivace.engine.caching import KEYS, cache_bytes, read_by, share_of
from vivace.engine.guards import Decision
from vivace.engine.merge_rows import SITE
from vivace.engine.merging import unmerged
from vivace.engine.plan import Plan
from vivace.engine.precision import spelled
from vivace.engine.token_rows import focused
from vivace.engine.told import told
from vivace.kernels.select_tokens import SPEC as SELECT
from vivace.kernels.spec import choose

if TYPE_CHECKING:
    from vivace.engine.denoiser import Denoiser
    from vivace.engine.executors import Executor
    from vivace.engine.probe import Probe
    from vivace.engine.request import State

CACHING = ("apply_block_cache", "apply_guards", "apply_smoothcache", "apply_step_mask")  # passes that ask for it


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

    precision: what its blocks multiplied in, "model" where the plan says nothing; share: of its work that was computed,
    the rest came from caches or was left out (mean of the pictures); reused, forecast: sites of blocks that gave kept
    values; tokens: image tokens computed of each picture, None: all.
    """

    row: int
    branches: tuple[str, ...]
    batch: int
    network_ms: float
    step_ms: float
    precision: str = "model"
    share: float = 1.0
    reused: int = 0
    forecast: int = 0
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a request cost. Milliseconds are wall time (device time on CUDA); memory in bytes.

    peak_memory: of the process (resident) or of the device; pool: the request's share of slots and network input.
    predicted_ms: of the launches this request shared, from the forwards timed at compile time; None: not timed.
    compiles: artefacts the session compiled so far, its whole life; hoisted: bytes of what left the loop, by part.
    compiled: how the model was compiled: what runs its rows and what was measured to decide it, buckets; plain data.
    caches: of a plan that caches: cells, bytes planned and taken, sites reused and forecast, share of work computed;
    decisions: of its guards, row by row. tokens: of a plan with rows that compute some image tokens: how many there
    are, such rows, the share of all that was computed, rows that one waits at most (-1: any), bytes. merges: of a plan
    that merges tokens: layers that did, maps made and reused, bytes planned and taken. guidance: of a plan whose guards
    leave branches out: see `engine.guided`.
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
    caches: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    merges: dict[str, Any] = field(default_factory=dict)
    guidance: dict[str, Any] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
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
        if self.caches:
            lines.append(f"caches    {_cached(self.caches)}")
        if self.tokens:
            lines.append(f"tokens    {_chosen(self.tokens)}")
        if self.merges:
            lines.append("merged    " + ", ".join(f"{name} {value}" for name, value in self.merges.items()))
        if self.guidance:
            lines.append(f"guidance  {guided.spelled(self.guidance)}")
        if self.decisions:
            lines.append("guards    " + " ".join(f"{d.row}:{sum(d.fired)}/{len(d.fired)}" for d in self.decisions))
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
    rows = tuple(_row(state, i, events, denoiser) for i in range(len(plan.steps)))
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
        branch_evals=guided.evaluated(plan, state.watch, [row.row for row in evaluated]),
        rows=rows,
        phases={name: round(ms, 4) for name, ms in phases.items()},
        measured_ms=measured_ms,
        predicted_ms=_predicted(probe, plan, evaluated),
        peak_memory=peak_memory(pool.device),
        pool=n * pool.lane_bytes(),
        kernels=(*executor.kernels(pool), *_selecting(state)),
        compiles=executor.compiles,
        hoisted={} if state.hoisted is None else dict(state.hoisted.bytes),
        compiled=executor.report(),
        caches=_caches(state, rows),
        tokens=_tokens(state, rows),
        merges={} if state.merges is None else state.merges.told(plan),
        guidance=guided.guidance(plan, state.watch, [row.row for row in evaluated]),
        decisions=() if state.watch is None else tuple(state.watch.decisions),
        one_by_one=executor.one_by_one,
        warnings=(*state.warnings, *unmerged(plan, state.merges), *_unused(state, rows), *_all(state, rows)),
        versions={"vivace": __version__, "torch": torch.__version__},
        details={**told(plan), **{name: report for name, report in denoiser.reports().items() if report is not None}},
        events=events,
    )


def _predicted(probe: Probe | None, plan: Plan, rows: list[RowRecord]) -> float | None:
    """What `rows` should have taken by the forwards timed at compile time; None where one was not timed."""
    if probe is None:
        return None
    variants = [(plan.steps[row.row].variant, row) for row in rows]
    times = [(probe.predict_ms(plan, variant, row.batch), row) for variant, row in variants if variant is not None]
    return None if any(ms is None for ms, _ in times) else sum(ms * row.share for ms, row in times if ms is not None)


def _row(state: State, i: int, events: tuple[Event, ...], denoiser: Denoiser) -> RowRecord:
    """What was recorded of row i, pictures that a guard sent different ways taken together."""
    mine = [event for event in events if event.row == i]
    steps = [event for event in mine if event.name == "solver_step"]
    network = [event for event in mine if event.name in ("network", "look")]
    step = state.plan.steps[i]
    variant, uses = step.variant, state.caches.rows[i].uses
    branches = guided.ran(state.plan, state.watch, i) if network else ()
    precision = "model" if variant is None else spelled(variant)
    times = sum(event.ms for event in network), sum(event.ms for event in steps)
    record = RowRecord(i, branches, sum(event.batch for event in steps), *times, precision)
    if variant is None or not (state.caches.planes or step.guard is not None or focused(variant)):
        return record
    record = replace(record, tokens=int(variant.keep) if focused(variant) else None)
    costs, blocks = denoiser.spec.costs, denoiser.spec.blocks
    of = 1 if state.tokens is None else state.tokens.count
    own = share_of(variant, uses, blocks, costs, of, denoiser.spec.layers), read_by(uses)
    if step.guard is None or state.watch is None:
        return replace(record, share=own[0], reused=own[1][0], forecast=own[1][1])
    otherwise = state.caches.rows[i].otherwise
    other = share_of(step.guard.otherwise, otherwise, blocks, costs), read_by(otherwise)
    fired = next((decision.fired for decision in state.watch.decisions if decision.row == i), ())
    part = sum(fired) / len(fired) if fired else 0.0
    taken = other if part == 1.0 else own
    whole = part * other[0] * len(step.guard.otherwise.branches) / len(variant.branches) + (1.0 - part) * own[0]
    return replace(record, share=whole, reused=taken[1][0], forecast=taken[1][1])


def _caches(state: State, rows: Sequence[RowRecord]) -> dict[str, Any]:
    """What was kept and given again; empty for a plan that does not cache."""
    planned = state.caches
    if not planned.planes:
        return {}
    evaluated, element = [row for row in rows if row.branches], state.pool.net.element_size()
    return {
        "cells": len(planned.planes),
        "planes": sum(planned.planes.values()),
        "bytes_planned": None if (per := cache_bytes(state.plan, element)) is None else per * state.request.n,
        "bytes": 0 if state.kept is None else state.kept.nbytes + (state.watch.nbytes if state.watch else 0),
        "reused": sum(row.reused for row in evaluated),
        "forecast": sum(row.forecast for row in evaluated),
        "computed_share": sum(row.share for row in evaluated) / max(1, len(evaluated)),
    }


def _unused(state: State, rows: Sequence[RowRecord]) -> tuple[str, ...]:
    """A warning where caching was asked for and no row gave a kept value."""
    rules = (rule for variant in state.plan.variants for rule in variant.rules)
    asked = any(rule.action is not None and rule.site not in (SITE, *KEYS) for rule in rules)
    recipe = state.plan.recipe
    named = [] if recipe is None else [name for name, _ in recipe.passes if name in CACHING]
    if not (asked or named) or any(row.reused or row.forecast for row in rows):
        return ()
    return (f"caching had no effect: no row gave a kept value ({', '.join(named) or 'rules of the plan'})",)


def _tokens(state: State, rows: Sequence[RowRecord]) -> dict[str, Any]:
    """What was computed of the image tokens; empty for a plan that always computes all."""
    if state.tokens is None:
        return {}
    count, evaluated = state.tokens.count, [row for row in rows if row.branches]
    done = sum(len(row.branches) * (count if row.tokens is None else row.tokens) for row in evaluated)
    return {
        "of": count,
        "rows": sum(row.tokens is not None for row in evaluated),
        "share": done / max(1, count * sum(len(row.branches) for row in evaluated)),
        "bound": max(-1 if row is None else row.bound for row in state.tokens.plan.rows),
        "bytes": state.tokens.nbytes,
    }


def _selecting(state: State) -> tuple[KernelUse, ...]:
    """Which backend chose tokens, and why."""
    if state.tokens is None:
        return ()
    choice = choose(SELECT, state.pool.device.type, str(state.pool.net_dtype).removeprefix("torch."))
    return (KernelUse(SELECT.name, choice.backend, choice.reason),)


def _all(state: State, rows: Sequence[RowRecord]) -> tuple[str, ...]:
    """A warning where rows were to compute some tokens and all computed all."""
    recipe = state.plan.recipe
    named = recipe is not None and any(name == "apply_tokens" for name, _ in recipe.passes)
    asked = named or state.tokens is not None
    left_out = state.tokens is not None and any(row.tokens not in (None, state.tokens.count) for row in rows)
    return ("tokens had no effect: every row computed all of them",) if asked and not left_out else ()


def _chosen(found: dict[str, Any]) -> str:
    """One line of the printout."""
    waits = "" if found["bound"] < 0 else f"; none waits for more than {found['bound']} rows"
    return f"{found['rows']} rows compute some of {found['of']}, {found['share']:.0%} in all{waits}"


def _cached(found: dict[str, Any]) -> str:
    """One line of the printout."""
    planned = "" if found["bytes_planned"] is None else f" of {found['bytes_planned'] / 2**20:.2f} planned"
    return (
        f"{found['cells']} cells, {found['bytes'] / 2**20:.2f} MiB{planned}; {found['reused']} reused, "
        f"{found['forecast']} forecast, {found['computed_share']:.0%} of the work computed"
    )
