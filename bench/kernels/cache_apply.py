"""`cache_apply`: a block's output reused or forecast from kept planes, against torch as caching hooks write it.

Each result is added to the hidden states. Floor: hidden and the planes that are read, the sum written once, at copy
bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.bench.kernels.cache_update import memory, plane
from vivace.bench.kernels.rows import QUICK, SHAPES, hidden_and_vectors
from vivace.kernels.cache_apply import SPEC

# Dtype of the rows, of the store, planes read; one plane has the weight 1.
KINDS = (
    ("float32", "float32", 1),
    ("float32", "float32", 2),
    ("float32", "float32", 3),
    ("float32", "bfloat16", 2),
    ("float32", "float8_e4m3fn", 2),
    ("float32", "int8", 2),
    ("bfloat16", "bfloat16", 1),
    ("bfloat16", "bfloat16", 2),
)
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(kept: Tensor, lanes: Tensor, weights: Tensor, hidden: Tensor, gate: Tensor, *more: Tensor) -> Tensor:
    """A product and a sum a plane, then the residual of the block in its two passes; nothing is multiplied with 1."""
    value = plane(kept, 0, *more)
    for j in range(1, weights.shape[1]):
        value = value + weights[:, j, None, None].to(value.dtype) * plane(kept, j, *more)
    return hidden + gate * value


def problem(case: str, shape: tuple[int, int, int], dtype: str, store: str, terms: int) -> calls.Problem:
    """One call with hidden states and gate."""
    hidden, gate = hidden_and_vectors(shape, getattr(torch, dtype), 1, 1)
    kept, lanes, scales = memory(shape, store, terms)
    weights = torch.tensor([1.0, 2.0, 3.0])[:terms].expand(shape[0], terms).contiguous()
    names = ("hidden", "gate", "scales") if scales else ("hidden", "gate")
    title = f"{case}, {dtype} kept as {store}, {terms} planes"
    return calls.Problem(SPEC, title, (kept, lanes, weights, hidden, gate, *scales), eager, {}, names)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, shape in (QUICK if quick else SHAPES).items():
        for kind in KINDS:
            found += calls.rows(problem(case, shape, *kind), quick)
    return found
