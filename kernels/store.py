"""What was found out once on a machine, kept on disk: tuned tiles, compile records. One JSON file a key.

The file of a key is $XDG_CACHE_HOME/vivace/store/<sha256 of the key as canonical JSON>.json (~/.cache without that
variable) and holds the key beside the value. It is written to a temporary file and renamed, so that any number of
processes may read and write one key: each reads one whole value, the last writer stays. A file that cannot be read, is
damaged or is of another key counts as absent, with the reason; nothing here raises for the state of a disk.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vivace.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Found:
    """The value of a key, None where there is none, and why."""

    value: Any
    reason: str


def get(key: Any, *, folder: Path | None = None) -> Found:
    """What is kept under `key`, any JSON value.

    Args: folder: of the store; None: the user's cache.
    Raises: ArgumentError when the key is no JSON.
    """
    place = path_of(key, folder)
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Found(None, "nothing is kept")
    except OSError as error:
        return Found(None, f"{place}: cannot be read ({error.strerror or error})")
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        return Found(None, f"{place}: is damaged")
    if not isinstance(record, dict) or set(record) != {"key", "value"} or _canonical(record["key"]) != _canonical(key):
        return Found(None, f"{place}: belongs to another key or is damaged")
    return Found(record["value"], f"kept in {place}")


def put(key: Any, value: Any, *, folder: Path | None = None) -> str | None:
    """Keep `value` under `key`, whole or not at all. Returns why it could not be written, None when it was.

    Raises: ArgumentError when key or value is no JSON.
    """
    place = path_of(key, folder)
    data = _canonical({"key": key, "value": value})
    name = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, prefix=".", encoding="utf-8", delete=False) as file:
            name = file.name
            file.write(data)
        os.replace(name, place)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        return f"{place}: cannot be written ({error.strerror or error})"
    return None


def path_of(key: Any, folder: Path | None = None) -> Path:
    """The file of a key. Raises ArgumentError when the key is no JSON."""
    return (folder or default_folder()) / f"{sha256(_canonical(key).encode()).hexdigest()}.json"


def default_folder() -> Path:
    """$XDG_CACHE_HOME/vivace/store; without that variable, or when it is relative, under ~/.cache.

    Who has no home takes the folder of temporary files.
    """
    places = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"), tempfile.gettempdir()
    return Path(next(place for place in places if os.path.isabs(place))) / "vivace" / "store"


def _canonical(value: Any) -> str:
    """One text for equal values: keys sorted, no spaces, ASCII, no NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"store: {value!r:.80} is no JSON ({error}); use text, numbers, lists, dicts") from None
