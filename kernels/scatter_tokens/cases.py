"""Inputs that `scatter_tokens` is tested and timed on."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from vivace.kernels.gather_tokens.cases import M, N, draw_ids
from vivace.kernels.norm_modulate.cases import DTYPES, B, D, Draw
from vivace.kernels.spec import Call, Case


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int] = (B, N, D),
    count: int = M,
    pictures: int | None = None,
    lanes: bool = True,
    layout: str = "plain",
    into: str = "plain",
    store: str | None = None,
    split: int | None = None,
    vectors: str | None = None,
    summed: bool = False,
    gate: tuple[int, ...] | str | None = None,
    nan: bool = False,
) -> Call:
    """One call. lanes: among two more than there are rows; layout: of fresh, into: of full; store: dtype of full, None:
    that of fresh; split: width of fresh, the rest is `second`; gate: its shape without the last axis, or "chunks".
    """
    draw = Draw(dtype, device, vectors)
    rows, tokens, width = shape
    ids = draw_ids(draw, rows if pictures is None else pictures, count, tokens)
    stored = Draw(dtype if store is None or dtype == "float64" else store, device)
    full = stored.hidden((rows + 2 if lanes else rows, tokens, width), into)
    fresh, hidden = (draw.hidden((rows, count, width), layout) for _ in range(2))
    if nan:
        fresh[0, 0, 1] = hidden[-1, -1, -1] = math.nan
    options: dict[str, Any] = {}
    if lanes:
        options["lanes"] = torch.arange(rows + 1, 1, -1, device=device)
    if split is not None:
        fresh, options["second"] = fresh[..., :split], fresh[..., split:]
    if summed:
        options["hidden"] = hidden
    if isinstance(gate, str):
        options["gate"] = draw.chunks(6, rows, width)[2]
    elif gate is not None:
        options["gate"] = draw.vector(*gate, width)
    return Call((full, ids, fresh), options, (full,))


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that keeps keys and values of a row of some tokens."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    return (
        case("kept"),
        case("guided", shape=(6, N, D), pictures=2),
        case("every part", lanes=False),
        case("keys and values", split=D // 2),
        case("more keys than values", split=300, layout="gaps"),
        case("kept as bfloat16", store="bfloat16"),
        case("kept as float32", store="float32", split=200),
        case("a sum", summed=True, lanes=False),
        case("gated", summed=True, gate="chunks"),
        case("gated, kept as bfloat16", summed=True, gate=(B,), vectors="float32", store="bfloat16"),
        case("gate by token", summed=True, gate=(B, M), vectors="float32"),
        case("one gate", summed=True, gate=()),
        case("all tokens", count=N),
        case("one token", count=1),
        case("NaN", summed=True, nan=True),
        case("rows with gaps", layout="gaps", into="gaps"),
        case("tokens outermost", layout="swapped", into="swapped", summed=True),
        case("width 1152", shape=(B, 4, 1152), count=2),
        case("size 1", shape=(B, N, 1)),
        case("size 123", shape=(B, N, 123), split=60),
        case("size 4097", shape=(1, 3, 4097), count=2),
        case("empty batch", shape=(0, N, D)),
        case("empty sample", shape=(B, N, D), count=0),
    )
