"""Inputs that `quantize_tokens` is tested and timed on: ties, zeros, tiny and huge rows, NaN, scales given, layouts."""

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
    smooth: bool = False,
    given: tuple[int, ...] | None = None,
) -> Call:
    """One call on unit normals; layout: of `Draw.hidden`, three axes; edit: changes them in place; given: its shape."""
    draw, options = Draw(dtype, device, "float32"), dict[str, Tensor]()
    if layout == "plain":
        x = torch.randn(shape, generator=draw.generator).to(device, draw.dtype)
    else:
        x = draw.hidden((shape[0], shape[1], shape[2]), layout)
    if edit is not None:
        edit(x)
    if smooth:
        options["smooth"] = factors(shape[-1]).to(device, draw.vectors)
    if given is not None:
        options["scale"] = given_scales(given).to(device, draw.vectors)
    return Call((x,), options)


def factors(width: int) -> Tensor:
    """Smoothing of each channel, a factor of thirty between them, float32 [K]."""
    return torch.logspace(-1.0, 0.5, width)


def given_scales(shape: tuple[int, ...]) -> Tensor:
    """Scales that cut unit normals off at two deviations; of several the last is absent."""
    scales = torch.full(shape, 2.0 / 127.0)
    if scales.numel() > 1:
        scales.view(-1)[-1] = 0.0
    return scales


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
        case("smooth", smooth=True, edit=outliers),
        case("scales given", given=(B,)),
        case("one scale given, smooth", given=(), smooth=True, shape=(B, N, 1000)),
        case("a scale given to one sample", given=(B, 1), edit=zero_rows),
        case("ties", edit=ties),
        case("zero rows", edit=zero_rows),
        case("tiny", ("float32",), edit=tiny),
        case("tiny, scales given", ("float32",), edit=tiny, given=(B,)),
        case("huge", edit=huge),
        case("beyond the range once smooth", edit=huge, smooth=True),
        case("huge, scales given", edit=huge, given=(B,)),
        case("mean far off", edit=far_off),
        case("outliers", edit=outliers),
        case("NaN", edit=one_nan),
        case("NaN, scales given", edit=one_nan, given=(B,), smooth=True),
        case("infinity", edit=one_infinity),
        case("rows with gaps", layout="gaps"),
        case("tokens outermost", layout="swapped", smooth=True),
        case("two axes", shape=(5, 70), given=(5,)),
        case("four axes", shape=(2, 3, 2, 48), given=(2, 1, 1)),
        case("size 1", shape=(B, N, 1)),
        case("size 123", shape=(B, N, 123)),
        case("size 4097", shape=(1, 2, 4097)),
        case("empty batch", shape=(0, N, D)),
        case("empty sample", shape=(B, 0, D), given=(B,)),
    )
