"""Timing on a GPU: every candidate captured into a CUDA graph and replayed with cold caches, in turn, by events.

A replay launches its kernels without Python between them. Before each, a buffer larger than the L2 cache is filled, so
that a candidate finds its inputs in memory, as the next layer of a network would, and the launch is on its way before
the clock starts. What cannot be captured is called, between the same events; its row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vivace.bench.compiling import compiled_peer
from vivace.bench.harness import Timing
from vivace.kernels.spec import REFERENCE, TRITON, OpSpec, missing

PLACE = "cuda"
FLUSH = 4  # times the L2 cache is filled between replays
ROUNDS = 5  # replays of each candidate between two looks at the clock
SPAN, MOST, SPANS = 30.0, 48, 7  # milliseconds of a timed span, calls in it at most, spans at least
WARM_UP = 3  # calls before a capture: compilation, allocations, handles
SEED = 7


@dataclass(frozen=True, eq=False)
class Work:
    """One thing to compute in several ways: `ours` under the name of its backend, `eager` by torch on `inputs`.

    traffic, flops: of one call, for the roofline; told: more columns of its rows.
    """

    op: str
    case: str
    backend: str
    ours: Callable[[], Any]
    eager: Callable[..., Any]
    inputs: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: str
    traffic: int
    flops: int = 0
    told: Mapping[str, Any] = field(default_factory=dict)


def present() -> bool:
    """A GPU is here: benches of kernels measure it instead of the processor."""
    return torch.cuda.is_available()


def backend(spec: OpSpec) -> str:
    """What is timed as ours: Triton where it runs, else the definition."""
    return TRITON if TRITON in spec.impls and missing(TRITON) is None else REFERENCE


def rows(work: Work, quick: bool) -> list[dict[str, Any]]:
    """One row a way of computing, timed together: ours, eager torch, torch.compile (unless quick)."""
    source = torch.ones(max(1, work.traffic // 2), dtype=torch.uint8, device=PLACE)
    target = torch.zeros_like(source)
    calls = {work.backend: work.ours, "eager": lambda: work.eager(*work.inputs), "copy": lambda: target.copy_(source)}
    with torch.inference_mode():
        compiled, reason = (None, "not compiled in a quick run") if quick else compiled_peer(work.eager, work.inputs)
        if compiled is not None:
            calls["torch.compile"] = compiled
        times, captured = interleave(calls, seconds=0.3 if quick else 1.0)
    told = {**work.told, "over_compile_reason": reason, "device": name(), "driver": driver()}
    return [
        describe(work, backend, times) | told | {"by": "graph" if backend in captured else "events"}
        for backend in times
        if backend != "copy"
    ]


def describe(work: Work, backend: str, times: Mapping[str, Timing]) -> dict[str, Any]:
    """One row of the report; ratios above 1 mean faster than the peer. The roofline is a copy of equal traffic."""
    ms, floor = times[backend].median, times["copy"].median
    return {
        "op": work.op, "backend": backend, "case": work.case, "shape": list(work.shape), "dtype": work.dtype,
        "ms": times[backend].to_dict(), "gb_per_s": work.traffic / ms / 1e6, "bytes": work.traffic,
        "tflop_per_s": work.flops / ms / 1e9, "roofline": "copy", "roofline_gb_per_s": work.traffic / floor / 1e6,
        "percent_of_roofline": 100 * floor / ms, "over_eager": times["eager"].median / ms,
        "over_compile": times["torch.compile"].median / ms if "torch.compile" in times else None, "seed": SEED,
    }  # fmt: skip


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float, least: int = 20
) -> tuple[dict[str, Timing], frozenset[str]]:
    """Times of one call each, in turn, for about `seconds` of device time and at least `least` rounds.

    Returns: times by name, and the names that ran as graphs.
    """
    graphs = {name: capture(call) for name, call in calls.items()}
    runs = {name: call if (graph := graphs[name]) is None else graph.replay for name, call in calls.items()}
    flush = torch.empty(FLUSH * cache_bytes(), dtype=torch.uint8, device=PLACE)
    found: dict[str, list[float]] = {name: [] for name in runs}
    names, spent = list(runs), 0.0
    while len(found[names[0]]) < least or spent < seconds * 1e3:
        marks: list[tuple[str, Any, Any]] = []
        for _ in range(ROUNDS):
            marks += [(name, *marked(runs[name], flush)) for name in names]
            names.append(names.pop(0))  # no candidate always follows the same one
        torch.cuda.synchronize()
        for name, begin, end in marks:
            found[name].append(begin.elapsed_time(end))
        spent += marks[0][1].elapsed_time(marks[-1][2])
    return {name: Timing(tuple(times)) for name, times in found.items()}, frozenset(
        name for name, graph in graphs.items() if graph is not None
    )


def spans(calls: Mapping[str, tuple[Callable[[], Any], Callable[[int], Any]]], *, seconds: float) -> dict[str, Timing]:
    """Times of one call each, (call, prepare), from spans of several calls between synchronizations, in turn.

    For work with a host side, a row of a session or a whole network, in its steady state. `prepare(calls)` runs
    untimed before so many calls.
    """
    counts = {name: _calls_in_span(*pair) for name, pair in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    names, end = list(calls), time.perf_counter() + seconds
    while len(found[names[0]]) < SPANS or time.perf_counter() < end:
        for each in names:
            found[each].append(_span(*calls[each], counts[each]))
        names.append(names.pop(0))
    return {name: Timing(tuple(times)) for name, times in found.items()}


def _calls_in_span(call: Callable[[], Any], prepare: Callable[[int], Any]) -> int:
    """Warm up, then the number of calls that last SPAN, MOST at most."""
    for _ in range(WARM_UP):
        _span(call, prepare, 1)
    return min(MOST, max(1, round(SPAN / _span(call, prepare, 2))))


def _span(call: Callable[[], Any], prepare: Callable[[int], Any], calls: int) -> float:
    """Milliseconds of one call."""
    prepare(calls)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls * 1e3


def marked(run: Callable[[], Any], flush: Tensor) -> tuple[Any, Any]:
    """Events before and after one run, with nothing of it in the cache."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    run()
    end.record()
    return begin, end


def capture(call: Callable[[], Any]) -> Any:
    """A CUDA graph of one call, warmed up; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it waits for the device, or allocates outside of torch
        torch.cuda.synchronize()
        return None
    return graph


def cache_bytes() -> int:
    """Size of the L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 64 << 20


def name() -> str:
    """The product's name."""
    return str(torch.cuda.get_device_name(0))


def driver() -> str | None:
    """Version of the driver, None where nvidia-smi does not tell."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.split("\n")[0].strip() or None
