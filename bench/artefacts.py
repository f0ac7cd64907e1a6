"""What is slow to make and kept outside the checkout: model folders, exported graphs, converged latents.

An artefact is a folder named by what it is and by a hash of everything it depends on. It is filled under another name
and renamed when complete, so a process that is stopped leaves nothing half-made and the next run goes on from there.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from vivace.errors import OutputError
from vivace.metrics.reference import cache_folder

DESCRIPTION = "artefact.json"


@dataclass(frozen=True)
class Artefact:
    """A folder that `make` fills. key: everything its contents depend on, plain data."""

    kind: str
    key: Mapping[str, Any]
    make: Callable[[Path], None] = field(compare=False)

    @property
    def path(self) -> Path:
        """Where it lies, made or not."""
        digest = sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        return folder() / f"{self.kind}-{digest}"

    @property
    def ready(self) -> bool:
        """It was made."""
        return (self.path / DESCRIPTION).is_file()

    def get(self) -> Path:
        """The folder, made now when it is not there. Raises OutputError."""
        if self.ready:
            return self.path
        work = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{self.kind}-", dir=self.path.parent))
            begin = time.perf_counter()
            with redirect_stdout(sys.stderr):  # exporters talk; stdout belongs to the report
                self.make(work)
            told = {"kind": self.kind, "key": dict(self.key), "seconds": round(time.perf_counter() - begin, 1)}
            (work / DESCRIPTION).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            work.chmod(0o755)
            try:
                work.rename(self.path)
            except OSError:
                if not self.ready:  # else another process was first, with the same contents
                    raise
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be made ({error}); set XDG_CACHE_HOME to a writable place"
            ) from error
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
        return self.path

    def told(self) -> str:
        """One line on a made artefact: name, size, what it took."""
        entry = json.loads((self.path / DESCRIPTION).read_text(encoding="utf-8"))
        return f"{self.path.name}: {megabytes(self.path):.0f} MB, made in {entry['seconds']:.0f} s"


def folder() -> Path:
    """Where artefacts are kept: $XDG_CACHE_HOME/vivace/bench, or ~/.cache/vivace/bench."""
    return cache_folder().parent / "bench"


def megabytes(path: Path) -> float:
    """Size of the files below a folder, in 10^6 bytes."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6


def versions(*names: str) -> dict[str, str | None]:
    """Versions of installed distributions; None: not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
