"""8-bit numbers: x is about scale * code, codes in [-most, most].

int8  code = x / scale rounded to the nearest integer, half to even; most 127
fp8   code = x / scale as float8_e4m3fn (3 bits of mantissa); most 448
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.errors import ArgumentError

MOST = {"int8": 127.0, "fp8": 448.0}


def most_of(format: str) -> float:
    """The largest code of a format. Raises ArgumentError."""
    if format not in MOST:
        raise ArgumentError(f"format {format!r} is unknown; use {' or '.join(MOST)}")
    return MOST[format]


def codes(x: Tensor, scale: Tensor, format: str) -> Tensor:
    """clamp(x / scale), rounded to a code, as float32; `scale` broadcasts over x."""
    most = most_of(format)
    values = (x / scale).clamp_(-most, most)
    return values.round_() if format == "int8" else values.to(torch.float8_e4m3fn).float()


def fake(x: Tensor, scale: Tensor, format: str) -> Tensor:
    """scale * code(x / scale): what x is after it went through 8 bits, float32."""
    return codes(x, scale, format).mul_(scale)


def stored(values: Tensor, format: str) -> Tensor:
    """Codes as they are kept: int8 or float8_e4m3fn."""
    return values.to(torch.int8 if format == "int8" else torch.float8_e4m3fn)


def scale_of(largest: Tensor, format: str) -> Tensor:
    """largest / most, 1 where that is 0: `largest` is what becomes the largest code."""
    scale = largest / most_of(format)
    return torch.where(scale > 0, scale, 1.0)


def token_scale(x: Tensor, format: str) -> Tensor:
    """A scale for every row of x [..., K], from its largest number: [..., 1]."""
    return scale_of(x.abs().amax(-1, keepdim=True), format)
