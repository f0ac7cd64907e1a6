"""The steps of bench/gpu.sh, run as a script by a Python that may lack everything but the standard library.

Every step has a time limit, a log and a record; one that fails or takes too long is recorded and the rest goes on.
OUTDIR/summary.json is written after every step: {"seconds", "limit", "steps": [{"name", "status", "seconds", ...}]}.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 530  # seconds of everything, unless LIMIT says otherwise
LEAST = 5  # seconds that must be left for a step to begin
TAIL = 15  # lines of a failed step's log that are shown and recorded
GRAPHS = "tests/models/compiled/graphs_on_device.py"
TRAINING = ("--updates", "300", "--every", "100", "--batch", "256")


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, the step it needs, and why it is left out (None: it is not)."""

    name: str
    limit: int
    command: tuple[str, ...]
    needs: str | None = "build"
    left_out: str | None = None


def steps(out: Path, python: str, wheels: Path, train: bool) -> tuple[Step, ...]:
    """All steps in order: what the others need first, then what says most about a GPU."""
    vivace = (python, "-m", "vivace")
    found = tuple(map(str, sorted(wheels.glob("*.whl")))) if wheels.is_dir() else ()
    install = ("install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(out / "site"))
    tests = ("-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", "--ignore", "tests/kernels/test_triton.py")
    return (
        Step("wheels", 90, (python, "-m", "pip", *install, *found), None, None if found else f"no wheels in {wheels}"),
        Step("build", 150, (python, "setup.py", "-q", "build_ext", "--inplace"), None),
        Step("doctor", 40, (*vivace, "doctor", "--json")),
        Step("tests", 150, (python, *tests, *parallel(python), "tests/kernels")),
        Step("graphs", 90, (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", GRAPHS)),
        Step("tune", 110, (python, "-m", "vivace.bench.tune", str(out / "tune.json"))),
        Step("products", 120, (python, "-m", "vivace.bench.on_gpu", "products", str(out / "products.json"))),
        Step("kernels", 130, (*vivace, "bench", "kernels", "--quick", "--out", str(out))),
        Step("denoiser", 180, (python, "-m", "vivace.bench.on_gpu", "denoiser", str(out / "denoiser.json"))),
        Step("large", 180, (python, "-m", "vivace.bench.on_gpu", "large", str(out / "large.json"))),
        Step("cached", 120, (python, "-m", "vivace.bench.on_gpu", "cached", str(out / "cached.json"))),
        Step("e2e", 80, (python, "-m", "vivace.bench.on_gpu", "e2e", str(out / "e2e.json"))),
        Step("generate", 40, (*vivace, "generate", "red heart", "--n", "4", "--out", str(out / "heart.png"))),
        Step(
            "train", 240, (python, "examples/train_emoji.py", "--out", str(out / "emoji"), *TRAINING, *font()),
            left_out=None if train else "TRAIN=1 was not given",
        ),
    )  # fmt: skip


def font() -> tuple[str, ...]:
    """The font that FONT names, where the machine has none installed."""
    return ("--font", os.environ["FONT"]) if os.environ.get("FONT") else ()


def parallel(python: str) -> tuple[str, ...]:
    """Options of pytest that spread tests over processes, where its plugin is installed."""
    asked = subprocess.run([python, "-c", "import xdist"], capture_output=True, check=False)
    return ("-n", "8") if asked.returncode == 0 else ()


def run(step: Step, out: Path, seconds: float) -> dict[str, Any]:
    """The record of a step that may take so many seconds; its processes end with it."""
    log, begin = out / f"{step.name}.log", time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment(out),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return record(step, "failed", 0.0, reason=f"{step.command[0]}: {error.strerror}")
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, status = None, "timed out"
        finally:
            end(process)
    told = record(step, status, time.monotonic() - begin, code=code, log=log.name)
    if status != "ok":
        told["tail"] = log.read_text(errors="replace").splitlines()[-TAIL:]
    return told


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop what is left of a step: politely, then for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def environment(out: Path) -> dict[str, str]:
    """Packages of the wheels, then ours; a build without a compiler is an error."""
    path = os.pathsep.join([str(out / "site"), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "VIVACE_REQUIRE_EXT": "1", "PYTHONUNBUFFERED": "1"}


def record(step: Step, status: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A line of the summary."""
    told = {"name": step.name, "status": status, "seconds": round(seconds, 1), "limit": step.limit}
    return told | {"command": list(step.command)} | more


def why_not(step: Step, passed: set[str], left: float) -> str | None:
    """Why a step is not run; None when it is."""
    only = os.environ.get("ONLY", "").split()
    if step.left_out is not None or (only and step.name not in only):
        return step.left_out or "ONLY names others"
    if step.needs is not None and step.needs not in passed:
        return f"{step.needs} did not pass"
    return None if left >= LEAST else f"{left:.0f} s are left of all"


def main(out: Path, python: str, wheels: Path) -> int:
    """Run all steps. Returns 1 when one failed or took too long."""
    dry, total = os.environ.get("DRY") == "1", float(os.environ.get("LIMIT") or TOTAL)
    begin, passed, told = time.monotonic(), set[str](), list[dict[str, Any]]()
    for step in steps(out, python, wheels, os.environ.get("TRAIN") == "1"):
        left = total - (time.monotonic() - begin)
        if dry:
            reason = why_not(step, {"build"}, total)
            note = " ".join(step.command) if reason is None else f"left out: {reason}"
            print(f"{step.name:13} {step.limit:4} s  {note}")
            continue
        if (reason := why_not(step, passed, left)) is not None:
            told.append(record(step, "left out", 0.0, reason=reason))
        else:
            told.append(run(step, out, min(step.limit, left)))
        if told[-1]["status"] == "ok":
            passed.add(step.name)
        print(
            f"{told[-1]['status']:9} {step.name:13} {told[-1]['seconds']:6.1f} s",
            told[-1].get("reason", ""),
            flush=True,
        )
        print(*told[-1].get("tail", ()), sep="\n", end="\n" if told[-1].get("tail") else "", flush=True)
        summary = {"seconds": round(time.monotonic() - begin, 1), "limit": total, "steps": told}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(line["status"] in ("failed", "timed out") for line in told))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
