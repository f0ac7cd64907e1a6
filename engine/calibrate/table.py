"""Calibration tables: what was measured of one model, as named arrays and a description, in one file.

The file is safetensors. Its metadata holds the description as canonical JSON and one SHA-256 of description and arrays,
so that a file that was cut short, edited or mixed up is refused. No code, no pickle.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vivace.engine.plan_codec import parse
from vivace.engine.plan_io import write_files
from vivace.errors import ArgumentError, ModelError, PlanFileError

FORMAT, VERSION = "vivace-calibration-table", 1
DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
MAX_NAME = 512  # characters of an array's name
FIELDS = ("format", "version", "description", "sha256")

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class CalibrationTable:
    """Measurements of one model.

    kind: what for, "quantization"; fingerprint: of the model (`ModelSpec.fingerprint`); arrays: by name, numpy;
    metadata: JSON data: plan and its hash, schedule, prompts, seeds, versions, whatever its kind needs.
    Raises: ArgumentError for what a file cannot hold.
    """

    kind: str
    fingerprint: str
    arrays: Mapping[str, Array]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if not isinstance(array, np.ndarray) or array.dtype.name not in DTYPES:
                kind = getattr(array, "dtype", type(array).__name__)
                raise ArgumentError(f"calibration table: array {name!r:.60} is {kind}; need one of {', '.join(DTYPES)}")
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
                raise ArgumentError(
                    f"calibration table: {name!r:.60} is no name of an array; use 1 to {MAX_NAME} letters"
                )
        if parse_back(self._description) != json_of(self):
            raise ArgumentError(
                "calibration table: metadata would read back changed; use text keys and plain JSON data"
            )

    @cached_property
    def _description(self) -> bytes:
        """Canonical JSON: sorted keys, no blanks, shortest floats."""
        try:
            return json.dumps(json_of(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"calibration table: metadata is no JSON data ({error})") from None

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of description and arrays: names, dtypes, shapes, bytes."""
        return _digest(self._description, self.arrays)

    def check(self, kind: str, fingerprint: str) -> None:
        """Raise ModelError unless the table is of that kind and was made for the model of that fingerprint."""
        if kind != self.kind:
            raise ModelError(
                f"calibration table: it is for {self.kind}, not for {kind}; calibrate the model for {kind}"
            )
        if fingerprint != self.fingerprint:
            raise ModelError(
                f"calibration table: made for model {self.fingerprint[:12]}, this one is {fingerprint[:12]} (other "
                "weights, or a LoRA was added or fused since); calibrate this model"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write one file whole, or change nothing. Raises OutputError."""
        entries = {"format": FORMAT, "version": str(VERSION)}
        entries |= {"description": self._description.decode(), "sha256": self.hash}
        arrays = {name: _plain(array) for name, array in self.arrays.items()}
        write_files({Path(path): save(arrays, metadata=entries)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CalibrationTable:
        """Read and check such a file. Raises ModelError: which file, what is wrong, what to do."""
        path = Path(path)
        try:
            _require_file(path)
            with safe_open(path, framework="np") as file:
                entries = file.metadata() or {}
                description = _checked(entries)
                arrays = {name: file.get_tensor(name) for name in file.keys()}
            table = cls(description["kind"], description["fingerprint"], arrays, description["metadata"])
        except (SafetensorError, OSError, TypeError) as error:
            raise ModelError(f"{_shown(path)}: damaged, or no safetensors file ({error}); calibrate again") from None
        except (ModelError, ArgumentError, PlanFileError) as error:
            raise ModelError(f"{_shown(path)}: {error}; calibrate again") from None
        if table.hash != entries["sha256"]:
            raise ModelError(
                f"{_shown(path)}: its SHA-256 is not the one it states; edited or damaged: calibrate again"
            )
        return table


def json_of(table: CalibrationTable) -> dict[str, Any]:
    """What a file says of a table, as JSON data."""
    return {"kind": table.kind, "fingerprint": table.fingerprint, "metadata": dict(table.metadata)}


def parse_back(text: bytes) -> Any:
    """The JSON data of a description. Raises ArgumentError."""
    try:
        return parse(text)
    except PlanFileError as error:
        raise ArgumentError(f"calibration table: metadata cannot be written ({error})") from None


def _digest(description: bytes, arrays: Mapping[str, Array]) -> str:
    digest = sha256(description)
    for name in sorted(arrays):
        array = _plain(arrays[name])
        digest.update(f"\0{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain(array: Array) -> Array:
    """The array in this machine's byte order, elements in order."""
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def _checked(entries: Mapping[str, str]) -> dict[str, Any]:
    """The description in a file's metadata. Raises ModelError, PlanFileError."""
    if entries.get("format") != FORMAT:
        raise ModelError("no calibration table; `vivace calibrate` makes one")
    if entries.get("version") != str(VERSION):
        raise ModelError(f"version {entries.get('version')!r:.20}, this release reads {VERSION}")
    for name in FIELDS:
        if name not in entries:
            raise ModelError(f"has no field {name!r}")
    data = parse(entries["description"].encode())
    fields = {"kind": str, "fingerprint": str, "metadata": dict}
    if not isinstance(data, dict) or data.keys() != fields.keys():
        raise ModelError(f"its description is no object with {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(data[name], kind):
            raise ModelError(f"{name} is {data[name]!r:.40}, need {kind.__name__}")
    return data


def _require_file(path: Path) -> None:
    """Refuse what is no regular file before anything waits for it. Raises ModelError."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode):
        raise ModelError("is no regular file")


def _shown(path: Path) -> str:
    """A path on one line, whatever its name."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
