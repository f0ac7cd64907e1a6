"""Times the tiles of the Triton linears and the blocks of `int8_attention` for known models and keeps the choices.

    python -m vivace.bench.tune [OUT.json]

On a GPU. Prints one line a shape: the choice, its time, that of the table's. Choices change no bit of a result.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vivace.errors import VivaceError
from vivace.kernels.int8_attention.tune import tune as tune_attention
from vivace.kernels.linear.tune import tune

SECONDS = 90.0  # after which no further shape begins
WIDTHS = {"DiT-XL/2": 1152, "DiT-B/2": 768, "DiT-S/2": 384}
LARGE = (8192, 4096)  # rows of a guided pair of 4,096 tokens, of one branch; of DiT-XL/2 alone
ROWS = (512, 64, 2048)  # a guided pair of 256 tokens; modulation of all rows; four pairs
PARTS = (("qkv", 3, 1), ("projection", 1, 1), ("up", 4, 1), ("down", 1, 4))  # (name, N, K) in widths
DTYPES = ("int8", "float8_e4m3fn", "bfloat16")
# name -> (heads of all samples, tokens, width)
ATTENTION = {
    "DiT-XL/2": (32, 4096, 72), "DiT-XL/2, 256": (32, 256, 72), "SD3": (48, 4096, 64), "FLUX.1": (24, 4608, 128),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Something to tune: its name, dtype and operations, and how."""

    name: str
    dtype: str
    flops: int
    run: Callable[[], Any]


def shapes() -> list[tuple[str, int, int, int, str]]:
    """(name, rows, N, K, dtype) of query, key and value, of the projection, of both feed-forward linears."""
    found = []
    cases = [(rows, "DiT-XL/2") for rows in LARGE] + [(rows, model) for rows in ROWS for model in WIDTHS]
    for rows, model in cases:
        for part, columns, depth in PARTS:
            for dtype in DTYPES:
                width = WIDTHS[model]
                found.append((f"{model} {part}", rows, columns * width, depth * width, dtype))
    return found


def jobs() -> Iterator[Job]:
    """Linears of the largest shapes, attention, the other linears."""
    linears = [
        Job(f"{name}, {rows} rows", dtype, 2 * rows * columns * depth, partial(tune, rows, columns, depth, dtype))
        for name, rows, columns, depth, dtype in shapes()
    ]
    large = len(LARGE) * len(PARTS) * len(DTYPES)
    yield from linears[:large]
    for name, (heads, tokens, width) in ATTENTION.items():
        run = partial(tune_attention, heads, tokens, tokens, width)
        yield Job(f"{name} attention", "int8", 4 * heads * tokens**2 * width, run)
    yield from linears[large:]


def main(out: Path | None) -> int:
    """Tune what fits the time. Returns 1 where no GPU can."""
    told: list[dict[str, Any]] = []
    begin, left = time.monotonic(), 0
    for job in jobs():
        if time.monotonic() - begin > SECONDS:
            left += 1
            continue
        try:
            tuned = job.run()
        except VivaceError as error:
            print(error, file=sys.stderr)
            return 1
        best, at_first = min(tuned.ms.values()), tuned.ms[tuned.table]
        row = {"name": job.name, "dtype": job.dtype, "best_ms": best, "table_ms": at_first, **tuned.to_dict()}
        told.append(row | {"tflop_per_s": 1e-9 * job.flops / best})
        print(f"{job.name:32} {job.dtype:14} {row['tile']}  {best:.4f} ms, table {at_first:.4f} ms", flush=True)
        if out is not None:
            out.write_text(json.dumps({"suite": "tune", "rows": told}, indent=1) + "\n")
    print(f"{len(told)} shapes tuned, {left} left out for want of time")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
