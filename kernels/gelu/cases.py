"""Inputs that `gelu` is tested and timed on: both forms, plain and gated, awkward numbers and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16")
SHAPE = (2, 3, 384)
ODD = (math.nan, -math.inf, 0.0, -0.0, 1e-30, -1e-30, 6.0, -6.0, 14.0, -14.0, -100.0, 3e38, -3e38)


def gaps(values: Tensor) -> Tensor:
    """The same values, rows apart and not aligned."""
    room = values.new_full((*values.shape[:-2], values.shape[-2] + 1, values.shape[-1] + 5), math.nan)
    return room[..., 1:, 3 : 3 + values.shape[-1]].copy_(values)


def odd(values: Tensor) -> Tensor:
    """Zeros, both tails, what overflows a power, NaN and -inf, each at many places of a row."""
    return torch.tensor(ODD, dtype=values.dtype, device=values.device).repeat(*values.shape[:-1], values.shape[-1])


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, ...] = SHAPE,
    spread: float = 2.0,
    layout: Callable[[Tensor], Tensor] | None = None,
    into_gaps: bool = False,
    **options: Any,
) -> Call:
    """One call on normals of deviation `spread`; into_gaps: a gated one with an `out` whose rows lie apart."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    hidden = (spread * torch.randn(shape, generator=generator)).to(device, getattr(torch, dtype))
    if layout is not None:
        hidden = layout(hidden)
    if not into_gaps:
        return Call((hidden,), options)
    out = gaps(torch.zeros_like(hidden[..., : shape[-1] // 2]))
    return Call((hidden,), options | {"out": out}, writes=(out,))


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    gated: dict[str, Any] = {"gated": True}
    tanh: dict[str, Any] = {"approximate": "tanh"}
    return (
        case("tanh", **tanh),
        case("erf"),
        case("gated", **gated),
        case("gated tanh", **gated, **tanh),
        case("narrow", spread=0.01),
        case("wide", spread=30.0),
        case("odd numbers", layout=odd),
        case("odd numbers, tanh", layout=odd, **tanh),
        case("rows with gaps", layout=gaps),
        case("gated rows with gaps", layout=gaps, **gated),
        case("two axes", shape=(2, 1000)),
        case("four axes", shape=(2, 3, 2, 48), **gated),
        case("into rows with gaps", into_gaps=True, **gated),
        case("size 1", shape=(2, 1)),
        case("size 123", shape=(2, 3, 246), **gated),
        case("size 4097", shape=(1, 4097)),
        case("empty batch", shape=(0, 3, 8)),
        case("empty sample", shape=(2, 0, 8), **gated),
    )
