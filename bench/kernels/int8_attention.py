"""`int8_attention`: heads as parts of a fused projection against torch's attention, and torch.compile.

The peer is `scaled_dot_product_attention` in bfloat16 (flash attention where the GPU has it) on permuted views, and the
copy that puts the heads of a token side by side again. Its error is told beside ours. None on a processor: there it is
`attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vivace.bench import device
from vivace.bench.harness import Claim
from vivace.bench.kernels.attention import eager
from vivace.errors import BackendError
from vivace.kernels.attention import attention
from vivace.kernels.int8_attention import SPEC, int8_attention
from vivace.kernels.spec import REFERENCE, error_of, within_tolerance

SEED = 7
CHECKED = 256  # queries compared with float64
# name -> (batch, heads, tokens, width)
QUICK = {
    "DiT-XL/2, 256": (2, 16, 256, 72),
    "DiT-XL/2, 512": (2, 16, 1024, 72),
    "DiT-XL/2, 1024": (2, 16, 4096, 72),
    "SD3": (2, 24, 4096, 64),
    "FLUX.1": (1, 24, 4608, 128),
}
CASES = QUICK | {"DiT-B/2 x2": (2, 12, 256, 64), "Wan 2.1": (1, 12, 8192, 128)}
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times on the shapes of known models."""
    if not device.present():
        return []
    with torch.inference_mode():
        return [row for case, shape in (QUICK if quick else CASES).items() for row in case_rows(case, shape, quick)]


def inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, views of one projection [B, N, 3, H, K]; keys of a mean as large as their deviation."""
    batch, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(SEED)
    fused = torch.randn(batch, tokens, 3, heads, width, generator=generator)
    fused[:, :, 1] += torch.randn(heads, width, generator=generator)
    query, key, value = fused.to(device.PLACE, torch.bfloat16).unbind(2)
    return query, key, value


def case_rows(case: str, shape: tuple[int, int, int, int], quick: bool) -> list[dict[str, Any]]:
    """One row a way of computing, checked first, timed together."""
    backend, heads = device.backend(SPEC), inputs(shape)
    work = device.Work(
        SPEC.name, case, backend, lambda: int8_attention(*heads, backend=backend), eager, heads, shape, "bfloat16",
        SPEC.bytes_moved(*heads), SPEC.flops(*heads), check(heads, backend),
    )  # fmt: skip
    return device.rows(work, quick)


def check(heads: tuple[Tensor, Tensor, Tensor], backend: str) -> dict[str, Any]:
    """Errors of some queries of one sample: ours against the definition, both against attention in float64.

    Raises: BackendError beyond the tolerance rule.
    """
    query, key, value = (tensor[:1] for tensor in heads)
    query = query[:, :CHECKED]
    wide = [tensor.double() for tensor in (query, key, value)]
    ours, defined = (int8_attention(query, key, value, backend=name) for name in (backend, REFERENCE))
    holds, error, bound = within_tolerance(ours, defined, int8_attention(*wide, backend=REFERENCE))
    if not holds:
        raise BackendError(f"bench {SPEC.name}: error {error:.3g} of {backend} exceeds {bound:.3g}; nothing was timed")
    exact = attention(*wide, backend=REFERENCE)
    errors = [[error_of(found, exact)] for found in (ours, eager(query, key, value))]
    return {"error_to_definition": [error], "error_to_float64": errors[0], "eager_error_to_float64": errors[1]}
