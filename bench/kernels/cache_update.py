"""`cache_update`: keeping a block's output, with differences for forecasts, against torch as caching hooks write it.

Each result is added to the hidden states too, as the block would do without a cache. Floor: fresh, hidden and planes
read, planes and sum written once, at copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls, quantize_tokens
from vivace.bench.kernels.rows import QUICK, SHAPES, hidden_and_vectors
from vivace.kernels.cache_update import SPEC

# Dtype of the rows, of the store, differences made.
KINDS = (
    ("float32", "float32", 0),
    ("float32", "float32", 1),
    ("float32", "float32", 2),
    ("float32", "bfloat16", 1),
    ("float32", "float8_e4m3fn", 1),
    ("float32", "int8", 1),
    ("bfloat16", "bfloat16", 0),
    ("bfloat16", "bfloat16", 1),
)
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(kept: Tensor, lanes: Tensor, fresh: Tensor, hidden: Tensor, gate: Tensor, *more: Tensor, made: int) -> Tensor:
    """A difference and a copy a plane, then the residual of the block in its two passes."""
    value = fresh
    for j in range(made + 1):
        old = plane(kept, j, *more)
        after = value - old if j < made else value
        if kept.dtype == torch.int8:
            q, scale = quantize_tokens.eager(value)
            kept[:, j].copy_(q)
            more[0][:, j].copy_(scale)
        else:
            kept[:, j].copy_(value)
        value = after
    return hidden + gate * fresh


def plane(kept: Tensor, j: int, scales: Tensor | None = None) -> Tensor:
    """Plane j of all lanes, as torch computes with it: 8-bit numbers do not promote."""
    if scales is not None:
        return kept[:, j] * scales[:, j, :, None]
    return kept[:, j].float() if kept.itemsize == 1 else kept[:, j]


def memory(shape: tuple[int, int, int], store: str, planes: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Kept planes, one lane a row, the lanes, and scales of int8."""
    generator = torch.Generator().manual_seed(calls.SEED)
    batch, tokens, width = shape
    values = torch.randn((batch, planes, tokens, width), generator=generator)
    lanes = torch.arange(batch)
    if store != "int8":
        return values.to(getattr(torch, store)), lanes, ()
    return (values * 30.0).clamp(-127.0, 127.0).to(torch.int8), lanes, (torch.full((batch, planes, tokens), 1 / 30.0),)


def problem(case: str, shape: tuple[int, int, int], dtype: str, store: str, made: int) -> calls.Problem:
    """One call with hidden states and gate."""
    fresh, hidden, gate = hidden_and_vectors(shape, getattr(torch, dtype), 2, 1)
    kept, lanes, scales = memory(shape, store, made + 1)
    names = ("hidden", "gate", "scales") if scales else ("hidden", "gate")
    inputs = (kept, lanes, fresh, hidden, gate, *scales)
    title = f"{case}, {dtype} kept as {store}, {made} differences"
    return calls.Problem(SPEC, title, inputs, partial(eager, made=made), {"made": made}, names)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, shape in (QUICK if quick else SHAPES).items():
        for kind in KINDS:
            found += calls.rows(problem(case, shape, *kind), quick)
    return found
