"""Inputs that `fp8_linear` is tested and timed on: every epilogue, awkward sizes and layouts, x in either form."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from vivace.kernels.norm_modulate.cases import Draw
from vivace.kernels.quantize_tokens.cases import factors
from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16")  # of the result
SHAPE = (2, 3, 96)
SPREAD = 100.0  # deviation of numbers within [-448, 448]


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
    given: str = "",
    nan: bool = False,
    **options: Any,
) -> Call:
    """One call. gate: its shape without the last axis; given: "x" or "x smooth", quantized here; nan: a scale."""
    draw = Draw(dtype, device, "float32")

    def numbers(*sizes: int) -> Any:
        drawn = (torch.randn(sizes, generator=draw.generator) * SPREAD).clamp(-448.0, 448.0)
        return drawn.to(torch.float8_e4m3fn).to(device)

    def scales(*sizes: int) -> Any:
        most = 2.0 / (SPREAD * shape[-1] ** 0.25)
        return (torch.rand(sizes, generator=draw.generator) * most).to(device, draw.vectors)

    x, weight, x_scale = numbers(*shape), numbers(columns, shape[-1]), scales(*shape[:-1])
    if layout == "gaps":
        room = x.new_zeros((*shape[:-2], shape[-2] + 1, shape[-1] + 5))
        room[..., 1:, 3 : 3 + shape[-1]] = x
        x = room[..., 1:, 3 : 3 + shape[-1]]
    if nan:
        x_scale.view(-1)[-1] = math.nan
    if given:
        x, x_scale = torch.randn(shape, generator=draw.generator).to(device, draw.dtype), None
    if "smooth" in given:
        options["smooth"] = factors(shape[-1]).to(device, draw.vectors)
    args: tuple[Any, ...] = (x, weight, x_scale, scales(columns))
    args += (draw.vector(columns),) if bias else ()
    if gate is not None:
        options["gate"] = draw.vector(*gate, columns)
    options["out_dtype"] = draw.dtype
    if residual is not None:
        options["residual"] = draw.hidden((shape[0], shape[1], columns), residual)
    if in_place:
        options["out"] = options["residual"]
    return Call(args, options)


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
        case("quantized in the call", given="x", bias=True),
        case("smoothed and quantized in the call", given="x smooth", **block),
        case("gate by token", gate=(2, 3), activation="silu"),
        case("gate of all", gate=(), residual="swapped"),
        case("residual with gaps", residual="gaps"),
        case("rows with gaps", layout="gaps", bias=True),
        case("two axes", shape=(3, 64), gate=(3,)),
        case("four axes", shape=(2, 3, 2, 48), gate=(2, 6)),
        case("deep", shape=(2, 1, 2100), columns=24),
        case("NaN", bias=True, nan=True),
        case("several blocks", shape=(2, 40, 130), columns=67, bias=True),
        case("size 1", shape=(2, 3, 1), columns=1),
        case("size 123", shape=(2, 3, 123), columns=123, bias=True),
        case("size 4097", shape=(1, 2, 4097), columns=3),
        case("empty batch", shape=(0, 3, 8)),
        case("empty sample", shape=(2, 0, 8), bias=True),
    )
