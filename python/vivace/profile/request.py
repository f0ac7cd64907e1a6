"""Where the time of a request goes: per phase, row and kernel; a table and a Chrome / Perfetto trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from vivace.engine.plan_io import write_atomic
from vivace.engine.receipt import Event, Receipt
from vivace.engine.request import Request, Result
from vivace.models.heat import write_heat
from vivace.models.pictures import check_writable

if TYPE_CHECKING:
    from vivace.engine.session import Session


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Self time of one kernel or framework op over the run, in ms."""

    name: str
    calls: int
    ms: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One profiled request: its receipt, and the kernels below the rows by self time.

    The receipt is of a run without the profiler, so that its times are not inflated; kernels are of a second one.
    """

    receipt: Receipt
    kernels: tuple[KernelTime, ...]

    def to_dict(self, top: int) -> dict[str, Any]:
        """Plain data for JSON; the `top` most expensive kernels."""
        total = sum(kernel.ms for kernel in self.kernels) or 1.0
        kernels = [
            {"name": kernel.name, "calls": kernel.calls, "ms": kernel.ms, "share": kernel.ms / total}
            for kernel in self.kernels[:top]
        ]
        return {"receipt": self.receipt.to_dict(), "kernels": kernels, "kernels_total_ms": total}

    def table(self, top: int) -> str:
        """Phases, rows and kernels as text."""
        lines = [str(self.receipt), "", f"{'row':>4}  {'branches':14}{'batch':>5}  {'network ms':>10}  {'step ms':>8}"]
        for row in self.receipt.rows:
            branches = "+".join(row.branches) or "-"
            lines.append(f"{row.row:>4}  {branches:14}{row.batch:>5}  {row.network_ms:>10.3f}  {row.step_ms:>8.3f}")
        total = sum(kernel.ms for kernel in self.kernels) or 1.0
        lines += ["", f"{'kernel (self time, profiled run)':50}{'calls':>7}  {'ms':>9}  {'share':>6}"]
        for kernel in self.kernels[:top]:
            lines.append(f"{kernel.name[:49]:50}{kernel.calls:>7}  {kernel.ms:>9.3f}  {kernel.ms / total:>6.1%}")
        return "\n".join(lines)


def profile_request(
    session: Session, prompt: str | None, *, n: int = 1, trace: Path | None = None, tokens: Path | None = None
) -> Profile:
    """Run a request three times: to warm up, for the times of rows and phases, and under the profiler for kernels.

    `trace`: JSON in Chrome's trace format, one track for rows and phases and one for kernels, of the profiled run.
    `tokens`: PNG of how often each region was computed. Raises ArgumentError where the plan computes all tokens.
    """
    for path in filter(None, (trace, tokens)):
        check_writable(path)
    request = Request(prompt, n=n)
    _run(session, request)
    result = _run(session, request)
    if tokens is not None:
        write_heat([result], tokens)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        profiled = _run(session, request).receipt
    averages = [
        KernelTime(average.key, average.count, (average.self_cpu_time_total + _device_time(average)) / 1e3)
        for average in profiler.key_averages()
    ]
    if trace is not None:
        write_atomic(trace, json.dumps(chrome_trace(profiled, profiler.events())).encode())
    kernels = sorted((kernel for kernel in averages if kernel.ms > 0), key=lambda kernel: -kernel.ms)
    return Profile(result.receipt, tuple(kernels))


def chrome_trace(receipt: Receipt, kernels: Any) -> dict[str, Any]:
    """Rows and phases of a receipt, and profiler events, as Chrome trace events in microseconds.

    Both tracks start at their own first event: the clocks of the session and of the profiler differ by a constant.
    """
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"name": f"vivace plan {receipt.plan_hash[:12]}"}},
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "rows and phases"}},
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": 1, "args": {"name": "kernels"}},
    ]
    first = min((event.start_ms for event in receipt.events), default=0.0)
    for event in receipt.events:
        args = {"row": event.row, "batch": event.batch}
        events.append(_complete(_label(event), 0, (event.start_ms - first) * 1e3, event.ms * 1e3, args))
    starts = [kernel.time_range.start for kernel in kernels]
    origin = min(starts, default=0)
    for kernel in kernels:
        span = kernel.time_range
        events.append(_complete(kernel.name, 1, span.start - origin, span.end - span.start, {}))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"plan": receipt.plan_hash}}


def _run(session: Session, request: Request) -> Result:
    state = session.begin(request)
    while not state.done:
        session.step([state])
    return session.finish(state)


def _label(event: Event) -> str:
    return event.name if event.row < 0 else f"row {event.row} {event.name}"


def _complete(name: str, track: int, start: float, duration: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": 0, "tid": track, "ts": start, "dur": duration, "args": args}


def _device_time(average: Any) -> float:
    return float(getattr(average, "self_device_time_total", 0.0))
