"""`select_tokens`: half the tokens of guided predictions by their deviation and age, against torch's sorts.

Floor: both predictions read once, ages read and written, ids written, at copy bandwidth. The orders are not counted:
they cost far more, which the share of the floor tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.bench.kernels.rows import DTYPES, SEED
from vivace.kernels.select_tokens import SPEC

# name -> (pictures, channels, *spatial); tokens are 2 x 2 pixels of a frame
QUICK = {"DiT-XL/2, 256": (1, 4, 32, 32), "DiT-XL/2, 512": (1, 4, 64, 64), "SD3": (1, 16, 128, 128)}
CASES = QUICK | {"DiT-XL/2, 256 x8": (8, 4, 32, 32), "Wan 2.1": (1, 16, 21, 60, 104)}
STARVATION, AGES = 0.1, 8
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


@dataclass(frozen=True, eq=False)
class Selection(calls.Problem):
    """Inputs: two planes, their weights, ages, factors."""

    def arguments(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first, second, weights, ages, factors = inputs
        args = ([first, second], weights, ages.clone(), ages.shape[1] // 2)  # ages are written
        return args, {"factors": factors, "patch": patch_of(first)}


def patch_of(plane: Tensor) -> tuple[int, ...]:
    """2 x 2 pixels of a frame."""
    return (*(1,) * (plane.dim() - 4), 2, 2)


def eager(first: Tensor, second: Tensor, weights: Tensor, ages: Tensor, factors: Tensor) -> Tensor:
    """As published code writes it: torch.std, a mean over patches, a sort for ranks, one for what is kept."""
    w = weights.view(len(weights), 2, *(1,) * (first.dim() - 1))
    deviation = (w[:, 0] * first + w[:, 1] * second).float().std(1)
    edge = patch_of(first)
    for axis, size in enumerate(edge):
        deviation = deviation.unflatten(axis + 1, (-1, size)).mean(axis + 2)
    rank = deviation.flatten(1).argsort(1).argsort(1)
    distance = (2 * rank - (ages.shape[1] // 2 - 1)).abs() * factors[ages.long()]
    ids = distance.argsort(dim=1, stable=True)[:, : ages.shape[1] // 2].sort(1).values.int()
    ages.clone().add_(1).scatter_(1, ids.long(), 0)
    return ids


def problem(case: str, shape: tuple[int, ...], dtype: str) -> Selection:
    """One call on normals, ages below AGES."""
    generator = torch.Generator().manual_seed(SEED)
    planes = [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(2)]
    tokens = math.prod(shape[2:]) // 4
    ages = torch.randint(0, AGES, (shape[0], tokens), generator=generator, dtype=torch.int32)
    factors = torch.tensor([math.exp(-STARVATION * age) for age in range(AGES)])
    weights = torch.tensor([[4.0, -3.0]]).repeat(shape[0], 1)
    return Selection(SPEC, case, (*planes, weights, ages, factors), eager)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the latents of known models."""
    found = []
    for case, shape in (QUICK if quick else CASES).items():
        for dtype in DTYPES:
            found += calls.rows(problem(case, shape, dtype), quick)
    return found
