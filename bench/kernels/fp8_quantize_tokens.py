"""`fp8_quantize_tokens`: hidden states to 8-bit floats against the passes that torch makes, and torch.compile.

Floor: x read once, 8-bit numbers and scales written once, at copy bandwidth. None on a processor: fp8 runs on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.bench import device
from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.bench.kernels.rows import QUICK, SHAPES
from vivace.kernels.fp8_quantize_tokens import SPEC

DTYPES = (torch.float32, torch.bfloat16)
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """As quantized modules write it."""
    scale = x.abs().amax(dim=-1).float() / 448.0
    q = (x.float() / scale.clamp_min(1e-20)[..., None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return q, scale


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found: list[dict[str, Any]] = []
    if not device.present():
        return found
    for case, shape in (QUICK if quick else SHAPES).items():
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(calls.SEED))
        for dtype in DTYPES:
            found += calls.rows(calls.Problem(SPEC, case, (hidden.to(dtype),), eager), quick)
    return found
