"""What this machine has: nothing is guessed, what is absent is said."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

PACKAGES = ("torch", "triton", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt", "numpy", "safetensors")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what, what was found, and a hint where something is absent."""

    name: str
    found: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything `vivace doctor` reports."""

    findings: tuple[Finding, ...]
    kernels: tuple[dict[str, Any], ...]
    choices: tuple[dict[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "machine": {f.name: f.found for f in self.findings},
            "kernels": list(self.kernels),
            "choices": list(self.choices),
        }

    def __str__(self) -> str:
        width = max(len(f.name) for f in self.findings)
        lines = [f"{f.name:{width}}  {f.found}" for f in self.findings]
        for row in self.kernels:
            mark = "runs" if row["available"] else "absent"
            lines.append(f"kernel {row['op']} {row['backend']}: {mark} ({row['reason']})")
        lines += [f"{c['op']} on {c['device']} tensors will use {c['backend']} ({c['reason']})" for c in self.choices]
        return "\n".join(lines)


def examine() -> Machine:
    """Look at interpreter, cores, instruction set, packages, devices and kernel backends."""
    from vivace import __version__
    from vivace.engine.machine import processor

    findings = [
        Finding("vivace", __version__),
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("cpu", f"{processor()}, {len(os.sched_getaffinity(0))} usable core(s)"),
        Finding("extension", _extension()),
        *(Finding(name, _package(name)) for name in PACKAGES),
        Finding("gpu", _gpu()),
    ]
    return Machine(tuple(findings), _kernels(), _choices())


def _package(name: str) -> str:
    if find_spec_safe(name) is None:
        return "not installed"
    try:
        return version(name)
    except PackageNotFoundError:
        return "present, version unknown"


def find_spec_safe(name: str) -> Any:
    """The spec of a package, or None when it is absent or blocked."""
    try:
        return find_spec(name)
    except ImportError:
        return None


def _extension() -> str:
    try:
        from vivace import _C
    except ImportError:
        return "not built: kernels run their torch reference (make build)"
    return f"built, instruction set {_C.isa()} (of {', '.join(_C.available_isas())})"


def _gpu() -> str:
    if find_spec_safe("torch") is None:
        return "unknown: torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    return f"{name}, {memory / 2**30:.0f} GiB, driver {_driver()}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _kernels() -> tuple[dict[str, Any], ...]:
    if find_spec_safe("torch") is None:
        return ()
    from vivace.kernels.spec import backends

    return tuple(asdict(row) for row in backends())


def _choices() -> tuple[dict[str, str], ...]:
    """What each op will run on the devices this machine has, in float32."""
    if find_spec_safe("torch") is None:
        return ()
    import torch

    from vivace.kernels.spec import choose, ops

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return tuple(
        {"op": spec.name, "device": device, **asdict(choose(spec, device, "float32"))}
        for spec in ops()
        for device in devices
    )
