"""`fp8_linear`: the linears of DiT blocks against torch's product of 8-bit floats (`torch._scaled_mm`).

Floor: bytes read and written once, at copy bandwidth; where the product is bound by arithmetic, TFLOP/s say more. None
on a processor: fp8 runs on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vivace.bench import device
from vivace.bench.harness import Claim
from vivace.bench.kernels import calls
from vivace.bench.kernels.int8_linear import CASES, QUICK
from vivace.kernels.fp8_linear import SPEC

SPREAD = 100.0  # deviation of numbers within [-448, 448]
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor, *, activation: str) -> Tensor:
    """As quantized modules write it: product, scales and bias in one call, the activation in a pass of its own."""
    if x.is_cuda:
        scales = x_scale[:, None], weight_scale[None]
        y = torch._scaled_mm(x, weight.T, *scales, bias.to(torch.bfloat16), out_dtype=torch.bfloat16)
    else:
        y = ((x.float() @ weight.float().T) * x_scale[:, None] * weight_scale + bias).to(torch.bfloat16)
    return functional.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y


def inputs(rows: int, columns: int, depth: int) -> tuple[Tensor, ...]:
    """x, weight, both scales, bias: results of about unit size."""
    generator = torch.Generator().manual_seed(calls.SEED)

    def numbers(count: int) -> Tensor:
        drawn = torch.randn(count, depth, generator=generator) * SPREAD
        return drawn.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    x, weight = numbers(rows), numbers(columns)
    x_scale, weight_scale = (torch.rand(size, generator=generator) / SPREAD for size in (rows, columns))
    return x, weight, x_scale, weight_scale / depth**0.5, torch.randn(columns, generator=generator)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found: list[dict[str, Any]] = []
    if not device.present():
        return found
    for case, (count, columns, depth, activation) in (QUICK if quick else CASES).items():
        options = {"activation": activation}
        problem = calls.Problem(SPEC, case, inputs(count, columns, depth), partial(eager, **options), options)
        found += calls.rows(problem, quick)
    return found
