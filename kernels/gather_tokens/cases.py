"""Inputs that `gather_tokens` is tested and timed on; `scatter_tokens` draws its ids alike."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.cases import DTYPES, B, D, Draw
from vivace.kernels.spec import Call, Case

N, M = 7, 3


def draw_ids(draw: Draw, pictures: int, count: int, tokens: int) -> Tensor:
    """Ascending, other ones for every picture."""
    rows = [torch.randperm(tokens, generator=draw.generator)[:count].sort().values for _ in range(pictures)]
    ids = torch.stack(rows) if rows else torch.empty(0, count)
    return ids.to(draw.device, torch.int32)


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int] = (B, N, D),
    count: int = M,
    pictures: int | None = None,
    layout: str = "plain",
    vectors: str | None = None,
    modulation: tuple[int, ...] | str | None = None,
    weight: bool = False,
    bias: bool = False,
    reverse: bool = False,
    shared: bool = False,
    nan: bool = False,
    **options: Any,
) -> Call:
    """One call. modulation: shape of scale and shift without its last axis, "chunks", or None; shared: x is one row."""
    draw = Draw(dtype, device, vectors)
    rows, tokens, width = shape
    x = draw.hidden((1, tokens, width) if shared else shape, layout)
    ids = draw_ids(draw, rows if pictures is None else pictures, count, tokens)
    if nan:
        x[-1, int(ids[-1, 0]), 1] = math.nan
    if reverse:
        ids = ids.flip(1).contiguous()
    if modulation == "chunks":
        options["scale"], options["shift"] = draw.chunks(6, rows, width)[1:3]
    elif modulation is not None:
        options["scale"], options["shift"] = draw.vector(*modulation, width), draw.vector(*modulation, width)
    if weight:
        options["weight"] = draw.vector(width)
    if bias:
        options["bias"] = draw.vector(width)
    return Call((x, ids), options)


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that begins a row of some tokens."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    pair: dict[str, Any] = {"modulation": (B,)}
    return (
        case("adaln", modulation="chunks"),
        case("rows alone"),
        case("guided", shape=(6, N, D), pictures=2, modulation=(6,)),
        case("one table for all", shape=(B, 40, 64), count=20, shared=True),
        case("all tokens", count=N, **pair),
        case("one token", count=1, **pair),
        case("any order", reverse=True, **pair),
        case("float32 vectors", vectors="float32", weight=True, bias=True, **pair),
        case("by token", modulation=(B, M)),
        case("layer norm alone", kind="layer"),
        case("rms norm", kind="rms", weight=True),
        case("NaN", nan=True, **pair),
        case("rows with gaps", layout="gaps", **pair),
        case("tokens outermost", layout="swapped", weight=True),
        case("width 1152", shape=(B, 4, 1152), count=2, **pair),
        case("size 1", shape=(B, N, 1), **pair),
        case("size 123", shape=(B, N, 123), **pair),
        case("size 4097", shape=(1, 3, 4097), count=2, modulation=(1,)),
        case("empty batch", shape=(0, N, D), modulation=(0,)),
        case("empty sample", shape=(B, N, D), count=0, **pair),
    )
