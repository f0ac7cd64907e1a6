"""What figures measured here depend on: processor, instruction set, threads, settings, versions; part of their key."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vivace import __version__
from vivace.kernels.spec import CPU, missing

if TYPE_CHECKING:
    import torch


def machine(device: torch.device) -> dict[str, Any]:
    """The device and everything beside it that decides how fast and how rounded a network runs; plain data."""
    import torch

    place = {"vivace": __version__, "torch": torch.__version__, "device": device.type}
    place |= {"backend": os.environ.get("VIVACE_BACKEND") or "auto", "products": torch.get_float32_matmul_precision()}
    if device.type == "cuda":
        return place | {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return place | {"name": processor(), "isa": instruction_set(), "threads": torch.get_num_threads()}


@cache
def processor() -> str:
    """Name of the processor as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in facts.items()}
    parts = [named.get(name, "") for name in ("model name", "cpu family", "model", "stepping")]
    return " ".join(part for part in parts if part) or platform.machine()


def instruction_set() -> str:
    """The one our kernels run on, "none" where they are not built."""
    if missing(CPU) is not None:
        return "none"
    from vivace import _C

    return _C.isa()
