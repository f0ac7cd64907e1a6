"""Inputs that `gated_residual` is tested and timed on."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from vivace.kernels.norm_modulate.cases import DTYPES, SHAPE, B, D, Draw, N
from vivace.kernels.spec import Call, Case


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int] = SHAPE,
    layouts: tuple[str, str] = ("plain", "plain"),
    vectors: str | None = None,
    gate: tuple[int, ...] | str | None = None,
    nan: bool = False,
) -> Call:
    """One call. gate: its shape without the last axis, "chunks", or None; nan: one in each of hidden and update."""
    draw = Draw(dtype, device, vectors)
    hidden, update = (draw.hidden(shape, layout) for layout in layouts)
    if nan:
        hidden[0, 0, 1] = update[-1, -1, -1] = math.nan
    if gate is None:
        return Call((hidden, update))
    if isinstance(gate, str):
        return Call((hidden, update, draw.chunks(6, shape[0], shape[-1])[2]))
    return Call((hidden, update, draw.vector(*gate, shape[-1])))


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    return (
        case("gated", gate="chunks"),
        case("plain sum"),
        case("width 1152", shape=(B, 1, 1152), gate=(B,)),
        case("float32 gate", vectors="float32", gate=(B,)),
        case("gate by token", gate=(B, N)),
        case("gate by token, of all samples", vectors="float32", gate=(1, N)),
        case("gate of all", gate=(1,)),
        case("one gate", gate=()),
        case("NaN", gate=(B,), nan=True),
        case("rows with gaps", layouts=("gaps", "plain"), gate=(B,)),
        case("tokens outermost", layouts=("swapped", "gaps"), gate=(B,)),
        case("size 1", shape=(B, N, 1), gate=(B,)),
        case("size 123", shape=(B, N, 123), gate=(B,)),
        case("size 4097", shape=(1, 2, 4097), gate=(1, 1)),
        case("empty batch", shape=(0, N, D), gate=(0,)),
        case("empty sample", shape=(B, 0, D), gate=(B,)),
    )
