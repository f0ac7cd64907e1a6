"""Inputs that `adaln_modulate` is tested and timed on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from vivace.kernels.norm_modulate.cases import DTYPES, SHAPE, B, D, Draw, N, far_off, one_nan
from vivace.kernels.spec import Call, Case


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int] = SHAPE,
    layouts: tuple[str, str] = ("plain", "plain"),
    vectors: str | None = None,
    modulation: tuple[tuple[int, ...] | None, ...] | str = (),
    weight: bool = False,
    bias: bool = False,
    edit: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Call:
    """One call. modulation: shapes of gate, scale and shift without their last axis (None: absent), or "chunks"."""
    draw = Draw(dtype, device, vectors)
    hidden, update = (draw.hidden(shape, layout) for layout in layouts)
    if edit is not None:
        edit(hidden)
    width = shape[-1]
    if isinstance(modulation, str):
        given: tuple[Tensor | None, ...] = draw.chunks(6, shape[0], width)[2:5]
    else:
        given = tuple(None if size is None else draw.vector(*size, width) for size in modulation)
    if weight:
        options["weight"] = draw.vector(width)
    if bias:
        options["bias"] = draw.vector(width)
    return Call((hidden, update, *given), options)


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    triple: dict[str, Any] = {"modulation": ((B,),) * 3}
    return (
        case("adaln-zero", modulation="chunks"),
        case("sum and layer norm", weight=True, bias=True, eps=1e-5),
        case("sum and rms norm", kind="rms", weight=True),
        case("width 1152", shape=(B, 1, 1152), **triple),
        case("float32 vectors", vectors="float32", weight=True, bias=True, **triple),
        case("by token", modulation=((B, N),) * 3),
        case("mixed shapes", modulation=((B, 1), (1, N), ()), kind="rms"),
        case("without a gate", modulation=(None, (B,), (B,))),
        case("gate alone", modulation=((B,),)),
        case("mean far off", edit=far_off, **triple),
        case("NaN", edit=one_nan, **triple),
        case("rows with gaps", layouts=("gaps", "swapped"), **triple),
        case("size 1", shape=(B, N, 1), **triple),
        case("size 123", shape=(B, N, 123), weight=True, **triple),
        case("size 4097", shape=(1, 2, 4097), modulation=((1,),) * 3),
        case("empty batch", shape=(0, N, D), modulation=((0,),) * 3),
        case("empty sample", shape=(B, 0, D), **triple),
    )
