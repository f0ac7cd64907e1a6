"""Inputs that `norm_modulate` is tested and timed on; the other ops over rows of hidden states build theirs alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16")
B, N, D = 2, 3, 384
SHAPE = (B, N, D)


class Draw:
    """Unit normals of one seed; vectors are a third of that, in the dtype of hidden unless `vectors` names one."""

    def __init__(self, dtype: str, device: str, vectors: str | None = None) -> None:
        self.generator = torch.Generator().manual_seed(11)
        self.device, self.dtype = device, getattr(torch, dtype)
        self.vectors = self.dtype if vectors is None or dtype == "float64" else getattr(torch, vectors)

    def hidden(self, shape: tuple[int, ...], layout: str = "plain") -> Tensor:
        """[B, N, D]: "plain"; "gaps": between rows; "swapped": tokens outermost; "offset": not aligned."""
        batch, tokens, width = shape
        values = torch.randn(shape, generator=self.generator).to(self.device, self.dtype)
        if layout == "plain":
            return values
        if layout == "swapped":
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        room = values.new_full((batch, tokens + 1, width + 5), math.nan)
        return room[:, 1:, 3 : 3 + width].copy_(values)

    def vector(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator) / 3).to(self.device, self.vectors)

    def chunks(self, count: int, batch: int, width: int) -> tuple[Tensor, ...]:
        """[B, 1, D] views of one fused projection, as adaptive layers hand them on."""
        return self.vector(batch, count, width).chunk(count, dim=1)


def make(
    dtype: str,
    device: str,
    *,
    shape: tuple[int, int, int] = SHAPE,
    layout: str = "plain",
    vectors: str | None = None,
    modulation: tuple[int, ...] | str | None = None,
    weight: bool = False,
    bias: bool = False,
    edit: Callable[[Tensor], None] | None = None,
    out: str | None = None,
    **options: Any,
) -> Call:
    """One call. modulation: shape of scale and shift without its last axis, "chunks", or None; out: dtype to write."""
    draw = Draw(dtype, device, vectors)
    hidden = draw.hidden(shape, layout)
    if edit is not None:
        edit(hidden)
    width = shape[-1]
    if modulation == "chunks":
        scale, shift = draw.chunks(6, shape[0], width)[1:3]
        args: tuple[Any, ...] = (hidden, scale, shift)
    elif modulation is not None:
        args = (hidden, draw.vector(*modulation, width), draw.vector(*modulation, width))
    else:
        args = (hidden,)
    if weight:
        options["weight"] = draw.vector(width)
    if bias:
        options["bias"] = draw.vector(width)
    if out is None:
        return Call(args, options)
    return Call(args, options | {"out": Draw(out if dtype != "float64" else dtype, device).hidden(shape, layout)})


def far_off(hidden: Tensor) -> None:
    """A mean of a thousand deviations, as far as the dtype holds both."""
    hidden.add_(1000.0 if hidden.dtype != torch.bfloat16 else 40.0)


def outliers(hidden: Tensor) -> None:
    """Two channels hold thousands of times what the others hold, the first among them."""
    hidden[..., 0] *= 3000.0
    hidden[..., -1] -= 5000.0


def one_nan(hidden: Tensor) -> None:
    """One element of the last row."""
    hidden[-1, -1, -1] = math.nan


def one_infinity(hidden: Tensor) -> None:
    """One element of the first row."""
    hidden[0, 0, 5] = math.inf


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES)

    pair: dict[str, Any] = {"modulation": (B,)}
    return (
        case("adaln", modulation="chunks"),
        case("width 1152", shape=(B, 1, 1152), **pair),
        case("width 1000", shape=(B, N, 1000), **pair),
        case("float32 vectors", vectors="float32", weight=True, bias=True, **pair),
        case("scale and shift by token", modulation=(B, N)),
        case("scale and shift of all", modulation=(1, 1), weight=True),
        case("by token, of all samples", modulation=(1, N), kind="rms"),
        case("one vector", modulation=(), bias=True),
        case("layer norm", weight=True, bias=True, eps=1e-5),
        case("layer norm alone"),
        Case("bfloat16 of float32", partial(make, out="bfloat16", **pair), ("float32",)),
        Case("bfloat16 with gaps", partial(make, out="bfloat16", layout="gaps", shape=(B, N, 200)), ("float32",)),
        case("rms norm", kind="rms", weight=True),
        case("rms norm alone", kind="rms", eps=0.0),
        case("rms norm, modulated", kind="rms", weight=True, **pair),
        case("mean far off", edit=far_off, **pair),
        case("outliers", edit=outliers, **pair),
        case("NaN", edit=one_nan, **pair),
        case("infinity", edit=one_infinity, **pair),
        case("rows with gaps", layout="gaps", **pair),
        case("tokens outermost", layout="swapped", **pair),
        case("size 1", shape=(B, N, 1), **pair),
        case("size 123", shape=(B, N, 123), weight=True, **pair),
        case("size 4097", shape=(1, 2, 4097), modulation=(1,)),
        case("empty batch", shape=(0, N, D), modulation=(0,)),
        case("empty sample", shape=(B, 0, D), **pair),
    )
