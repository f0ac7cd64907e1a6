"""What solvers with fitted numbers share: options that a table settles, and the grid that it was measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vivace.engine.timesteps import Grid, make_grid
from vivace.errors import ArgumentError

CLOSE = 1e-9  # relative, of timesteps that count as the same


class Table(Protocol):
    """A calibration table as solvers read it: named arrays, and what was measured as JSON data."""

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


def settled(solver: str, given: Mapping[str, Any], defaults: Mapping[str, Any], table: Table | None) -> dict[str, Any]:
    """Every option: as given, else as the table was measured with, else its default.

    given: None where the caller said nothing. Raises: ArgumentError where an option contradicts the table.
    """
    measured: Mapping[str, Any] = {} if table is None else table.metadata["options"]
    out = {}
    for name, default in defaults.items():
        value, was = given[name], measured.get(name, default)
        plain = list(value) if isinstance(value, tuple) else value
        if table is not None and value is not None and plain != (list(was) if isinstance(was, tuple) else was):
            raise ArgumentError(
                f"{solver}: {name}={value!r}, but the table was measured with {was!r}; leave the option out, or "
                "calibrate with it"
            )
        out[name] = was if value is None else value
    return out


def check_grid(solver: str, grid: Grid, table: Table) -> None:
    """Raise ArgumentError unless `grid` is the table's kind of grid, for its number of steps."""
    places: Mapping[str, Any] = table.metadata["grid"]
    wanted = make_grid(grid.known_schedule(), grid.first + grid.steps, **places)
    ends = grid.level(grid.steps), wanted.level(wanted.steps)
    if not same_times(grid.timesteps, wanted.timesteps[grid.first :]) or not same_times(*ends):
        told = ", ".join(f"{name}={value!r:.40}" for name, value in places.items())
        raise ArgumentError(
            f"{solver}: the table was measured on another grid; make the plan with {told or 'the default grid'}, or "
            "calibrate on this one"
        )


def same_times(one: Any, other: Any) -> bool:
    """Two lists of timesteps are the same but for rounding."""
    first, second = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=CLOSE, atol=CLOSE))


def per_row(solver: str, name: str, value: Any, rows: int) -> list[float]:
    """One finite number a row: the same for all, or a list of as many. Raises ArgumentError."""
    values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value] * rows
    if len(values) != rows:
        raise ArgumentError(f"{solver}: {len(values)} {name} for {rows} rows; give one per row, or one for all")
    for row, item in enumerate(values):
        is_number = isinstance(item, (int, float, np.floating)) and not isinstance(item, bool)
        if not is_number or not math.isfinite(item):
            raise ArgumentError(f"{solver}: {name}[{row}] is {item!r:.40}; a finite number is needed")
    return [float(item) for item in values]
