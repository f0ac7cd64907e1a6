"""`philox_normal` against `torch.randn`: compute-bound, so ns a normal says more than bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vivace.bench import device
from vivace.bench.harness import Candidate, Claim, interleave
from vivace.errors import BackendError
from vivace.kernels.philox_normal import NORMAL_TOLERANCE, SPEC, philox_normal
from vivace.kernels.spec import missing

SEED = 7
SHAPES = {"DiT-XL/2": (4, 32, 32), "SDXL": (4, 128, 128), "SD3": (16, 128, 128)}
BATCH = 8
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of our noise and of torch's on the shapes of known models; on the GPU where there is one."""
    shapes = list(SHAPES.items())[: 1 if quick else None]
    if device.present():
        return [row for name, shape in shapes for row in device_rows(name, shape, quick)]
    if (reason := missing("cpu")) is not None:
        raise BackendError(f"bench philox_normal: {reason}")
    found = []
    for name, shape in shapes:
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


def device_rows(name: str, shape: tuple[int, ...], quick: bool) -> list[dict[str, Any]]:
    """The same on the GPU."""
    backend = device.backend(SPEC)
    check(shape, backend)
    seeds, pictures = torch.full((BATCH,), SEED, device=device.PLACE), torch.arange(BATCH, device=device.PLACE)
    out = torch.zeros(BATCH, *shape, device=device.PLACE)
    work = device.Work(
        "philox_normal", f"{name} x{BATCH}", backend,
        lambda: philox_normal(shape, seeds, pictures, device=device.PLACE, backend=backend),
        lambda: torch.randn(BATCH, *shape, out=out), (), (BATCH, *shape), "float32", 4 * BATCH * math.prod(shape),
    )  # fmt: skip
    return device.rows(work, quick)


def ours(shape: tuple[int, ...]) -> Candidate:
    """A batch of noise of this shape from the kernel."""
    pictures = list(range(BATCH))
    return Candidate(lambda: philox_normal(shape, [SEED] * BATCH, pictures, backend="cpu"))


def theirs(shape: tuple[int, ...]) -> Candidate:
    """The same size from torch, into memory that is there."""
    out = torch.zeros(BATCH, *shape)
    return Candidate(lambda: torch.randn(BATCH, *shape, out=out))


def check(shape: tuple[int, ...], backend: str = "cpu") -> None:
    """The kernel gives the definition's bits, up to its stated tolerance on a GPU; raises BackendError otherwise."""
    arguments = (shape, [SEED, -1], [0, 3], 2)
    exact = philox_normal(*arguments, backend="reference")
    if backend == "cpu":
        same = torch.equal(philox_normal(*arguments, backend="cpu"), exact)
    else:
        there = philox_normal(*arguments, device=device.PLACE, backend=backend)
        same = torch.allclose(there.cpu(), exact, rtol=0.0, atol=NORMAL_TOLERANCE)
    if not same:
        raise BackendError(f"bench philox_normal: {backend} differs from the reference; nothing was timed")
