"""`scatter_tokens`: fresh keys and values of half the tokens written among those kept, against torch.

Floor: the fresh rows read once, and written once, at copy bandwidth. Rows are [K | V], twice as wide as hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.bench.kernels.gather_tokens import drawn_ids
from vivace.bench.kernels.rows import QUICK, SEED, SHAPES
from vivace.kernels.scatter_tokens import SPEC

# Dtype of fresh rows, of those kept.
KINDS = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(full: Tensor, ids: Tensor, fresh: Tensor, lanes: Tensor) -> Tensor:
    """As caching hooks write it."""
    full[lanes[:, None], ids.long()] = fresh.to(full.dtype)
    return full


def problem(case: str, shape: tuple[int, int, int], dtype: str, store: str) -> calls.Problem:
    """One call: fresh is the part of a fused projection behind the queries."""
    batch, tokens, width = shape
    generator, ids = torch.Generator().manual_seed(SEED), drawn_ids(batch, tokens)
    projected = torch.randn(batch, ids.shape[1], 3 * width, generator=generator).to(getattr(torch, dtype))
    full = torch.zeros(batch + 1, tokens, 2 * width, dtype=getattr(torch, store))
    inputs = (full, ids, projected[..., width:], torch.arange(batch, 0, -1))
    return calls.Problem(SPEC, f"{case}, {dtype} kept as {store}", inputs, eager, {}, ("lanes",))


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, shape in (QUICK if quick else SHAPES).items():
        for kind in KINDS:
            found += calls.rows(problem(case, shape, *kind), quick)
    return found
