"""Work of a long calibration that is under way, in one file: a run that was stopped goes on from there.

A calibrator takes `resume: str | PathLike | None = None`, a file's name, and keeps what it has done:

    with Partial(resume, {"method": name, "fingerprint": problem.fingerprint, "seed": seed, ...}) as partial:
        for row in range(rows):
            mean = partial.once(f"mean.{row}", lambda: measure(row))  # computed, or read
            progress("rows", row + 1, rows)

The description names everything that the numbers depend on. Work of another description is refused, by the first field
that differs. The file is written whole or not at all, at most every `interval` seconds, and when the `with` block ends,
also by an error or Ctrl-C. It stays until its owner removes it: with it the same call gives the same table at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vivace.engine.calibrate.table import Array, CalibrationTable
from vivace.errors import ArgumentError, ModelError

KIND = "partial"


class Partial(MutableMapping[str, Array]):
    """Arrays by name and JSON data, `data`, kept in a file between runs of the same description.

    Args:
        path: the file; None: memory only, so that a calibrator needs one way of working.
        description: JSON data (tuples count as lists): all that the work depends on.
        anew: begin again, whatever the file holds. interval: seconds between two writings by `save`.
    Raises: ArgumentError for work of another description, or a description that is no JSON; ModelError for a damaged
        file; OutputError when it cannot be written.
    """

    def __init__(
        self,
        path: str | PathLike[str] | None,
        description: Mapping[str, Any],
        *,
        anew: bool = False,
        interval: float = 5.0,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.description: dict[str, Any] = _plain(description)
        self.data: dict[str, Any] = {}
        self.resumed = False  # some work was there
        self._arrays: dict[str, Array] = {}
        self._interval, self._written = interval, time.monotonic()
        if self.path is not None and self.path.exists() and not anew:
            self._read(self.path)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __setitem__(self, name: str, array: Array) -> None:
        self._arrays[name] = np.array(array)  # a copy: work that was kept does not change

    def __delitem__(self, name: str) -> None:
        del self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def once(self, name: str, make: Callable[[], Any]) -> Array:
        """The array `name`; made, kept and (see `save`) written when it is not there."""
        if name not in self._arrays:
            self[name] = make()
            self.save()
        return self._arrays[name]

    def save(self, *, now: bool = False) -> None:
        """Write the file when the last writing was long enough ago, or `now`. Raises OutputError, ArgumentError."""
        if self.path is None or not (now or time.monotonic() - self._written >= self._interval):
            return
        told = {"description": self.description, "data": _plain(self.data)}
        CalibrationTable(KIND, str(self.description.get("fingerprint", "")), self._arrays, told).save(self.path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Take the file away; what is in memory stays."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._arrays or self.data:
            self.save(now=True)

    def _read(self, path: Path) -> None:
        """Take over the work in a file. Raises ArgumentError, ModelError."""
        try:
            table = CalibrationTable.load(path)
            table.check(KIND, table.fingerprint)
            description, data = table.metadata["description"], table.metadata["data"]
        except (ModelError, KeyError) as error:
            raise ModelError(
                f"{path}: holds no work of a calibration that could go on ({error}); remove it, or name another file"
            ) from None
        if description != self.description:
            raise ArgumentError(
                f"{path}: holds work of another calibration ({difference(description, self.description)}); remove it, "
                "or name another file"
            )
        self._arrays, self.data, self.resumed = dict(table.arrays), dict(data), True


def difference(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first field in which two descriptions differ: "guidance 1.0, now 4.0"."""
    for name in sorted(had.keys() | wanted.keys()):
        if had.get(name) != wanted.get(name) or (name in had) != (name in wanted):
            return f"{name} {_short(had.get(name))}, now {_short(wanted.get(name))}"
    return "nothing differs"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data as it reads back. Raises ArgumentError."""
    try:
        read: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"calibrate: {error}; work under way is described by JSON data") from None
    return read
