"""Arguments of `scatter_tokens`."""

from __future__ import annotations

from typing import Any

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels.cache_update.check import check_lanes
from vivace.kernels.gather_tokens.check import check_device, check_ids, check_out, check_tokens
from vivace.kernels.norm_modulate.check import check_vector, dtype_name


def check(full: Any, ids: Any, fresh: Any, second: Any, lanes: Any, hidden: Any, gate: Any) -> str:
    """The rarer of the dtypes of full and fresh. Raises ShapeError, DtypeError, ArgumentError."""
    op = "scatter_tokens"
    dtypes = {check_tokens(op, "full", full), check_tokens(op, "fresh", fresh)}
    rows = check_ids(op, ids, full, full.shape[1], fresh.shape[0])
    check_device(op, "fresh", fresh, full)
    if "float64" in dtypes and len(dtypes) > 1:
        raise DtypeError(
            f"{op}: full is {dtype_name(full.dtype)}, fresh {dtype_name(fresh.dtype)}; float64 stays alone"
        )
    wide, parts = full.shape[2], fresh.shape[2]
    if second is not None:
        if hidden is not None:
            raise ArgumentError(f"{op}: hidden and second are both given; a sum has one part")
        check_out(op, "second", second, (rows, ids.shape[1], wide - parts), fresh)
        parts = wide
    if tuple(fresh.shape[:2]) != (rows, ids.shape[1]) or parts != wide:
        raise ShapeError(f"{op}: fresh has shape {tuple(fresh.shape)}, needs {(rows, ids.shape[1], wide)} beside ids")
    if hidden is not None:
        check_out(op, "hidden", hidden, (rows, ids.shape[1], wide), fresh)
    if gate is not None:
        if hidden is None:
            raise ArgumentError(f"{op}: gate is for a sum with hidden, which is not given")
        check_vector(op, "gate", gate, fresh)
    if lanes is not None:
        check_lanes(op, lanes, full, distinct=True)
    if full.shape[0] != rows if lanes is None else lanes.shape[0] != rows:
        raise ShapeError(f"{op}: {rows} rows for {full.shape[0]} parts of full; needs as many, or lanes of each")
    return next(name for name in ("float64", "float16", "bfloat16", "float32") if name in dtypes)
