"""Calibration tables as planners read them: the right model, the right run, the right arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from vivace.engine.bind import check_origin
from vivace.engine.plan import Plan
from vivace.engine.planners.base import evaluated
from vivace.errors import ArgumentError, ModelError

Floats = NDArray[np.float64]


class Table(Protocol):
    """What planners need of an `engine.calibrate.table.CalibrationTable`."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


def is_table(source: Any) -> TypeGuard[Table]:
    """It is a calibration table, not plain numbers."""
    return all(hasattr(source, name) for name in ("kind", "fingerprint", "arrays", "metadata"))


def check_table(planner: str, table: Table, plan: Plan) -> None:
    """Raise ModelError or ArgumentError unless `table` was measured for caches, on this run and, if bound, model.

    An unbound plan is checked against the model when it is bound, since the recipe carries the fingerprint.
    """
    if table.kind != "cache":
        raise ModelError(f"{planner}: the table is for {table.kind}, not for cache; calibrate the model for caches")
    check_measured(planner, measured_of(table), plan)
    steps = evaluated(plan)
    count = table.metadata.get("evaluations")
    if count != len(steps):
        raise ArgumentError(
            f"{planner}: the table was measured over {count} evaluations, the plan has {len(steps)}; calibrate with "
            "this plan"
        )
    measured, ours = table.metadata.get("timesteps", ()), [step.timestep for step in steps]
    if len(measured) != len(ours) or not np.allclose(measured, ours, rtol=1e-5, atol=1e-9):
        raise ArgumentError(
            f"{planner}: the table was measured at other timesteps than the plan's (its first ones are "
            f"{[float(f'{t:.6g}') for t in measured[:3]]}); calibrate with this plan"
        )


def measured_of(table: Table) -> dict[str, Any]:
    """What a plan remembers of a table: fingerprint and latent shape."""
    return {"fingerprint": table.fingerprint, "latent_shape": list(table.metadata.get("latent_shape", ()))}


def check_measured(what: str, measured: Mapping[str, Any], plan: Plan) -> None:
    """Raise ModelError unless the model and shape that a plan is bound to are those of a measurement."""
    if plan.binding is not None:
        check_origin(what, measured, plan.binding)


def array(planner: str, table: Table, name: str) -> Floats:
    """An array of a table as float64. Raises ModelError when the table lacks it."""
    if name not in table.arrays:
        known = ", ".join(sorted(table.arrays)[:8])
        raise ModelError(f"{planner}: the table has no array {name!r} (it has {known}); calibrate again")
    return np.asarray(table.arrays[name], dtype=np.float64)


def numbers(planner: str, name: str, values: Any, rank: int) -> Floats:
    """Plain numbers as float64 of `rank` axes, None as NaN. Raises ArgumentError."""
    try:
        out = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        out = np.zeros(())
    if out.ndim != rank or np.isinf(out).any():
        raise ArgumentError(f"{planner}: {name}={values!r:.60}; finite numbers in {rank} axes are needed")
    return out


def listed(values: Floats) -> list[Any]:
    """An array as JSON data; NaN becomes None."""
    if values.ndim > 1:
        return [listed(row) for row in values]
    return [None if math.isnan(value) else float(value) for value in values]
