"""Inputs that `cache_apply` is tested and timed on: stores, terms, lanes anywhere and shared, layouts, NaN."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from vivace.kernels.cache_update.cases import STORES, hidden_like, memory, some_tokens
from vivace.kernels.norm_modulate.cases import DTYPES, SHAPE, B, D, Draw, N
from vivace.kernels.spec import Call, Case


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, ...] = SHAPE,
    layout: str = "plain",
    store: str = "float32",
    planes: int = 1,
    terms: int = 1,
    weights: tuple[float, ...] | None = None,
    alone: bool = False,
    vectors: str | None = None,
    gate: tuple[int, ...] | str | None = "chunks",
    nan: bool = False,
    one_lane: bool = False,
    of: int | None = None,
) -> Call:
    """One call. layout: of hidden; weights: of each row, None: drawn; alone: no hidden, v in `dtype`; gate: its shape
    without the last axis, "chunks", or None; nan: one in plane 0 of the last row; one_lane: all rows read the first's;
    of: how many tokens are kept, of which rows are about some, None: those of hidden.
    """
    draw = Draw(dtype, device, vectors)
    kept, scales, lanes = memory(draw, shape if of is None else (shape[0], of, shape[2]), store, planes)
    if nan and scales is None:
        kept[lanes[-1:].cpu(), 0, 0, 1] = torch.tensor(math.nan).to(kept.device, kept.dtype)
    elif scales is not None and nan:
        scales[lanes[-1], 0, 0] = math.nan
    if one_lane:
        lanes = lanes[:1].expand(len(lanes)).contiguous()
    drawn = torch.randn((shape[0], terms), generator=draw.generator)
    if weights is not None:
        drawn = torch.tensor(weights).expand(shape[0], terms)
    drawn = drawn.to(device, torch.float64 if dtype == "float64" else torch.float32)
    options: dict[str, Any] = {} if scales is None else {"scales": scales}
    if of is not None:
        options["ids"] = some_tokens(draw, shape[0], shape[1], of)
    if alone:
        return Call((kept, lanes, drawn), options | {"dtype": draw.dtype})
    options["hidden"] = hidden_like(draw, shape, layout)
    if isinstance(gate, str):
        options["gate"] = draw.chunks(6, shape[0], shape[-1])[2]
    elif gate is not None:
        options["gate"] = draw.vector(*gate, shape[-1])
    return Call((kept, lanes, drawn), options)


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a block runs whose output is reused."""

    def case(name: str, dtypes: tuple[str, ...] = DTYPES, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), dtypes)

    two: dict[str, Any] = {"planes": 2, "terms": 2}
    three: dict[str, Any] = {"planes": 4, "terms": 3}
    return (
        case("reused", weights=(1.0,)),
        case("scaled"),
        case("reused alone", weights=(1.0,), alone=True),
        case("forecast", **two),
        case("forecast alone", alone=True, **three),
        case("forecast of order 2", weights=(1.0, 2.0, 3.0), **three),
        case("fewer terms than planes", planes=4),
        case("a range, no gate", gate=None, **two),
        case("width 1152", shape=(3, 1, 1152), **two),
        *(case(store, store=store, **two) for store in STORES),
        *(case(f"{store}, alone", store=store, alone=True, **three) for store in STORES),
        *(case(f"{store}, NaN", store=store, nan=True, **two) for store in STORES),
        case("NaN", nan=True, **two),
        case("one lane for all", one_lane=True, **two),
        case("gate by token", gate=(B, N), vectors="float32", **two),
        case("one gate", gate=(), vectors="float32", **two),
        case("rows with gaps", layout="gaps", **two),
        case("tokens outermost", layout="swapped", store="int8", **two),
        case("some tokens", of=7, **two),
        case("some tokens alone", of=5, alone=True, store="bfloat16", **two),
        case("some tokens of int8", of=5, store="int8", **three),
        case("two axes", shape=(5, 70), gate=(5,), **two),
        case("four axes", shape=(2, 3, 2, 48), gate=None, store="int8", **two),
        case("size 1", shape=(B, N, 1), gate=(B,), **two),
        case("size 123", shape=(B, N, 123), gate=(B,), store="float8_e4m3fn", **two),
        case("size 4097", shape=(1, 2, 4097), gate=(1, 1), store="int8", **two),
        case("empty batch", shape=(0, N, D), gate=(0,), **two),
        case("empty sample", shape=(B, 0, D), gate=(B,), **two),
    )
