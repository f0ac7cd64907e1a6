"""`gelu`: the activation of DiT, Flux and SDXL feed-forward layers, plain and gated, against torch and torch.compile.

Floor: hidden read and the result written once, at copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.kernels.gelu import SPEC

# name -> (shape of hidden, gated, approximation)
QUICK: dict[str, tuple[tuple[int, ...], bool, str]] = {
    "DiT-S/2 x2, tanh": ((2, 256, 1536), False, "tanh"),
    "DiT-S/2 x2, erf": ((2, 256, 1536), False, "none"),
    "DiT-XL/2 x2, tanh": ((2, 256, 4608), False, "tanh"),
    "DiT-XL/2 x2, erf": ((2, 256, 4608), False, "none"),
    "gated, 1280 x2": ((2, 256, 2560), True, "none"),
}
CASES = QUICK | {
    "FLUX.1 x1, tanh": ((1, 4608, 12288), False, "tanh"),
    "SDXL x2, gated": ((2, 4096, 5120), True, "none"),
}
DTYPES = (torch.float32, torch.bfloat16)
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(hidden: Tensor, *, gated: bool, approximate: str) -> Tensor:
    """As blocks write it."""
    if not gated:
        return functional.gelu(hidden, approximate=approximate)
    value, gate = hidden.chunk(2, dim=-1)
    return value * functional.gelu(gate, approximate=approximate)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, (shape, gated, approximate) in (QUICK if quick else CASES).items():
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(calls.SEED))
        options = {"gated": gated, "approximate": approximate}
        for dtype in DTYPES:
            problem = calls.Problem(SPEC, case, (hidden.to(dtype),), partial(eager, **options), options)
            found += calls.rows(problem, quick)
    return found
