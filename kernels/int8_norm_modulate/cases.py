"""Inputs that `int8_norm_modulate` is tested and timed on: those of `norm_modulate`, smoothed, with scales given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.norm_modulate import cases as norm
from vivace.kernels.norm_modulate.cases import DTYPES, SHAPE, B, D, N, far_off, one_infinity, one_nan, outliers
from vivace.kernels.quantize_tokens.cases import factors, given_scales
from vivace.kernels.spec import Call, Case


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int] = SHAPE,
    smooth: bool = False,
    given: tuple[int, ...] | None = None,
    edit: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Call:
    """One call. given: shape of the scales given; others as for `norm_modulate`."""
    call = norm.make(dtype, device, shape=shape, edit=edit, **options)
    more: dict[str, Tensor] = {}
    wide = torch.float64 if dtype == "float64" else torch.float32
    if smooth:
        more["smooth"] = factors(shape[-1]).to(device, wide)
    if given is not None:
        more["x_scale"] = given_scales(given).to(device, wide)
    return Call(call.args, dict(call.kwargs) | more)


def flat_row(hidden: Tensor) -> None:
    """A row without any deviation, whose norm is zeros."""
    hidden[0, 0] = 0.5


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    pair: dict[str, Any] = {"modulation": (B,)}
    return (
        case("adaln", modulation="chunks"),
        case("width 1152", shape=(B, 1, 1152), **pair),
        case("width 1000, smooth", shape=(B, N, 1000), smooth=True, **pair),
        case("scales given", given=(B,), **pair),
        case("one scale given, smooth", given=(), smooth=True, vectors="float32", weight=True, bias=True, **pair),
        case("a scale given to one sample", given=(B, 1), edit=outliers, **pair),
        case("scale and shift by token", modulation=(B, N), smooth=True),
        case("layer norm alone", edit=flat_row),
        case("rms norm", kind="rms", weight=True, given=(B,)),
        case("mean far off", edit=far_off, **pair),
        case("outliers", edit=outliers, smooth=True, **pair),
        case("NaN", edit=one_nan, given=(B,), **pair),
        case("infinity", edit=one_infinity, smooth=True, **pair),
        case("rows with gaps", layout="gaps", smooth=True, **pair),
        case("tokens outermost", layout="swapped", given=(B,), **pair),
        case("size 1", shape=(B, N, 1), smooth=True, **pair),
        case("size 123", shape=(B, N, 123), weight=True, **pair),
        case("size 4097", shape=(1, 2, 4097), modulation=(1,), smooth=True),
        case("empty batch", shape=(0, N, D), modulation=(0,)),
        case("empty sample", shape=(B, 0, D), smooth=True, given=(B,), **pair),
    )
