"""Inputs that `linear` is tested and timed on: every activation and operand, ragged sizes, layouts, result dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.gelu.cases import gaps
from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16")
SHAPE = (2, 8, 96)
COLUMNS = 80
EVERYTHING = ("bias", "gate", "residual")


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, ...] = SHAPE,
    columns: int = COLUMNS,
    given: tuple[str, ...] = ("bias",),
    gate_shape: tuple[int, ...] | None = None,
    narrow: bool = False,
    out_dtype: str | None = None,
    layout: Callable[[Tensor], Tensor] | None = None,
    in_place: bool = False,
    odd: bool = False,
    **options: Any,
) -> Call:
    """One call on normals; products of deviation 1.

    given: operands besides x, weight; gate_shape: without the columns, None: [B]; narrow: bias and gate have the dtype
    of x; layout: of x, residual and out; in_place: into the residual; odd: infinities and NaN in one row.
    """
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(math.prod(shape) + columns)

    def draw(*size: int, to: torch.dtype = kind) -> Tensor:
        return torch.randn(size, generator=generator).to(device, to)

    result = getattr(torch, out_dtype) if out_dtype and dtype != "float64" else kind
    placed = layout or (lambda tensor: tensor)
    vector = kind if narrow or dtype == "float64" else torch.float32
    x, weight = placed(draw(*shape)), (draw(columns, shape[-1], to=torch.float32) / shape[-1] ** 0.5).to(kind)
    if odd:
        x.view(-1, shape[-1])[1, :3] = torch.tensor([math.inf, math.nan, -math.inf]).to(x)
    if "bias" in given:
        options["bias"] = draw(columns, to=vector)
    if "gate" in given:
        options["gate"] = draw(*((shape[0],) if gate_shape is None else gate_shape), columns, to=vector)
    if "residual" in given:
        options["residual"] = placed(draw(*shape[:-1], columns, to=result))
    if out_dtype:
        options["out_dtype"] = result
    if in_place:
        options["out"] = options["residual"]
    return Call((x, weight), options)


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    everything: dict[str, Any] = {"given": EVERYTHING}
    return (
        case("gelu", activation="gelu"),
        case("product alone", given=()),
        case("tanh", activation="gelu_tanh"),
        case("silu", activation="silu"),
        case("gate and residual", **everything),
        case("gate by row", **everything, gate_shape=(2, 8)),
        case("gate for all", given=("gate",), gate_shape=(), activation="silu"),
        case("gate by token", **everything, gate_shape=(1, 8), activation="gelu_tanh"),
        case("residual alone", given=("residual",)),
        case("narrow vectors", **everything, narrow=True),
        case("into float32", **everything, out_dtype="float32"),
        case("into bfloat16", **everything, out_dtype="bfloat16", activation="gelu"),
        case("into its residual", **everything, in_place=True),
        case("rows with gaps", **everything, layout=gaps, in_place=True),
        case("odd numbers", **everything, odd=True),
        case("deep", shape=(2, 3, 2100), columns=40),
        case("many rows", shape=(1, 117, 32), columns=70, **everything),
        case("two axes", shape=(7, 64), columns=64, **everything),
        case("four axes", shape=(2, 3, 2, 48), columns=24, **everything, gate_shape=(2, 1, 1)),
        case("size 1", shape=(2, 1, 1), columns=1, **everything),
        case("size 123", shape=(2, 3, 123), columns=123, **everything),
        case("size 4097", shape=(1, 2, 4097), columns=5),
        case("empty batch", shape=(0, 3, 8), columns=4, given=()),
        case("empty sample", shape=(2, 0, 8), columns=4, given=()),
    )
