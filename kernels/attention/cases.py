"""Inputs that `attention` is tested and timed on: widths and counts of every kind, layouts, awkward numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16")
B, N, H, K = 2, 5, 3, 16
Layout = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def fused(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values as parts of one projection [B, N, 3, H, K]."""
    query, key, value = torch.stack((query, key, value), dim=2).unbind(2)
    return query, key, value


def permuted(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values, heads outermost in memory."""
    query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors)
    return query, key, value


def one_key_for_all(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of the first sample for all samples, of the first head for all heads: strides of 0."""
    return query, key[:1, :, :1].expand_as(key), value[:1, :, :1].expand_as(value)


def kept(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values side by side in a row [L, M, 2, H, K]."""
    key, value = torch.stack((key, value), dim=2).unbind(2)
    return query, key, value


def nan_query(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One element of one query."""
    query[0, 0, 0, 0] = math.nan
    return query, key, value


def nan_key(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One element of one key: no query of its head has a result."""
    key[0, -1, 1, 3] = math.nan
    return query, key, value


def nan_value(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One element of one value: a channel of its head has no result."""
    value[-1, 0, 0, -1] = math.nan
    return query, key, value


def infinite(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A score of -infinity, which weighs nothing, for queries of one sign; +infinity, and so NaN, for the others."""
    query[..., 0] = query[..., 0].abs() + 0.1
    key[:, 1, :, 0] = -math.inf
    query[0, 1, 0, 0] = -1.0
    return query, key, value


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int, int] = (B, N, H, K),
    keys: int | None = None,
    spread: float = 1.0,
    layout: Layout | None = None,
    into_gaps: bool = False,
    lanes: tuple[int, ...] | None = None,
    **options: Any,
) -> Call:
    """One call on normals, queries of deviation `spread`; into_gaps: with an `out` whose heads lie apart; lanes: of
    each sample, among two more than the highest of them.
    """
    generator = torch.Generator().manual_seed(math.prod(shape))
    own = getattr(torch, dtype)
    batch, tokens, heads, width = shape
    many = (batch if lanes is None else max(lanes) + 3, tokens if keys is None else keys, heads, width)
    if lanes is not None:
        options["lanes"] = torch.tensor(lanes, device=device)
    query, key, value = (torch.randn(size, generator=generator) for size in (shape, many, many))
    # Rounded before they become float64: the numbers are the same in every dtype.
    tensors = tuple(tensor.to(device, own) for tensor in (query * spread, key, value))
    if layout is not None:
        tensors = layout(*tensors)
    if not into_gaps:
        return Call(tensors, options)
    room = torch.full((batch, tokens, heads, width + 3), math.nan, device=device, dtype=own)
    out = room[..., 2 : 2 + width].zero_()
    return Call(tensors, options | {"out": out}, writes=(out,))


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a small DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    return (
        case("parts of a projection", shape=(2, 64, 3, 32), layout=fused),
        case("heads of 64", shape=(1, 80, 2, 64)),
        case("heads of 72", shape=(1, 70, 2, 72), layout=fused),
        case("heads of 80", shape=(1, 37, 2, 80)),
        case("heads of 96", shape=(1, 33, 1, 96)),
        case("heads of 128", shape=(1, 67, 2, 128)),
        case("heads of 33", shape=(B, 9, H, 33)),
        case("heads of 7", shape=(B, N, H, 7), layout=fused),
        case("heads of 300", shape=(1, 9, 2, 300), keys=150),
        case("cross-attention", shape=(B, 50, H, 64), keys=77),
        case("one key", keys=1),
        case("one query of many keys", shape=(B, 1, H, 40), keys=130),
        case("keys in blocks", shape=(1, 30, 2, 64), keys=1100),
        case("queries in blocks", shape=(1, 400, 1, 16), keys=40),
        case("heads outermost", shape=(B, 20, H, 32), layout=permuted),
        case("one key for all", shape=(B, 20, H, 24), layout=one_key_for_all),
        case("into heads with gaps", into_gaps=True),
        case("own scale", shape=(B, 20, H, 32), scale=0.5),
        case("sharp", shape=(B, 40, H, 64), spread=30.0),
        case("flat", shape=(B, 40, H, 64), spread=1e-3),
        case("NaN in a query", layout=nan_query),
        case("NaN in a key", layout=nan_key),
        case("NaN in a value", layout=nan_value),
        case("infinite scores", layout=infinite),
        case("kept keys", shape=(2, 20, 2, 64), keys=80, lanes=(3, 1), layout=kept),
        case("kept keys of 72", shape=(3, 9, 2, 72), keys=70, lanes=(1, 0, 1)),
        case("size 1", shape=(B, 1, 1, 1)),
        case("size 123", shape=(1, 123, 1, 123), keys=123),
        case("size 4097", shape=(1, 2, 1, 8), keys=4097),
        case("empty batch", shape=(0, N, H, K)),
        case("empty sample", shape=(B, 0, H, K)),
        case("no keys", keys=0),
    )
