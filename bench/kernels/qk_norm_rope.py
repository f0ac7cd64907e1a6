"""`qk_norm_rope`: queries and keys of Flux, Wan and small heads against what `diffusers` runs, and torch.compile of it.

Floor: queries and keys read and written once, at copy bandwidth; the peer moves each some seven times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.kernels.qk_norm_rope import SPEC
from vivace.kernels.qk_norm_rope.cases import tables

EPS = 1e-6
# name -> (shape of queries and of keys, whether the norm covers all heads)
QUICK = {
    "24 heads of 64": ((1, 256, 24, 64), False),
    "24 heads of 128": ((1, 256, 24, 128), False),
    "12 heads of 128, across": ((1, 256, 12, 128), True),
}
CASES = QUICK | {"FLUX.1 x1": ((1, 4608, 24, 128), False), "Wan 1.3B x1": ((1, 4096, 12, 128), True)}
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("query_weight", "key_weight", "cos", "sin")
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(
    query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor, cos: Tensor, sin: Tensor, *, across: bool
) -> tuple[Tensor, Tensor]:
    """As attention processors write it: the norm of torch, then rotation in float32."""
    results = []
    for x, weight in ((query, query_weight), (key, key_weight)):
        flat = x.flatten(2) if across else x
        y = rms_norm(flat, flat.shape[-1:], weight, EPS).view(x.shape)
        real, imaginary = y.reshape(*y.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack((-imaginary, real), dim=-1).flatten(3)
        results.append((y.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype))
    return results[0], results[1]


def inputs(shape: tuple[int, int, int, int], across: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, their weights, cos and sin."""
    generator = torch.Generator().manual_seed(calls.SEED)
    _, tokens, heads, width = shape
    query, key = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    size = heads * width if across else width
    weights = (1.0 + 0.1 * torch.randn(2, size, generator=generator)).to(dtype)
    return (query, key, *weights.unbind(), *tables(tokens, width))


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, (shape, across) in (QUICK if quick else CASES).items():
        for dtype in DTYPES:
            peer, made = partial(eager, across=across), inputs(shape, across, dtype)
            found += calls.rows(calls.Problem(SPEC, case, made, peer, {"eps": EPS}, NAMES), quick)
    return found
