"""Tables of calibrated solvers and passes, as recipes name them: which file, which bytes, which model.

A recipe is JSON and holds no arrays. It holds a reference: path and SHA-256 of the table, fingerprint and latent shape
of the model that was measured. A plan carries all that it needs to run; the table is read again only to make the plan
anew (`Plan.tail`, `Plan.again`), and must then be the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.plan import Args
from vivace.errors import ArgumentError, ModelError, PlanError

KIND = "solver"

_seen: WeakValueDictionary[str, CalibrationTable] = WeakValueDictionary()  # tables that came without a file, by hash


def reference(what: str, source: Any, method: str | None = None) -> dict[str, Any]:
    """A table (object or file) as JSON: path (None without a file), sha256, fingerprint, latent_shape.

    what: who asks, for messages; method: what the table must have been measured for (`metadata["method"]`).
    Raises: ArgumentError, ModelError.
    """
    if isinstance(source, (Mapping, Args)):
        return dict(source.to_dict() if isinstance(source, Args) else source)
    if isinstance(source, (str, os.PathLike)):
        table, path = CalibrationTable.load(source), str(Path(source).resolve())
    elif isinstance(source, CalibrationTable):
        table, path = source, None
    else:
        raise ArgumentError(f"{what}: table is {type(source).__name__}; a file or a calibration table is needed")
    check_method(what, table, method)
    _seen[table.hash] = table
    shape = list(table.metadata.get("latent_shape", ()))
    return {"path": path, "sha256": table.hash, "fingerprint": table.fingerprint, "latent_shape": shape}


def resolve(what: str, known: Mapping[str, Any], method: str | None = None) -> CalibrationTable:
    """The table of a reference. Raises PlanError when it is gone or is another one by now, ModelError."""
    table = _seen.get(str(known.get("sha256")))
    if table is None:
        path = known.get("path")
        if path is None:
            raise PlanError(
                f"{what}: the plan was made with a table that was never in a file; save the table and make the plan "
                "with its path"
            )
        table = CalibrationTable.load(path)
        if table.hash != known.get("sha256"):
            raise PlanError(
                f"{what}: {path} is not the table that the plan was made with (it is {table.hash[:12]}, the plan's was "
                f"{str(known.get('sha256'))[:12]}); make the plan with this table"
            )
        _seen[table.hash] = table
    check_method(what, table, method)
    return table


def check_method(what: str, table: CalibrationTable, method: str | None) -> None:
    """Raise ModelError unless a table was measured for solvers, and for this method."""
    if table.kind != KIND:
        raise ModelError(f"{what}: the table is for {table.kind}, not for a solver; `vivace calibrate --solver`")
    made = table.metadata.get("method")
    if method is not None and made != method:
        raise ModelError(f"{what}: the table was measured for {made!r}, not for {method!r}; calibrate for {method}")
