"""Inputs that `int8_linear` is tested and timed on: every epilogue, awkward sizes and layouts, the largest sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.cases import Draw, one_infinity, one_nan
from vivace.kernels.quantize_tokens.cases import ties, zero_rows
from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16")  # of the result
SHAPE = (2, 3, 96)


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, ...] = SHAPE,
    columns: int = 64,
    bias: bool = False,
    gate: tuple[int, ...] | None = None,
    residual: str | None = None,
    in_place: bool = False,
    layout: str = "plain",
    extreme: bool = False,
    nan: bool = False,
    floats: Callable[[Tensor], None] | None = None,
    smooth: bool = False,
    **options: Any,
) -> Call:
    """One call. gate: its shape without the last axis; residual, layout: as in `Draw.hidden`; extreme: all -128.

    floats: x is of unit normals that it changes in place, in the dtype of the result; smooth: with factors for them.
    """
    draw = Draw(dtype, device, "float32")

    def integers(*sizes: int) -> Any:
        drawn = torch.randint(-127, 128, sizes, generator=draw.generator, dtype=torch.int8)
        return (drawn.fill_(-128) if extreme else drawn).to(device)

    def scales(*sizes: int) -> Any:
        return (torch.rand(sizes, generator=draw.generator) / (16.0 * math.sqrt(shape[-1]))).to(device, draw.vectors)

    x, weight = integers(*shape), integers(columns, shape[-1])
    if layout == "gaps":
        room = x.new_zeros((*shape[:-2], shape[-2] + 1, shape[-1] + 5))
        x = room[..., 1:, 3 : 3 + shape[-1]].copy_(x)
    x_scale = scales(*shape[:-1])
    if nan:
        x_scale.view(-1)[-1] = math.nan
    args: tuple[Any, ...] = (x, weight, x_scale, scales(columns))
    if floats is not None:
        args = (_normals(draw, x, floats), weight, None, args[3])
        options["smooth"] = draw.vector(shape[-1]).abs() + 0.25 if smooth else None
    args += (draw.vector(columns),) if bias else ()
    if gate is not None:
        options["gate"] = draw.vector(*gate, columns)
    options["out_dtype"] = draw.dtype
    if residual is not None:
        options["residual"] = draw.hidden((shape[0], shape[1], columns), residual)
    if in_place:
        options["out"] = options["residual"]
    return Call(args, options)


def _normals(draw: Draw, like: Any, edit: Callable[[Tensor], None]) -> Tensor:
    """Unit normals that lie in memory as `like` does, in the dtype of the result."""
    x = torch.empty_strided(like.shape, like.stride(), dtype=draw.dtype, device=like.device)
    edit(x.copy_(torch.randn(tuple(like.shape), generator=draw.generator)))
    return x


def as_they_are(_: Tensor) -> None:
    """No change."""


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    block: dict[str, Any] = {"bias": True, "gate": (2,), "residual": "plain"}
    return (
        case("projection into the residual", **block, in_place=True),
        case("projection beside the residual", **block),
        case("plain"),
        case("gelu", bias=True, activation="gelu"),
        case("gelu tanh", bias=True, activation="gelu_tanh"),
        case("silu", activation="silu"),
        case("gate by token", gate=(2, 3), activation="silu"),
        case("gate of all", gate=(), residual="swapped"),
        case("gate of all tokens", gate=(1, 3)),
        case("residual with gaps", residual="gaps"),
        case("rows with gaps", layout="gaps", bias=True),
        case("two axes", shape=(3, 64), gate=(3,)),
        case("four axes", shape=(2, 3, 2, 48), gate=(2, 6)),
        case("largest sums", shape=(2, 1, 4096), extreme=True),
        case("NaN", bias=True, nan=True),
        case("floats", floats=as_they_are, **block),
        case("smoothed floats", floats=as_they_are, smooth=True, activation="gelu_tanh", layout="gaps", bias=True),
        case("ties", floats=ties, columns=33, activation="silu"),
        case("rows of zeros", floats=zero_rows, smooth=True, bias=True, activation="gelu"),
        case("row with NaN", floats=one_nan),
        case("row with infinity", floats=one_infinity, smooth=True),
        case("floats of size 123", shape=(2, 3, 123), columns=67, floats=as_they_are, bias=True),
        case("several blocks of floats", shape=(2, 40, 130), columns=67, floats=as_they_are, smooth=True),
        case("several blocks", shape=(2, 40, 130), columns=67, bias=True),
        case("size 1", shape=(2, 3, 1), columns=1),
        case("size 123", shape=(2, 3, 123), columns=123, bias=True),
        case("size 4097", shape=(1, 2, 4097), columns=3),
        case("empty batch", shape=(0, 3, 8)),
        case("empty sample", shape=(2, 0, 8), bias=True),
        case("empty sample of floats", shape=(2, 0, 8), floats=as_they_are),
    )
