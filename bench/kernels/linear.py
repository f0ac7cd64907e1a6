"""`linear`: the linears of DiT blocks against torch, oneDNN with its own packed weights, and the reference.

Floor: the floating operations of the product at the rate at which the processor multiplies and adds from registers and
its first-level cache, measured in the same rounds on the same threads. Ours and oneDNN's weights are packed beforehand,
as a network keeps them; eager torch packs at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vivace.bench import device
from vivace.bench.harness import Candidate, Claim, Timing, interleave
from vivace.bench.kernels import calls
from vivace.errors import BackendError
from vivace.kernels.linear import SPEC, linear, pack_weight
from vivace.kernels.spec import CPU, REFERENCE, missing

# name -> (rows of x, N, K, activation)
QUICK: dict[str, tuple[int, int, int, str]] = {
    "DiT-B/2 x1, qkv": (256, 2304, 768, "none"),
    "DiT-B/2 x1, up": (256, 3072, 768, "gelu_tanh"),
    "DiT-B/2 x1, down": (256, 768, 3072, "none"),
    "emoji x4, up": (256, 768, 192, "gelu_tanh"),
}
CASES = QUICK | {
    "DiT-B/2 x1, out": (256, 768, 768, "none"),
    "DiT-S/2 x2, qkv": (512, 1152, 384, "none"),
    "DiT-S/2 x2, up": (512, 1536, 384, "gelu_tanh"),
    "DiT-XL/2 x1, qkv": (256, 3456, 1152, "none"),
    "DiT-XL/2 x1, up": (256, 4608, 1152, "gelu_tanh"),
    "DiT-XL/2 x1, down": (256, 1152, 4608, "none"),
    "emoji x1, qkv": (64, 576, 192, "none"),
}
DTYPES = (torch.float32, torch.bfloat16)
FLOOR, ONEDNN = "products", "onednn packed"
STEPS = 50  # of products a timed call of the floor does
CLAIMS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {}


def eager(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str) -> Tensor:
    """As modules write it."""
    y = functional.linear(x, weight, bias)
    return y if activation == "none" else functional.gelu(y, approximate="tanh")


def inputs(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bias: results of about unit size."""
    generator = torch.Generator().manual_seed(calls.SEED)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((rows, depth), (columns, depth), (columns,)))
    return x.to(dtype), (weight / depth**0.5).to(dtype), bias.to(dtype)


def rows(quick: bool) -> list[dict[str, Any]]:
    """Times of every implementation on the shapes of known models."""
    found = []
    for case, (count, columns, depth, activation) in (QUICK if quick else CASES).items():
        options = {"activation": activation}
        for dtype in DTYPES:
            made = inputs(count, columns, depth, dtype)
            problem = calls.Problem(SPEC, case, made, partial(eager, **options), options)
            found += calls.rows(problem, quick) if device.present() else cpu_rows(problem, quick)
    return found


def cpu_rows(problem: calls.Problem, quick: bool) -> list[dict[str, Any]]:
    """One row a way of computing, checked first, timed together."""
    if (reason := missing(CPU)) is not None:
        raise BackendError(f"bench linear: {reason}")
    with torch.inference_mode():
        told = calls.check(problem)
        (x, weight, bias), activation = problem.inputs, str(problem.options["activation"])
        packed, wide = pack_weight(weight), bias.float()
        candidates = {
            CPU: Candidate(lambda: linear(x, packed, wide, activation=activation, backend=CPU)),
            "eager": Candidate(lambda: problem.eager(x, weight, bias)),
            REFERENCE: Candidate(lambda: linear(x, weight, bias, activation=activation, backend=REFERENCE)),
            FLOOR: Candidate(lambda: products(x.dtype)),
        }
        if torch.backends.mkldnn.is_available():
            candidates[ONEDNN] = Candidate(onednn(x, weight, bias, activation))
        times = interleave(candidates, seconds=0.5 if quick else 2.0)
    return [describe(problem, name, times) | told for name in times if name != FLOOR]


def products(dtype: torch.dtype) -> int:
    """Operations done by the floor; see csrc/ops/gemm.h."""
    from vivace import _C

    return _C.run_products(0 if dtype == torch.float32 else 1, STEPS, torch.get_num_threads())


def onednn(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Callable[[], Tensor]:
    """The product of oneDNN with a weight in its own order, the activation inside of it."""
    own: Any = torch.ops.mkldnn
    packed, kind = own._reorder_linear_weight(weight), ("none", "") if activation == "none" else ("gelu", "tanh")
    return lambda: own._linear_pointwise(x, packed, bias, kind[0], [], kind[1])


def describe(problem: calls.Problem, backend: str, times: Mapping[str, Timing]) -> dict[str, Any]:
    """One row of the report; ratios above 1 mean faster than the peer."""
    ms, (x, weight, _) = times[backend].median, problem.inputs
    work = 2 * x.numel() * len(weight)
    floor = times[FLOOR].median * work / products(x.dtype)
    return {
        "op": SPEC.name, "backend": backend, "case": problem.case, "shape": [*x.shape, len(weight)],
        "dtype": str(x.dtype)[6:], "ms": times[backend].to_dict(), "gflop_per_s": work / ms / 1e6, "floor_ms": floor,
        "percent_of_roofline": 100 * floor / ms, "over_eager": times["eager"].median / ms,
        "over_onednn": times[ONEDNN].median / ms if ONEDNN in times else None,
        "threads": torch.get_num_threads(), "seed": calls.SEED,
    }  # fmt: skip
