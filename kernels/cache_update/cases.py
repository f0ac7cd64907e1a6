"""Inputs that `cache_update` is tested and timed on: stores, differences, ranges, lanes anywhere, layouts, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.cases import DTYPES, SHAPE, B, D, Draw, N, far_off, one_infinity, one_nan, outliers
from vivace.kernels.spec import Call, Case

STORES = ("bfloat16", "float16", "float8_e4m3fn", "int8")


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, ...] = SHAPE,
    layouts: tuple[str, str] = ("plain", "plain"),
    store: str = "float32",
    planes: int = 1,
    made: int = 0,
    base: bool = False,
    beside: str | None = "same",
    vectors: str | None = None,
    gate: tuple[int, ...] | str | None = "chunks",
    edit: Callable[[Tensor], None] | None = None,
    of: int | None = None,
) -> Call:
    """One call, its sum written into a tensor of its own.

    layouts: of fresh and base, and of hidden; beside: dtype of hidden ("same": of fresh), None: no sum; gate: its shape
    without the last axis, "chunks", or None; edit: changes fresh in place; of: how many tokens are kept, of which rows
    are about some, None: those of fresh.
    """
    draw = Draw(dtype, device, vectors)
    kept, scales, lanes = memory(draw, shape if of is None else (shape[0], of, shape[2]), store, planes)
    fresh = hidden_like(draw, shape, layouts[0])
    if edit is not None:
        edit(fresh)
    options: dict[str, Any] = {"made": made}
    if of is not None:
        options["ids"] = some_tokens(draw, shape[0], shape[1], of)
    writes = [kept]
    if scales is not None:
        options["scales"] = scales
        writes.append(scales)
    if base:
        options["base"] = hidden_like(draw, shape, layouts[0])
    if beside is not None:
        own = Draw(dtype if beside == "same" or dtype == "float64" else beside, device, vectors)
        options["hidden"] = hidden_like(own, shape, layouts[1])
        options["out"] = torch.full_like(options["hidden"], 7.0)
        writes.append(options["out"])
        if isinstance(gate, str):
            options["gate"] = own.chunks(6, shape[0], shape[-1])[2]
        elif gate is not None:
            options["gate"] = own.vector(*gate, shape[-1])
    return Call((kept, lanes, fresh), options, tuple(writes))


def memory(draw: Draw, shape: tuple[int, ...], store: str, planes: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Kept planes of unit size in more lanes than rows, scales of int8, and the rows' lanes, out of order."""
    rows = shape[0]
    values = torch.randn((rows + 2, planes, *shape[1:]), generator=draw.generator)
    lanes = torch.tensor([(rows + 1 - 2 * r) % (rows + 2) if rows % 2 else rows + 1 - r for r in range(rows)])
    lanes = lanes.to(draw.device, torch.int64)
    if store != "int8":
        dtype = torch.float64 if draw.dtype == torch.float64 and store == "float32" else getattr(torch, store)
        return values.to(draw.device, dtype), None, lanes
    scales = torch.rand(values.shape[:-1], generator=draw.generator) / 30.0 + 0.001
    numbers = (values * 30.0).round().clamp(-127.0, 127.0).to(draw.device, torch.int8)
    return numbers, scales.to(draw.device), lanes


def some_tokens(draw: Draw, samples: int, count: int, of: int) -> Tensor:
    """ids int32 [samples, count]: ascending, other ones for each sample."""
    rows = [torch.randperm(of, generator=draw.generator)[:count].sort().values for _ in range(samples)]
    return torch.stack(rows).to(draw.device, torch.int32)


def hidden_like(draw: Draw, shape: tuple[int, ...], layout: str) -> Tensor:
    """Unit normals; layouts but "plain" have three axes."""
    if layout == "plain":
        return torch.randn(shape, generator=draw.generator).to(draw.device, draw.dtype)
    return draw.hidden(shape, layout)


def zero_rows(fresh: Tensor) -> None:
    """A row of zeros, one of minus zeros."""
    fresh[0, 0], fresh[-1, -1] = 0.0, -0.0


def wide_range(fresh: Tensor) -> None:
    """Numbers from below to above what e4m3 and float16 hold, ties between neighbours of e4m3 among them."""
    powers = torch.arange(fresh.shape[-1], device=fresh.device) % 40 - 22
    fresh.copy_(torch.ldexp(torch.sign(fresh) * (1.0 + torch.floor(fresh.float().abs() * 16.0) / 16.0), powers))
    fresh[0, 0, 0], fresh[-1, -1, -1] = math.inf, 464.0


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a block runs whose output is kept."""

    def case(name: str, dtypes: tuple[str, ...] = DTYPES, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), dtypes)

    two: dict[str, Any] = {"planes": 2, "made": 1}
    three: dict[str, Any] = {"planes": 4, "made": 2}
    return (
        case("kept and added"),
        case("kept", beside=None),
        case("a difference", **two),
        case("two differences of four planes", **three),
        case("change of a range", base=True, beside=None, **two),
        case("change of a range, added", base=True, gate=None, vectors="float32"),
        case("width 1152", shape=(3, 1, 1152), **two),
        case("float32 beside bfloat16", ("float32",), beside="bfloat16", **two),
        case("bfloat16 beside float32", ("bfloat16",), beside="float32", gate=(B, N), base=True),
        *(case(store, store=store, **two) for store in STORES),
        *(case(f"{store}, change of a range", store=store, base=True, gate=None, **three) for store in STORES),
        *(case(f"{store}, wide range", store=store, edit=wide_range, beside=None) for store in STORES),
        *(case(f"{store}, NaN", store=store, edit=one_nan, **three) for store in STORES),
        case("int8, zero rows", store="int8", edit=zero_rows, **three),
        case("int8, infinity", store="int8", edit=one_infinity, **two),
        case("int8, outliers", store="int8", edit=outliers, **two),
        case("mean far off", edit=far_off, **three),
        case("NaN", edit=one_nan, **two),
        case("gate by token", gate=(B, N), vectors="float32", **two),
        case("one gate", gate=(), **two),
        case("rows with gaps", layouts=("gaps", "plain"), base=True, **two),
        case("tokens outermost", layouts=("swapped", "gaps"), store="int8", **two),
        case("some tokens", of=7, **two),
        case("some tokens, added nowhere", of=N, beside=None),
        case("some tokens of int8", of=5, store="int8", base=True, **three),
        case("two axes", shape=(5, 70), gate=(5,), **two),
        case("four axes", shape=(2, 3, 2, 48), gate=None, store="int8", **two),
        case("size 1", shape=(B, N, 1), gate=(B,), **two),
        case("size 123", shape=(B, N, 123), gate=(B,), store="float8_e4m3fn", **two),
        case("size 4097", shape=(1, 2, 4097), gate=(1, 1), store="int8", **two),
        case("empty batch", shape=(0, N, D), gate=(0,), **two),
        case("empty sample", shape=(B, 0, D), gate=(B,), **two),
    )
