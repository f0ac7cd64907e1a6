"""Values as callers write them, and what commands print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vivace.errors import ArgumentError


def pairs_of(pairs: list[str] | None) -> dict[str, Any]:
    """name=value pairs; values are JSON where they parse as JSON, else text."""
    out: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ArgumentError(f"option {pair!r}: write name=value")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


def numbers_of(name: str, text: str | None) -> list[float] | None:
    """Numbers between commas; None stays None. name: of the option, for messages. Raises ArgumentError."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{name} {text!r}: write numbers separated by commas") from None


def interval_of(text: str) -> tuple[float, float]:
    """a:b as two numbers. Raises ArgumentError."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise ArgumentError(f"interval {text!r}: write a:b, two numbers from 0 (noise end) to 1") from None
    return low, high


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ArgumentError."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ArgumentError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ArgumentError(f"{path}: not a scheduler configuration (a JSON object)")
    return data


def emit(data: dict[str, Any], text: str, as_json: bool) -> None:
    """Print what a command found, for programs or for people."""
    print(json.dumps(data, allow_nan=False) if as_json else text)
