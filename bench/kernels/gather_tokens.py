"""`gather_tokens`: rows of half the tokens side by side, alone and with the first norm of a block, against torch.

Floor: the rows that are named read once and written once, or twice with their norm, at copy bandwidth. Torch reads and
writes them once more for the norm, and twice for the modulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.bench.kernels.rows import DTYPES, QUICK, SEED, SHAPES, hidden_and_vectors
from vivace.kernels.gather_tokens import SPEC

SHARE = 0.5  # of the tokens
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def drawn_ids(pictures: int, tokens: int, share: float = SHARE) -> Tensor:
    """Ascending ids of a share of the tokens, other ones for each picture."""
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.randperm(tokens, generator=generator)[: int(share * tokens)].sort().values for _ in range(pictures)]
    return torch.stack(rows).int()


def alone(x: Tensor, ids: Tensor) -> Tensor:
    """As token pruning writes it."""
    return x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[2]))


def normed(x: Tensor, ids: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """And as the block behind it goes on."""
    y = alone(x, ids)
    return y, layer_norm(y, y.shape[-1:], eps=1e-6) * (1.0 + scale) + shift


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, shape in (QUICK if quick else SHAPES).items():
        for dtype in DTYPES:
            x, scale, shift = hidden_and_vectors(shape, getattr(torch, dtype), 1, 2)
            ids = drawn_ids(*shape[:2])
            found += calls.rows(calls.Problem(SPEC, f"{case}, rows", (x, ids), alone), quick)
            inputs, names = (x, ids, scale, shift), ("scale", "shift")
            found += calls.rows(calls.Problem(SPEC, f"{case}, normalised", inputs, normed, {}, names), quick)
    return found
