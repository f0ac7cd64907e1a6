"""Inputs that `fp8_quantize_tokens` is tested and timed on: those of `quantize_tokens`, with ties of e4m3."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.cases import DTYPES, B, D, N, far_off, one_infinity, one_nan, outliers
from vivace.kernels.quantize_tokens.cases import huge, make, tiny, zero_rows
from vivace.kernels.spec import Case


def ties(x: Tensor) -> None:
    """A scale of 1 and numbers half-way between neighbours of e4m3, subnormal ones too."""
    count = x.shape[-1]
    halves = torch.tensor([17.0, 19.0, 1.0625, 1.1875, 0.001953125 * 1.5, 0.001953125 * 2.5, 0.0009765625, 416.0])
    signs = torch.tensor([1.0, -1.0, -1.0])
    x.copy_((halves.repeat(count)[:count] * signs.repeat(count)[:count]).to(x.device))
    x[..., 0] = 448.0


def binades(x: Tensor) -> None:
    """Numbers from far below the least of e4m3 to the largest."""
    x.copy_(x * torch.logspace(-7.0, 2.0, x.shape[-1], device=x.device))


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
        case("binades", edit=binades),
        case("zero rows", edit=zero_rows),
        case("tiny", ("float32",), edit=tiny),
        case("huge", edit=huge),
        case("beyond the range once smooth", edit=huge, smooth=True),
        case("huge, scales given", edit=huge, given=(B,)),
        case("mean far off", edit=far_off),
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
