"""Timing: interleaved candidates, medians with spread, ratios with confidence intervals, and the report they go into.

Two traps decide how candidates are interleaved. The threads of libgomp spin for some milliseconds after a parallel
torch op and take the cores from whoever runs next, so every change of candidate waits until they sleep, then calls the
candidate untimed for a while: it finds its own threads awake and its own data in cache. And fresh memory costs more
than the op: candidates write into memory that was written before.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vivace.errors import ArgumentError

PAUSE = 0.008  # seconds until libgomp's threads sleep
SPAN = 0.012  # seconds a timed span lasts at least; short candidates are called several times in it
LEAD = 0.003  # seconds of untimed calls before it: caches, frequency and sleeping threads are up by then
# Columns a printed table shows, in this order, where rows have them.
COLUMNS = (
    "op", "backend", "case", "factor", "dtype", "ms", "compile_s", "floor_ms", "gb_per_s", "gflop_per_s",
    "percent_of_roofline", "over_eager", "over_compile", "over_onednn",
    "over_openvino", "over_default", "over_best_peer", "peak_mb",
    "on", "guidance", "solver", "spacing", "steps", "method", "setting", "share", "shares", "time_ratio", "gap",
    "evaluations", "nfe", "tokens", "error", "psnr", "psnr_uncached", "drift", "meets",
    "fewer_steps", "fewer_psnr", "fewer_best_psnr", "gain_db",
    "order", "measured",
    "mb", "weights_mb", "ratio", "free", "ties", "codes", "built", "layers",
    "agree", "refused", "deviate", "model", "pictures", "spread", "difficulty", "top1", "frechet",
    "changed", "compiles", "reason",
)  # fmt: skip
LIBRARIES = ("vivace", "torch", "diffusers", "triton", "numpy")


@dataclass(frozen=True)
class Candidate:
    """Something to time: `call` does the work once; `prepare(calls)` runs untimed before that many calls."""

    call: Callable[[], object]
    prepare: Callable[[int], object] = lambda calls: None


@dataclass(frozen=True)
class Timing:
    """Times of one candidate in ms, one a round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.ms))

    def to_dict(self) -> dict[str, float]:
        p20, median, p80 = (float(np.percentile(self.ms, p)) for p in (20, 50, 80))
        return {"p20": p20, "median": median, "p80": p80, "rounds": len(self.ms)}


