"""The definition of `select_tokens`: plain torch, in float32 or float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import working_dtype
from vivace.kernels.select_tokens import lowest
from vivace.kernels.select_tokens.check import grid_of


def select_tokens(
    planes: Sequence[Tensor],
    weights: Tensor | None,
    ages: Tensor,
    keep: int,
    *,
    patch: Sequence[int] = (),
    metric: str = "deviation",
    scores: Tensor | None = None,
    drop_high: float = 1.0,
    factors: Tensor | None = None,
    bound: int = -1,
    least: int | None = None,
) -> Tensor:
    """ids of the F oldest tokens and of the keep - F others smallest by (distance of rank * factors[age], p)."""
    if scores is None:
        assert weights is not None  # planes come with weights
        scores = scores_of(planes, weights, patch, metric)
    tokens = ages.shape[1]
    middle = 2 * lowest(tokens, keep, drop_high) + keep - 1
    effective = (2 * ranks(scores) - middle).abs().to(scores.dtype)
    if factors is not None:
        effective = effective * factors.to(scores.dtype)[ages.long().clamp(0, len(factors) - 1)]
    place = ranks(effective)  # 0 is computed first
    forced = ranks(place - ages.long() * tokens) < must(ages, keep, bound, keep if least is None else least)
    chosen = ranks(torch.where(forced, -1, place)) < keep
    ages.copy_(torch.where(chosen, 0, ages + 1))
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :keep].int()


def ranks(keys: Tensor) -> Tensor:
    """Rank of every column [B, N] in its row, by (key, column), NaN last."""
    canonical = keys if not keys.is_floating_point() else torch.where(keys.isnan(), torch.nan, keys + 0.0)
    order = canonical.argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(keys.shape[1], device=keys.device).expand_as(order))


def must(ages: Tensor, keep: int, bound: int, least: int) -> Tensor:
    """F of every picture [B, 1]."""
    due = [(ages > bound - d).sum(1, keepdim=True) - least * (d - 1) for d in range(1, bound + 2)]
    return torch.stack([ages.new_zeros(len(ages), 1, dtype=torch.long), *due]).amax(0).clamp(max=keep)


def scores_of(planes: Sequence[Tensor], weights: Tensor, patch: Sequence[int], metric: str) -> Tensor:
    """[B, N]: mean metric of the pixels of every token."""
    wide = working_dtype(planes[0])
    rest = (1,) * (planes[0].dim() - 1)
    terms = [weights[:, j].to(wide).view(-1, *rest) * plane.to(wide) for j, plane in enumerate(planes)]
    pixels = metric_of(in_order(terms), metric)
    parts = [size for pair in zip(grid_of(pixels.shape[1:], patch), patch, strict=True) for size in pair]
    rank = len(patch)
    split = pixels.reshape(-1, *parts).permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))
    edge = math.prod(patch)
    in_tokens = split.reshape(len(pixels), -1, edge) if pixels.numel() else pixels.new_empty(len(pixels), 0, edge)
    return quotient(in_order(in_tokens.unbind(2)), edge)


def metric_of(v: Tensor, metric: str) -> Tensor:
    """[B, C, *spatial] -> [B, *spatial]."""
    channels = v.shape[1]
    if metric == "norm":
        return in_order([c * c for c in v.unbind(1)]).sqrt()
    if channels == 1:
        return v[:, 0].abs()
    mean = quotient(in_order(v.unbind(1)), channels)
    parts = [c - mean for c in v.unbind(1)]
    return quotient(in_order([part * part for part in parts]), channels - 1).sqrt()


def in_order(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, from the first to the last."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def quotient(a: Tensor, count: int) -> Tensor:
    """a / count, rounded once: torch multiplies with the rounded reciprocal of a number on a GPU, not of a tensor."""
    return a / torch.full_like(a, count)
