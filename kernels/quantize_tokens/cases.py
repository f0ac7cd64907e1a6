"""Inputs that `quantize_tokens` is tested and timed on: ties, zeros, tiny and huge rows, NaN, layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.cases import DTYPES, SHAPE, B, D, Draw, N, far_off, one_infinity, one_nan, outliers
from vivace.kernels.spec import Call, Case


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, ...] = SHAPE,
    layout: str = "plain",
    edit: Callable[[Tensor], None] | None = None,
) -> Call:
    """One call on unit normals; layout: of `Draw.hidden`, three axes; edit: changes them in place."""
    draw = Draw(dtype, device)
    if layout == "plain":
        x = torch.randn(shape, generator=draw.generator).to(device, draw.dtype)
    else:
        x = draw.hidden((shape[0], shape[1], shape[2]), layout)
    if edit is not None:
        edit(x)
    return Call((x,))


def ties(x: Tensor) -> None:
    """A scale of 1/2 and quotients half-way between integers: 126.5, 0.5, -1.5, ..."""
    count = x.shape[-1]
    steps = torch.arange(count, dtype=torch.float32, device=x.device) % 127 + 0.5
    x.copy_(steps * torch.tensor([0.5, -0.5], device=x.device).repeat(count)[:count])
    x[..., 0] = 63.5


def zero_rows(x: Tensor) -> None:
    """A row of zeros, one of minus zeros."""
    x[0, 0], x[-1, -1] = 0.0, -0.0


def tiny(x: Tensor) -> None:
    """Rows whose scale is subnormal, or too small to be one."""
    x.mul_(1e-38)
    x[0, 0] = 0.0
    x[0, 0, 1] = 1e-40


def huge(x: Tensor) -> None:
    """The largest numbers of the dtype."""
    x[0, 0, 0], x[-1, -1, -1] = torch.finfo(torch.bfloat16).max, -math.ldexp(1.0, 127)


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, dtypes: tuple[str, ...] = DTYPES, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), dtypes)

    return (
        case("normals"),
        case("width 1152", shape=(B, 1, 1152)),
        case("ties", edit=ties),
        case("zero rows", edit=zero_rows),
        case("tiny", ("float32",), edit=tiny),
        case("huge", edit=huge),
        case("mean far off", edit=far_off),
        case("outliers", edit=outliers),
        case("NaN", edit=one_nan),
        case("infinity", edit=one_infinity),
        case("rows with gaps", layout="gaps"),
        case("tokens outermost", layout="swapped"),
        case("two axes", shape=(5, 70)),
        case("four axes", shape=(2, 3, 2, 48)),
        case("size 1", shape=(B, N, 1)),
        case("size 123", shape=(B, N, 123)),
        case("size 4097", shape=(1, 2, 4097)),
        case("empty batch", shape=(0, N, D)),
        case("empty sample", shape=(B, 0, D)),
    )