def interleave(
    candidates: Mapping[str, Candidate], *, seconds: float, least: int = 7, warm_up: float = 0.2
) -> dict[str, Timing]:
    """Times candidates in turn, round after round, for about `seconds` and at least `least` rounds.

    Each is first warmed up for `warm_up` seconds, which also says how many calls fill a span.
    """
    calls = {name: _calls_in_span(candidate, warm_up) for name, candidate in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names, end = list(candidates), time.perf_counter() + seconds
    while len(times[names[0]]) < least or time.perf_counter() < end:
        for name in names:
            times[name].append(_timed(candidates[name], calls[name]))
        names.append(names.pop(0))  # no candidate always follows the same one
    return {name: Timing(tuple(values)) for name, values in times.items()}


def in_turn(candidates: Mapping[str, Candidate], *, seconds: float, least: int = 3) -> dict[str, Timing]:
    """`interleave` for calls of a tenth of a second and more: one timed call a round, one untimed before all rounds.

    Untimed calls before every timed one would double the time, and are lost in calls that are this long.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate.prepare(1)
        candidate.call()
    names, end = list(candidates), time.perf_counter() + seconds
    while len(times[names[0]]) < least or time.perf_counter() < end:
        for name in names:
            candidates[name].prepare(1)
            time.sleep(PAUSE)
            begin = time.perf_counter()
            candidates[name].call()
            times[name].append((time.perf_counter() - begin) * 1e3)
        names.append(names.pop(0))  # no candidate always follows the same one
    return {name: Timing(tuple(values)) for name, values in times.items()}


def _calls_in_span(candidate: Candidate, warm_up: float) -> int:
    """Warm up, then the number of calls that last SPAN."""
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < warm_up or done < 2:
        candidate.prepare(1)
        candidate.call()
        done += 1
    first = max(1, round(SPAN / 4 * done / (time.perf_counter() - begin)))
    return max(1, round(SPAN / (_timed(candidate, first) / 1e3)))


def _timed(candidate: Candidate, calls: int) -> float:
    """Milliseconds of one call, from a span of `calls` after some untimed ones."""
    untimed = max(1, round(calls * LEAD / SPAN))
    candidate.prepare(untimed + calls)
    time.sleep(PAUSE)
    call = candidate.call
    for _ in range(untimed):
        call()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e3


def ratio_of_medians(above: Sequence[Timing], below: Sequence[Timing], seed: int = 0) -> tuple[float, list[float]]:
    """Geometric mean over pairs of median(above) / median(below), and its 95 % bootstrap interval [low, high].

    Rounds are resampled with replacement, those of one pair together: what slows a round slows both.
    """
    rng = np.random.default_rng(seed)
    pairs = [(np.array(a.ms), np.array(b.ms)) for a, b in zip(above, below, strict=True)]
    value = _mean_ratio(pairs)
    draws = []
    for _ in range(2000):
        picks = [rng.integers(0, len(a), len(a)) for a, _ in pairs]
        draws.append(_mean_ratio([(a[p], b[p]) for (a, b), p in zip(pairs, picks, strict=True)]))
    return value, [float(np.percentile(draws, p)) for p in (2.5, 97.5)]


def _mean_ratio(pairs: Sequence[tuple[Any, Any]]) -> float:
    return float(np.exp(np.mean([np.log(np.median(a) / np.median(b)) for a, b in pairs])))


@dataclass(frozen=True)
class Claim:
    """A figure that the documents promise, measured now. `value` None: cannot be measured here, `how` says why.

    op: ">=" or "<="; n: rounds behind the value; interval: 95 %.
    """

    name: str
    op: str
    bound: float
    how: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    n: int = 0

    @property
    def holds(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.op == ">=" else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "value": self.value, "interval": None if self.interval is None else list(self.interval),
            "n": self.n, "op": self.op, "bound": self.bound, "holds": self.holds, "how": self.how,
        }  # fmt: skip


Measure = Callable[[bool], tuple[list[dict[str, Any]], "Claim"]]  # quick -> the rows behind a claim, and the claim


def of_claims(
    suite: str, measures: Mapping[str, Measure], op: str | None, claim: str | None, quick: bool
) -> tuple[list[dict[str, Any]], list[Claim]]:
    """Rows and claims of a suite, or of one claim. Raises ArgumentError for an op, or a claim that is not there."""
    if op is not None:
        raise ArgumentError(f"bench {suite}: --op belongs to the suite kernels; drop it")
    if claim is not None and claim not in measures:
        raise ArgumentError(f"bench {suite}: claim {claim!r} is not here; use one of {', '.join(measures)}")
    rows, claims = list[dict[str, Any]](), list[Claim]()
    for name in measures if claim is None else [claim]:
        more, measured = measures[name](quick)
        rows += more
        claims.append(measured)
    return rows, claims


def report(suite: str, rows: Sequence[Mapping[str, Any]], claims: Sequence[Claim]) -> dict[str, Any]:
    """The JSON object of a run; every row also says where, when and with what it was measured."""
    common = {
        "device": machine()["cpu"], "driver": None, "versions": versions(), "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    return {
        "suite": suite, "machine": machine(), "versions": versions(), "commit": commit(),
        "rows": [{**common, **row} for row in rows], "claims": [claim.to_dict() for claim in claims],
    }  # fmt: skip


@cache
def machine() -> dict[str, Any]:
    """Processor, cores this process may use, last-level cache, instruction set of the kernels, system."""
    import torch

    from vivace import _C

    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(), "cores": _C.usable_processors(),
        "threads": torch.get_num_threads(), "last_level_cache_bytes": _C.last_level_cache_bytes(), "isa": _C.isa(),
        "system": platform.platform(), "load": os.getloadavg()[0],
    }  # fmt: skip


@cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that take part; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def commit() -> str | None:
    """Commit of the checkout this package runs from, "+" when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def render(data: Mapping[str, Any]) -> str:
    """A report as text: its own `table`, lines, where it has one, else a line a row."""
    lines = [f"{data['suite']} on {data['machine']['cpu']}, {data['machine']['threads']} threads"]
    lines += data["table"] if "table" in data else _table(data)
    for claim in data["claims"]:
        verdict = {True: "holds", False: "FAILS", None: "not measured"}[claim["holds"]]
        lines.append(
            f"{claim['name']} = {_cell(claim['value'])} {claim['op']} {claim['bound']}: {verdict}; {claim['how']}"
        )
    return "\n".join(lines)


def _table(data: Mapping[str, Any]) -> list[str]:
    """A line of column names, a line a row."""
    columns = [name for name in COLUMNS if any(name in row for row in data["rows"])]
    cells = [tuple(columns), *(tuple(_cell(row.get(column)) for column in columns) for row in data["rows"])]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.3f} [{value['p20']:.3f}, {value['p80']:.3f}]"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
