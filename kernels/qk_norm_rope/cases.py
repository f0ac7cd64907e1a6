"""Inputs that `qk_norm_rope` is tested and timed on: every norm, both rotations, the layouts that attention meets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16")
B, N, H, K = 2, 3, 3, 64


def tables(rows: int, width: int, pairs: str = "interleaved") -> tuple[Tensor, Tensor]:
    """cos and sin [R, K], each angle for both channels of its pair."""
    angles = torch.outer(torch.arange(rows).double(), 100.0 ** (-torch.arange(0, width, 2).double() / width))
    both = angles.repeat_interleave(2, dim=1) if pairs == "interleaved" else torch.cat((angles, angles), dim=1)
    return both.cos().float(), both.sin().float()


def fused(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same values as parts of one projection [B, N, 3 * H * K]."""
    flat = torch.cat((query.flatten(2), key.flatten(2), query.flatten(2)), dim=-1).chunk(3, dim=-1)
    return flat[0].view(query.shape), flat[1].view(key.shape)


def permuted(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same values, heads outermost in memory."""
    return query.transpose(1, 2).contiguous().transpose(1, 2), key.transpose(1, 2).contiguous().transpose(1, 2)


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int, int] = (B, N, H, K),
    key_shape: tuple[int, int] | None = None,
    layout: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    weight: str | None = "head",
    bias: bool = False,
    vectors: str | None = None,
    rows: int | None = None,
    by_sample: bool = False,
    nan: bool = False,
    into_slices: bool = False,
    **options: Any,
) -> Call:
    """One call. key_shape: (M, H2); weight: "head", "token" or None; rows: R of the tables."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    batch, tokens, heads, width = shape
    many = (tokens, heads) if key_shape is None else key_shape
    own = getattr(torch, dtype)
    narrow = own if vectors is None or dtype == "float64" else getattr(torch, vectors)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    query, key = (t.to(device, own) for t in (2.0 * normal(*shape), 0.5 + normal(batch, *many, width)))
    if nan:
        query[-1, -1, -1, -1] = key[0, 0, 0, 0] = math.nan
    if layout is not None:
        query, key = layout(query, key)
    for side, count in (("query", heads), ("key", many[1])):
        size = width * (count if weight == "token" else 1)
        if weight is not None:
            options[f"{side}_weight"] = (1.0 + 0.3 * normal(size)).to(device, narrow)
        if bias:
            options[f"{side}_bias"] = (0.3 * normal(size)).to(device, narrow)
    if rows is not None:
        pair = tables(rows, width, options.get("pairs", "interleaved"))
        for name, table in zip(("cos", "sin"), pair, strict=True):
            whole = torch.stack([table.roll(b, 0) for b in range(batch)]) if by_sample else table
            options[name] = whole.to(device, own if dtype == "float64" else torch.float32)
    if not into_slices:
        return Call((query, key), options)
    longer = [x.new_zeros(batch, x.shape[1] + 3, *x.shape[2:]) for x in (query, key)]
    out = (longer[0][:, 3:], longer[1][:, 3:])
    return Call((query, key), options | {"out": out}, writes=out)


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a Flux block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    turned: dict[str, Any] = {"rows": N}
    half: dict[str, Any] = {"pairs": "half", **turned}
    return (
        case("rms and rotary", **turned),
        case("rms and rotary, halves", **half),
        case("rms across heads", weight="token", **turned),
        case("layer norm", kind="layer", bias=True, eps=1e-5, **turned),
        case("layer norm across heads", kind="layer", weight="token", bias=True, pairs="half", **turned),
        case("layer norm alone", kind="layer", weight=None),
        case("rms alone", vectors="float32"),
        case("rms without a weight", weight=None, eps=1e-5, **turned),
        case("rotary alone", kind="none", weight=None, **turned),
        case("rotary alone, halves", kind="none", weight=None, **half),
        case("copy", kind="none", weight=None),
        case("text first", rotate_from=1, rows=N - 1),
        case("text last", rows=N - 1, pairs="half"),
        case("tables by sample", by_sample=True, **turned),
        case("grouped keys", key_shape=(N, 1), **turned),
        case("cross-attention", key_shape=(4, H), rotate_key=False, **turned),
        case("heads of 128", shape=(1, N, 2, 128), **turned),
        case("heads of 72", shape=(1, N, 2, 72), **turned),
        case("heads of 72, halves", shape=(1, N, 2, 72), **half),
        case("heads of 72 across heads", shape=(1, N, 2, 72), weight="token", **turned),
        case("heads of 6, halves", shape=(1, N, 2, 6), **half),
        case("parts of a projection", layout=fused, **turned),
        case("heads outermost", layout=permuted, **turned),
        case("NaN", nan=True, **turned),
        case("into slices", into_slices=True, weight="token", **turned),
        case("size 1", shape=(B, 1, 1, 1), kind="layer", bias=True),
        case("size 123", shape=(B, 1, 2, 123)),
        case("size 4097", shape=(1, 1, 1, 4097), kind="layer", vectors="float32"),
        case("empty batch", shape=(0, N, H, K), **turned),
        case("empty sample", shape=(B, 0, H, K)),
    )
