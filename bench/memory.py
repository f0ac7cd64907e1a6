"""By how much the resident memory of this process grows at its peak during a piece of work."""

from __future__ import annotations

import gc
from pathlib import Path
from types import TracebackType
from typing import Self

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Growth:
    """Peak resident bytes during the enclosed work above those before it; None where the system does not say.

    Freed memory that the process keeps is used again without growing, so this is a lower bound.
    """

    def __init__(self) -> None:
        self.megabytes: float | None = None

    def __enter__(self) -> Self:
        gc.collect()
        try:
            RESET.write_text("5")  # the peak starts anew
        except OSError:
            self._before = None
            return self
        self._before = _resident("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = _resident("VmHWM")
        if self._before is not None and after is not None:
            self.megabytes = max(0, after - self._before) / 1e6


def _resident(name: str) -> int | None:
    """A line of /proc/self/status in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
