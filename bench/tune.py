"""Times the tiles of the Triton linears for the linears of known models and keeps the choices, on a GPU.

    python -m vivace.bench.tune [OUT.json]

Prints one line a shape: the tile chosen, its time, that of the table's tile. Choices change no bit of a result.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vivace.errors import VivaceError
from vivace.kernels.linear.tune import tune

SECONDS = 45.0  # after which no further shape begins
WIDTHS = {"DiT-XL/2": 1152, "DiT-B/2": 768, "DiT-S/2": 384}
ROWS = (512, 64, 2048)  # a guided pair of 256 tokens; modulation of all rows; four pairs
DTYPES = ("bfloat16", "int8")


def shapes() -> list[tuple[str, int, int, int, str]]:
    """(name, rows, N, K, dtype) of query, key and value, of the projection, of both feed-forward linears."""
    found = []
    for rows in ROWS:
        for model, width in WIDTHS.items():
            for part, columns, depth in (("qkv", 3, 1), ("projection", 1, 1), ("up", 4, 1), ("down", 1, 4)):
                for dtype in DTYPES:
                    found.append((f"{model} {part}", rows, columns * width, depth * width, dtype))
    return found


def main(out: Path | None) -> int:
    """Tune what fits the time. Returns 1 where no GPU can."""
    told: list[dict[str, Any]] = []
    begin, left = time.monotonic(), 0
    for name, rows, columns, depth, dtype in shapes():
        if time.monotonic() - begin > SECONDS:
            left += 1
            continue
        try:
            tuned = tune(rows, columns, depth, dtype)
        except VivaceError as error:
            print(error, file=sys.stderr)
            return 1
        at_first = tuned.ms[tuned.table]
        row = {"name": name, "best_ms": tuned.ms[tuned.tile], "table_ms": at_first, **tuned.to_dict()}
        told.append(row | {"tflop_per_s": 2e-9 * tuned.shape[0] * columns * depth / row["best_ms"]})
        print(f"{name:22} {dtype:9} {rows:5} rows  {row['tile']}  {row['best_ms']:.4f} ms, table {at_first:.4f} ms")
        if out is not None:
            out.write_text(json.dumps({"suite": "tune", "rows": told}, indent=1) + "\n")
    print(f"{len(told)} shapes tuned, {left} left out for want of time")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
