"""`quantize_tokens`: hidden states to 8-bit integers against the passes that torch makes, and torch.compile.

Floor: x read once, integers and scales written once, at copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.bench.kernels import rows as over_rows
from vivace.kernels.quantize_tokens import SPEC

DTYPES = (torch.float32, torch.bfloat16)
# Inputs of the linears of DiT-S, -B and -XL: width of the hidden states, and of what is inside of feed-forward layers.
QUICK = over_rows.QUICK | {
    "DiT-B/2 x2": (2, 256, 768),
    "DiT-B/2 x2, down": (2, 256, 3072),
    "DiT-XL/2 x2, down": (2, 256, 4608),
}
SHAPES = QUICK | over_rows.SHAPES
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """As quantized modules write it."""
    scale = x.abs().amax(dim=-1).float() / 127.0
    q = torch.round(x.float() / scale.clamp_min(1e-20)[..., None]).clamp(-127.0, 127.0).to(torch.int8)
    return q, scale


def smoothed(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """With a product before it."""
    return eager(x * smooth)


def given(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """With a scale of each sample known beforehand."""
    q = torch.round(x.float() / scale[:, None, None]).clamp(-127.0, 127.0).to(torch.int8)
    return q, scale[:, None].expand(x.shape[:-1])


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models, a pair of them smoothed and with scales given."""
    found = []
    for case, shape in (QUICK if quick else SHAPES).items():
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(calls.SEED))
        for dtype in DTYPES:
            found += calls.rows(calls.Problem(SPEC, case, (hidden.to(dtype),), eager), quick)
            if case not in list(QUICK)[-2:]:
                continue
            smooth, scale = torch.linspace(0.5, 2.0, shape[-1]), torch.full(shape[:1], 0.03)
            for name, more, peer in (("smooth", smooth, smoothed), ("scale", scale, given)):
                inputs = (hidden.to(dtype), more)
                problem = calls.Problem(SPEC, f"{case}, {name}", inputs, peer, names=(name,))
                found += calls.rows(problem, quick)
    return found
