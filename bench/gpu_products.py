"""The products of DiT-XL/2 at 4,096 tokens on a GPU, in 8 bits and in bfloat16, against what torch runs.

"bare" is the library's product alone, "eager" with what follows it in passes of its own, "torch.compile" the compiled
form of those. Ours does all of it. `percent_of_peak`: of the dense rate in the vendor's data sheet, where it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vivace.bench import device
from vivace.bench.compiling import compiled_peer
from vivace.bench.harness import Claim, Timing
from vivace.bench.peers import absent
from vivace.errors import BackendError
from vivace.kernels.fp8_linear import fp8_linear
from vivace.kernels.fp8_quantize_tokens import fp8_quantize_tokens
from vivace.kernels.int8_linear import int8_linear
from vivace.kernels.linear import linear
from vivace.kernels.quantize_tokens import quantize_tokens
from vivace.kernels.spec import REFERENCE, within_tolerance

SEED = 7
SECONDS = 0.5  # of device time of one table
CHECKED = 128  # rows compared with float64
PEAK_SHARE = 70.0  # percent of the dense rate in int8
# Dense rates in TFLOP/s, by a part of the device's name and dtype (data sheets of the SXM parts).
PEAKS: Mapping[str, Mapping[str, float]] = {
    "H100": {"int8": 1979.0, "fp8": 1979.0, "bfloat16": 989.0},
    "H200": {"int8": 1979.0, "fp8": 1979.0, "bfloat16": 989.0},
}
TOKENS, WIDTH = 8192, 1152  # a guided pair of 4,096
# name -> (N, K, activation, whether gate and residual follow)
PARTS: Mapping[str, tuple[int, int, str, bool]] = {
    "qkv": (3 * WIDTH, WIDTH, "none", False),
    "projection": (WIDTH, WIDTH, "none", True),
    "up": (4 * WIDTH, WIDTH, "gelu_tanh", False),
    "down": (WIDTH, 4 * WIDTH, "none", True),
}
QUANTIZE: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {"int8": quantize_tokens, "fp8": fp8_quantize_tokens}
OPS: Mapping[str, Callable[..., Tensor]] = {"int8": int8_linear, "fp8": fp8_linear, "bfloat16": linear}


class Layer:
    """One linear of a block: its numbers on the device, and every way to compute it."""

    def __init__(self, part: str, dtype: str) -> None:
        self.columns, self.depth, self.activation, follows = PARTS[part]
        self.dtype = dtype
        generator = torch.Generator().manual_seed(SEED)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        hidden, weight = draw(2, TOKENS // 2, self.depth), draw(self.columns, self.depth) / self.depth**0.5
        self.bias = draw(self.columns).to(device.PLACE)
        self.gate = draw(2, self.columns).to(device.PLACE) if follows else None
        self.residual = draw(2, TOKENS // 2, self.columns).to(device.PLACE, torch.bfloat16) if follows else None
        self.hidden = hidden.to(device.PLACE, torch.bfloat16)
        self.numbers: tuple[Tensor, ...] = self.hidden, weight.to(device.PLACE, torch.bfloat16)
        if dtype in QUANTIZE:
            x, x_scale = QUANTIZE[dtype](self.hidden)
            w, w_scale = QUANTIZE[dtype](weight.to(device.PLACE))
            self.numbers = x, w, x_scale, w_scale

    def ours(self, rows: slice = slice(None), backend: str | None = None, wide: bool = False) -> Tensor:
        """Everything in one call, of some tokens; wide: in float64."""
        first, *others = self.numbers
        residual = None if self.residual is None else self.residual[:, rows]
        arguments = [first[:, rows], *others]
        if self.dtype in QUANTIZE:
            arguments[2] = arguments[2][:, rows]
        options = {"gate": self.gate, "residual": residual}
        if wide:
            arguments = [tensor.double() if tensor.itemsize > 1 else tensor for tensor in arguments]
            options = {name: None if tensor is None else tensor.double() for name, tensor in options.items()}
        bias = self.bias.double() if wide else self.bias
        return OPS[self.dtype](*arguments, bias, activation=self.activation, **options, backend=backend)

    def bare(self) -> Tensor:
        """The product alone, as the library gives it."""
        x, weight = (tensor.flatten(0, -2) for tensor in self.numbers[:2])
        if self.dtype == "int8":
            return torch._int_mm(x, weight.T)
        if self.dtype == "fp8":
            scales = self.numbers[2].reshape(-1, 1), self.numbers[3][None]
            return torch._scaled_mm(x, weight.T, *scales, out_dtype=torch.bfloat16)
        return functional.linear(x, weight)

    def eager(self) -> Tensor:
        """As modules write it."""
        y = self.bare().view(2, TOKENS // 2, self.columns).float()
        if self.dtype == "int8":
            y = y * self.numbers[2][..., None] * self.numbers[3]
        y = y + self.bias
        if self.activation == "gelu_tanh":
            y = functional.gelu(y, approximate="tanh")
        if self.gate is not None and self.residual is not None:
            y = self.residual + self.gate[:, None] * y
        return y.to(torch.bfloat16)

    def quantized_here(self) -> Tensor:
        """The activations quantized first, then everything."""
        q, scale = QUANTIZE[self.dtype](self.hidden)
        options = {"activation": self.activation, "gate": self.gate, "residual": self.residual}
        return OPS[self.dtype](q, self.numbers[1], scale, self.numbers[3], self.bias, **options)

    def check(self) -> float:
        """Error of some rows against float64. Raises BackendError beyond the tolerance rule."""
        rows = slice(0, CHECKED)
        ours, exact = self.ours(rows), self.ours(rows, REFERENCE, wide=True)
        holds, error, bound = within_tolerance(ours, self.ours(rows, REFERENCE), exact)
        if not holds:
            raise BackendError(f"bench products: {self.dtype} errs by {error:.3g}, more than {bound:.3g}; not timed")
        return error


def products() -> Iterator[list[dict[str, Any]]]:
    """A table a linear and dtype."""
    for dtype in OPS:
        for part in PARTS:
            with torch.inference_mode():
                yield table(part, dtype)


def table(part: str, dtype: str) -> list[dict[str, Any]]:
    """Every way of one linear, checked first, timed together."""
    layer = Layer(part, dtype)
    told = {"op": f"{dtype}_linear", "case": f"DiT-XL/2 4096 {part}", "dtype": dtype, "error": layer.check()}
    calls: dict[str, Callable[[], Any]] = {"vivace": layer.ours, "bare": layer.bare, "eager": layer.eager}
    if dtype in QUANTIZE:
        calls["vivace, quantized here"] = layer.quantized_here
    reasons = dict[str, str]()
    compiled, reason = compiled_peer(layer.eager, ())
    if compiled is not None:
        calls["torch.compile"] = compiled
    elif reason is not None:
        reasons["torch.compile"] = reason
    if dtype == "int8":
        torchao, reason = torchao_int8(layer)
        if torchao is not None:
            calls["torchao int8"] = torchao
        elif reason is not None:
            reasons["torchao int8"] = reason
    times, captured = device.interleave(calls, seconds=SECONDS)
    work = 2 * TOKENS * layer.columns * layer.depth
    rows = [
        told | described(name, times, work, dtype) | {"by": "graph" if name in captured else "events"} for name in times
    ]
    return rows + [told | {"backend": name, "reason": reason} for name, reason in reasons.items()]


def torchao_int8(layer: Layer) -> tuple[Callable[[], Any] | None, str | None]:
    """torchao's linear, activations quantized by token in the call, compiled; and why there is none."""
    if (reason := absent("torchao")) is not None:
        return None, reason
    try:
        quantization = import_module("torchao.quantization")
        module = torch.nn.Linear(layer.depth, layer.columns, device=device.PLACE, dtype=torch.bfloat16)
        quantization.quantize_(module, quantization.Int8DynamicActivationInt8WeightConfig())
        return compiled_peer(module, (layer.hidden,))
    except (ImportError, RuntimeError, ValueError, AttributeError, AssertionError) as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"


