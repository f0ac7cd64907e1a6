"""`int8_norm_modulate`: norm, scale and shift of a DiT block into 8-bit integers, against the passes that torch makes.

Floor: hidden read once, integers and scales written once, at copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls, quantize_tokens
from vivace.bench.kernels.rows import hidden_and_vectors
from vivace.kernels.int8_norm_modulate import SPEC

DTYPES = (torch.float32, torch.bfloat16)
QUICK, SHAPES = quantize_tokens.QUICK, quantize_tokens.SHAPES
EPS = 1e-6
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(hidden: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """As quantized blocks write it: three passes of the norm, then those of the integers."""
    return quantize_tokens.eager(layer_norm(hidden, hidden.shape[-1:], eps=EPS) * (1 + scale) + shift)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, shape in (QUICK if quick else SHAPES).items():
        for dtype in DTYPES:
            inputs = hidden_and_vectors(shape, dtype, 1, 2)
            found += calls.rows(calls.Problem(SPEC, case, inputs, eager), quick)
    return found
