"""Peak memory of a piece of work, and the table of it for a set of pipelines.

    python -m vivace.models.pipelines.memory tests.models.pipelines.tiny --out docs/results/memory_tiny.md

takes a module with `FAMILIES` (name -> object whose `arguments()` are those of a call) and `make(name)`, a pipeline.
Each family runs in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
EXACT = "peak kept by the kernel (VmHWM), reset before"
SAMPLED = "resident size, sampled every millisecond"
MONOTONE = "largest so far (ru_maxrss), which earlier work may have set"
DEVICE = "allocated on the device (torch.cuda)"


@dataclass(frozen=True)
class Peak:
    """Bytes before the work, the most during it, and how that was found."""

    before: int
    peak: int
    how: str

    @property
    def added(self) -> int:
        """Bytes the work needed on top."""
        return max(0, self.peak - self.before)


def peak_memory(work: Callable[[], T], device: str | torch.device = "cpu") -> tuple[T, Peak]:
    """The result of `work`, and its peak memory: resident bytes of this process, or bytes allocated on a CUDA device.

    Counts the whole process: other threads that run meanwhile too. On the CPU the kernel's own peak is reset and read
    where that is permitted, so no allocation is missed; `Peak.how` says what was done. On CUDA the device's peak
    statistics are reset.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, Peak(before, torch.cuda.max_memory_allocated(device), DEVICE)
    if _reset_peak():
        before = _status("VmHWM")
        result = work()
        return result, Peak(before, _status("VmHWM"), EXACT)
    if STATUS.exists():
        return _sampled(work)
    before = _largest()
    result = work()
    return result, Peak(before, _largest(), MONOTONE)


def _reset_peak() -> bool:
    """Make the kernel's peak the present resident size; False where that is not possible."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _largest() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _sampled(work: Callable[[], T]) -> tuple[T, Peak]:
    """As `peak_memory`, from samples taken by a thread, before and after."""
    before = _status("VmRSS")
    seen, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(1e-3):
            seen.append(max(seen.pop(), _status("VmRSS")))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, Peak(before, max(*seen, _status("VmRSS")), SAMPLED)


def settle() -> None:
    """Hand back what is free, so that the next peak starts from what is in use."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class MemoryRow:
    """A family: bytes of its weights; added bytes of load, of a call, and of a call after `vivace.accelerate`."""

    family: str
    weights: int
    load: int
    run: int
    accelerated: int
    resident: int
    how: str


def measure(name: str, pipeline: Any, arguments: dict[str, Any]) -> MemoryRow:
    """The row of one pipeline, on the CPU; each figure is of the second time, when libraries are loaded.

    Load is `vivace.load` of a folder of safetensors that is written first.
    """
    from vivace.models.pipelines.accelerate import accelerate, restore
    from vivace.models.pipelines.open import PipelinePipe, open_foreign

    tensors = [
        t for part in pipeline.components.values() if isinstance(part, torch.nn.Module) for t in part.parameters()
    ]
    weights = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        del pipeline, tensors

        def load() -> Any:
            opened = open_foreign(folder)
            assert isinstance(opened, PipelinePipe)
            opened.pipeline.set_progress_bar_config(disable=True)
            return opened.pipeline

        load()(**arguments)
        settle()
        pipeline, loading = peak_memory(load)
    settle()
    _, plain = peak_memory(lambda: pipeline(**arguments))
    accelerate(pipeline)
    pipeline(**arguments)
    settle()
    _, planned = peak_memory(lambda: pipeline(**arguments))
    restore(pipeline)
    return MemoryRow(name, weights, loading.added, plain.added, planned.added, loading.before, loading.how)


def markdown(rows: Iterable[MemoryRow], command: str) -> str:
    """The page of a table: what, where, how, and one line a family."""
    import diffusers

    rows = list(rows)
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    how = ", ".join(sorted({row.how for row in rows}))
    head = [
        "# Peak memory of the tiny families",
        "",
        "Memory added on the CPU in float32, a process a family: `load` of a folder of safetensors, `run` of a call of",
        "the plain pipeline, `accelerated` of the same call after `vivace.accelerate`. Libraries were loaded and warm",
        "before; `resident` is what the process held then. 0 means that memory freed earlier was enough.",
        "",
        f"- device: CPU {cpu or platform.machine()}, {torch.get_num_threads()} thread(s), {platform.system()}",
        f"- versions: Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        f"- measured: {how}",
        f"- command: `{command}`",
        "",
        "| family | weights KiB | load KiB | run KiB | accelerated KiB | resident MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        added = (row.weights, row.load, row.run, row.accelerated)
        cells = [row.family, *(f"{size / 2**10:.0f}" for size in added), f"{row.resident / 2**20:.0f}"]
        head.append(f"| {' | '.join(cells)} |")
    return "\n".join(head) + "\n"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file; `--family NAME` prints the row of one family as JSON."""
    parser = argparse.ArgumentParser(prog="python -m vivace.models.pipelines.memory", description=__doc__)
    parser.add_argument("module", help="importable module with FAMILIES and make(name)")
    parser.add_argument("--out", type=Path, help="file of the table; printed without")
    parser.add_argument("--family", help="one family, as JSON")
    given = parser.parse_args(arguments)
    source = importlib.import_module(given.module)
    if given.family:
        row = measure(given.family, source.make(given.family), source.FAMILIES[given.family].arguments())
        sys.stdout.write(json.dumps(asdict(row)) + "\n")
        return
    own = [sys.executable, "-m", "vivace.models.pipelines.memory", given.module]
    rows = []
    for name in source.FAMILIES:
        done = subprocess.run([*own, "--family", name], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(MemoryRow(**json.loads(done.stdout.splitlines()[-1])))
    command = f"python -m vivace.models.pipelines.memory {given.module}" + (f" --out {given.out}" if given.out else "")
    page = markdown(rows, command)
    if given.out:
        given.out.write_text(page)
    else:
        sys.stdout.write(page)


if __name__ == "__main__":
    main()