def described(name: str, times: Mapping[str, Timing], work: float, dtype: str) -> dict[str, Any]:
    """A row of the report; ratios above 1: faster than the peer."""
    ms, peak = times[name].median, peak_of(device.name(), dtype)
    told: dict[str, Any] = {"backend": name, "ms": times[name].to_dict(), "tflop_per_s": work / ms / 1e9, "seed": SEED}
    told["percent_of_peak"] = None if peak is None else 100 * work / ms / 1e9 / peak
    for peer in ("bare", "eager", "torch.compile", "torchao int8"):
        told[f"over_{peer.removeprefix('torch.').replace(' ', '_')}"] = (
            times[peer].median / ms if peer in times else None
        )
    return told


def peak_of(name: str, dtype: str) -> float | None:
    """The dense rate of a device in TFLOP/s; None where it is not known."""
    return next((rates[dtype] for part, rates in PEAKS.items() if part in name), None)


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Share of the dense int8 rate that ours reaches, the epilogue included: geometric mean of the linears."""
    ours = [row for row in rows if row["backend"] == "vivace" and row["dtype"] == "int8"]
    shares = [row["percent_of_peak"] for row in ours if row.get("percent_of_peak") is not None]
    how = f"{len(shares)} linears of DiT-XL/2 at 4,096 tokens, a guided pair, graphs with cold caches, medians"
    if len(shares) < len(PARTS):
        return [
            Claim("gpu.int8_percent_of_peak", ">=", PEAK_SHARE, "not all linears were timed, or the peak is unknown")
        ]
    value = math.exp(sum(map(math.log, shares)) / len(shares))
    return [Claim("gpu.int8_percent_of_peak", ">=", PEAK_SHARE, how, value, n=len(shares))]
