"""`attention`: heads as parts of a fused projection, as DiT blocks have them, against torch's attention and its copies.

The peer is what `models/dit.py` runs: permuted views of the projection, `scaled_dot_product_attention`, and the copy
that puts the heads of a token side by side again. Where half the tokens ask keys that were kept, it copies those of its
lanes first. Floor: the flops of both products at the rate of our packed linear, 256 x 1024 x 1024, measured in the same
rounds; on a GPU as `bench.device` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vivace.bench import device
from vivace.bench.harness import Candidate, Claim, Timing, interleave
from vivace.errors import BackendError
from vivace.kernels.attention import SPEC, attention
from vivace.kernels.linear import linear, pack_weight
from vivace.kernels.spec import error_of, missing, within_tolerance

SEED = 7
CHECKED = 64  # queries compared with float64
# name -> (batch, heads, tokens, width)
QUICK = {
    "emoji": (1, 6, 64, 32),
    "emoji x2": (2, 6, 64, 32),
    "DiT-S/2 x2": (2, 6, 256, 64),
    "DiT-B/2": (1, 12, 256, 64),
    "DiT-B/2 x2": (2, 12, 256, 64),
    "DiT-XL/2": (1, 16, 256, 72),
}
KEPT = {"DiT-XL/2, half of 256": (1, 16, 256, 72), "DiT-S/2 x2, half of 256": (2, 6, 256, 64)}
CASES = QUICK | {"DiT-XL/2, 512": (1, 16, 1024, 72), "SD3": (1, 24, 4096, 64)}
DTYPES = (torch.float32, torch.bfloat16)
LINEAR = (256, 1024, 1024)
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(query: Tensor, key: Tensor, value: Tensor, lanes: Tensor | None = None) -> Tensor:
    """As a block writes it. [B, N, H, K] -> [B, N, H, K], contiguous."""
    if lanes is not None:
        key, value = key[lanes], value[lanes]
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*heads).transpose(1, 2).contiguous()


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times on the shapes of known models."""
    if not device.present() and (reason := missing("cpu")) is not None:
        raise BackendError(f"bench attention: {reason}")
    with torch.inference_mode():
        problems = [
            (case, made(shape, dtype))
            for made, cases in ((inputs, QUICK if quick else CASES), (kept, KEPT))
            for case, shape in cases.items()
            for dtype in DTYPES
        ]
        return [row for case, heads in problems for row in case_rows(case, heads, quick)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, views of one projection [B, N, 3, H, K]."""
    batch, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(SEED)
    query, key, value = torch.randn(batch, tokens, 3, heads, width, generator=generator).to(dtype).unbind(2)
    return query, key, value


def kept(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries of half the tokens; keys and values [K | V] in lanes of memory, one more than there are samples."""
    batch, heads, tokens, width = shape
    query = inputs((batch, heads, tokens // 2, width), dtype)[0]
    memory = torch.randn(batch + 1, tokens, 2, heads, width, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    return query, *memory.unbind(2), torch.arange(batch, 0, -1)


def attend(heads: tuple[Tensor, ...], backend: str) -> Tensor:
    """Ours; a fourth tensor is the lanes."""
    return attention(*heads[:3], lanes=heads[3] if len(heads) > 3 else None, backend=backend)


def case_rows(case: str, heads: tuple[Tensor, ...], quick: bool) -> list[dict[str, Any]]:
    """One row a way of computing, checked first, timed together; on the GPU where there is one."""
    if device.present():
        heads, backend = tuple(tensor.to(device.PLACE) for tensor in heads), device.backend(SPEC)
        work = device.Work(
            SPEC.name, case, backend, lambda: attend(heads, backend), eager, heads, tuple(heads[0].shape),
            str(heads[0].dtype)[6:], SPEC.bytes_moved(*heads[:3]), SPEC.flops(*heads[:3]), check(heads, backend),
        )  # fmt: skip
        return device.rows(work, quick)
    dtype = heads[0].dtype
    told = check(heads, "cpu") | {"case": case, "shape": list(heads[0].shape), "dtype": str(dtype)[6:]}
    rows, depth, columns = LINEAR
    x, weight = torch.ones(rows, depth, dtype=dtype), pack_weight(torch.ones(columns, depth, dtype=dtype))
    candidates = {
        "cpu": Candidate(lambda: attend(heads, "cpu")),
        "eager": Candidate(lambda: eager(*heads)),
        "linear": Candidate(lambda: linear(x, weight, backend="cpu")),
    }
    times = interleave(candidates, seconds=0.5 if quick else 2.0)
    return [describe(name, heads, times) | told for name in ("cpu", "eager")]


def describe(backend: str, heads: tuple[Tensor, ...], times: Mapping[str, Timing]) -> dict[str, Any]:
    """One row of the report; a ratio above 1 means faster than the peer."""
    ms, computed = times[backend].median, SPEC.flops(*heads[:3])
    rows, depth, columns = LINEAR
    peak = 2 * rows * depth * columns / times["linear"].median / 1e6
    return {
        "op": SPEC.name, "backend": backend, "ms": times[backend].to_dict(), "floor_ms": computed / peak / 1e6,
        "flops": computed, "gflop_per_s": computed / ms / 1e6, "roofline": "packed linear",
        "roofline_gflop_per_s": peak, "percent_of_roofline": 100 * computed / ms / 1e6 / peak,
        "over_eager": times["eager"].median / ms, "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


def check(heads: tuple[Tensor, ...], backend: str) -> dict[str, Any]:
    """Errors of some queries against float64, ours and the peer's. Raises BackendError beyond the rule."""
    query, key, value, *lanes = (tensor.double() if tensor.is_floating_point() else tensor for tensor in heads)
    exact = attend((query[:, :CHECKED], key, value, *lanes), "reference")
    ours, theirs = attend(heads, backend)[:, :CHECKED], eager(*heads)[:, :CHECKED]
    holds, error, bound = within_tolerance(ours, theirs, exact)
    if not holds:
        raise BackendError(f"bench attention: error {error:.3g} of {backend} exceeds {bound:.3g}; nothing was timed")
    return {"error_to_float64": [error], "eager_error_to_float64": [error_of(theirs, exact)]}
