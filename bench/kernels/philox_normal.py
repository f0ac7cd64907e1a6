"""`philox_normal` against `torch.randn`: compute-bound, so ns a normal says more than bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vivace.bench.harness import Candidate, Claim, interleave
from vivace.errors import BackendError
from vivace.kernels.philox_normal import philox_normal
from vivace.kernels.spec import missing

SEED = 7
SHAPES = {"DiT-XL/2": (4, 32, 32), "SDXL": (4, 128, 128), "SD3": (16, 128, 128)}
BATCH = 8
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of our noise and of torch's on the shapes of known models."""
    if (reason := missing("cpu")) is not None:
        raise BackendError(f"bench philox_normal: {reason}")
    found = []
    for name, shape in list(SHAPES.items())[: 1 if quick else None]:
        check(shape)
        candidates = {"cpu": ours(shape), "eager": theirs(shape)}
        times = interleave(candidates, seconds=0.5 if quick else 2.0)
        count = BATCH * math.prod(shape)
        for backend, timing in times.items():
            found.append({
                "op": "philox_normal", "backend": backend, "case": f"{name} x{BATCH}", "shape": [BATCH, *shape],
                "dtype": "float32", "ms": timing.to_dict(), "ns_per_normal": timing.median * 1e6 / count,
                "gb_per_s": 4 * count / timing.median / 1e6, "percent_of_roofline": None,
                "over_eager": times["eager"].median / timing.median, "over_compile": None,
                "over_compile_reason": "torch.compile calls the same torch.randn",
                "threads": torch.get_num_threads(), "seed": SEED,
            })  # fmt: skip
    return found


def ours(shape: tuple[int, ...]) -> Candidate:
    """A batch of noise of this shape from the kernel."""
    pictures = list(range(BATCH))
    return Candidate(lambda: philox_normal(shape, [SEED] * BATCH, pictures, backend="cpu"))


def theirs(shape: tuple[int, ...]) -> Candidate:
    """The same size from torch, into memory that is there."""
    out = torch.zeros(BATCH, *shape)
    return Candidate(lambda: torch.randn(BATCH, *shape, out=out))


def check(shape: tuple[int, ...]) -> None:
    """The kernel gives the definition's bits; raises BackendError otherwise."""
    arguments = (shape, [SEED, -1], [0, 3], 2)
    if not torch.equal(philox_normal(*arguments, backend="cpu"), philox_normal(*arguments, backend="reference")):
        raise BackendError("bench philox_normal: cpu differs from the reference; nothing was timed")
