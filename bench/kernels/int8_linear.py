"""`int8_linear`: the linears of DiT blocks against what torch runs for quantized modules.

Floor: bytes read and written once, at copy bandwidth; where the product is bound by arithmetic, TFLOP/s say more. On a
processor rows of `bench.int8_linears` follow: all of a linear in one call against bare products, over the rate of dot
products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vivace.bench import device, int8_linears
from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.kernels.int8_linear import SPEC

# name -> (rows of x, N, K, activation)
QUICK: dict[str, tuple[int, int, int, str]] = {
    "DiT-XL/2 x2, qkv": (512, 3456, 1152, "none"),
    "DiT-XL/2 x2, up": (512, 4608, 1152, "gelu_tanh"),
    "DiT-XL/2 x2, down": (512, 1152, 4608, "none"),
}
CASES = QUICK | {
    "DiT-B/2 x2, up": (512, 3072, 768, "gelu_tanh"),
    "DiT-XL/2 x32, up": (8192, 4608, 1152, "gelu_tanh"),
    "FLUX.1 x1, up": (4608, 12288, 3072, "gelu_tanh"),
}
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor, *, activation: str) -> Tensor:
    """As quantized modules write it: the integer product, then scales, bias and activation in passes of their own."""
    y = torch._int_mm(x, weight.T).float() * x_scale[:, None] * weight_scale + bias
    return (functional.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y).to(torch.bfloat16)


def inputs(rows: int, columns: int, depth: int) -> tuple[Tensor, ...]:
    """x, weight, both scales, bias: results of about unit size."""
    generator = torch.Generator().manual_seed(calls.SEED)
    x, weight = (
        torch.randint(-127, 128, (size, depth), generator=generator, dtype=torch.int8) for size in (rows, columns)
    )
    x_scale, weight_scale = (torch.rand(size, generator=generator) / 73.0 for size in (rows, columns))
    return x, weight, x_scale, weight_scale / depth**0.5, torch.randn(columns, generator=generator)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, (count, columns, depth, activation) in (QUICK if quick else CASES).items():
        options = {"activation": activation}
        problem = calls.Problem(SPEC, case, inputs(count, columns, depth), partial(eager, **options), options)
        found += calls.rows(problem, quick)
    if not device.present():
        shapes = int8_linears.all_shapes(quick, torch.get_num_threads(), (512,) if quick else int8_linears.ROWS)
        found += [row for one in shapes.values() for row in one.rows]
    return found
