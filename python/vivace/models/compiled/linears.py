"""Linear layers of a fixed sequence: torch's, or ours, behind one call.

A row's bits must not depend on the number of rows. Where a library picks its kernel by that number, it is handed whole
multiples of 16 rows (see `rowwise`), which is why rows of hidden states are kept with their padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vivace.kernels.gelu import gelu
from vivace.kernels.gelu.reference import gelu as plain_gelu
from vivace.kernels.int8_linear import int8_linear
from vivace.kernels.int8_norm_modulate import int8_norm_modulate
from vivace.kernels.norm_modulate import norm_modulate
from vivace.kernels.quantize_tokens import quantize_tokens
from vivace.kernels.spec import CPU, missing
from vivace.models.quantized.layers import packed_weight
from vivace.models.quantized.weights import QuantizedLayer

ACTIVATIONS = {None: "none", "tanh": "gelu_tanh", "none": "gelu"}  # `approximate` of a GELU -> name in kernels.linear


class Rows(NamedTuple):
    """One memory seen twice: `padded` [P, K], P a multiple of 16, and `tokens` [R, N, K], the rows that count."""

    padded: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, padded: Tensor, rows: int, tokens: int) -> Rows:
        """The two views of [P, K]."""
        return cls(padded, padded[: rows * tokens].view(rows, tokens, padded.shape[1]))

    def like(self, padded: Tensor) -> Rows:
        """Another memory [P, M] with the same rows."""
        return Rows.of(padded, *self.tokens.shape[:2])


class Then(NamedTuple):
    """What follows a product: a GELU, then residual + gate * result.

    approximate: "tanh" | "none" of the GELU, None without one; gate [R, M] and residual, which may be the output: of
    linears that are `gated`.
    """

    approximate: str | None = None
    gate: Tensor | None = None
    residual: Rows | None = None


PLAIN = Then()


class Layer(Protocol):
    """act(x W^T + b) of one prepared layer."""

    def __call__(self, x: Rows, out: Rows, then: Then = PLAIN) -> Rows:
        """The result, in `out` where the library can write there, else in memory of its own."""
        ...


class Linears(Protocol):
    """Prepares the layers of a network. gated: its layers take a gate and a residual; how: for the receipt."""

    gated: bool
    how: str

    def prepare(self, layer: nn.Linear) -> Layer:
        """The layer with its weights as the library wants them."""
        ...


class TorchLinears:
    """Linears of torch: prepacked oneDNN products on the CPU where it has them, `addmm` (cuBLAS on CUDA) elsewhere."""

    gated = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.packs = device.type == "cpu" and packable(dtype)
        self.how = "torch, oneDNN prepacked" if self.packs else "torch"

    def prepare(self, layer: nn.Linear) -> Layer:
        """The layer, its weight reordered once where oneDNN runs it."""
        return _PackedLayer(layer) if self.packs else _PlainLayer(layer)


class OurLinears:
    """`vivace.kernels.linear`: bias, activation, gate and residual in the product's own pass.

    dtype: of the weights and of x; None: that of the layer.
    """

    gated = True

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.how = "vivace.kernels.linear"
        self.packs, self.dtype = device.type == "cpu", dtype

    def prepare(self, layer: nn.Linear) -> Layer:
        """The layer, its weight packed once on the CPU."""
        from vivace.kernels.linear import linear, pack_weight

        weight: Tensor = layer.weight.detach()
        bias: Tensor | None = layer.bias
        if self.dtype is not None and self.dtype != weight.dtype:
            weight, bias = weight.to(self.dtype), None if bias is None else bias.detach().float()
        packs = self.packs and weight.dtype in (torch.float32, torch.bfloat16)
        return _OurLayer(linear, pack_weight(weight) if packs else weight, bias)


class EightBits(NamedTuple):
    """Rows in 8 bits: numbers [R, N, K] and a float32 scale a row [R, N]."""

    numbers: Tensor
    scale: Tensor


class QuantizedProduct:
    """One linear on 8-bit weights, and what makes its input: our int8 ops, or those of fp8.

    bias: the model's. A row's scale is its own, or the one given for its sample, `given` float32 [R].
    """

    def __init__(self, layer: QuantizedLayer, bias: Tensor | None) -> None:
        self.layer, self.bias = layer, None if bias is None else bias.detach().float()
        self.int8 = layer.weight.dtype == torch.int8
        self.quantize: Callable[..., tuple[Tensor, Tensor]] = quantize_tokens
        self.product: Callable[..., Tensor] = int8_linear
        self.weight: Any = layer.weight
        if not self.int8:
            from vivace.kernels.fp8_linear import fp8_linear
            from vivace.kernels.fp8_quantize_tokens import fp8_quantize_tokens

            self.quantize, self.product = fp8_quantize_tokens, fp8_linear
        elif layer.weight.device.type == "cpu" and missing(CPU) is None:
            self.weight = packed_weight(layer)

    def normed(self, hidden: Tensor, scale: Tensor, shift: Tensor, eps: float, given: Tensor | None) -> EightBits:
        """norm(hidden) * (1 + scale) + shift in 8 bits."""
        if not self.int8:
            return self.quantized(norm_modulate(hidden, scale, shift, eps=eps), given)
        made = int8_norm_modulate(hidden, scale, shift, eps=eps, smooth=self.layer.smooth, x_scale=self._given(given))
        return EightBits(*made)

    def quantized(self, x: Tensor, given: Tensor | None) -> EightBits:
        """x [R, N, K] in 8 bits."""
        return EightBits(*self.quantize(x, smooth=self.layer.smooth, scale=self._given(given)))

    def _given(self, given: Tensor | None) -> Tensor | None:
        return None if self.layer.x_scale is None else given

    def __call__(self, x: EightBits, out: Rows, then: Then = PLAIN) -> Rows:
        """residual + gate * act(x W^T + bias) of the rows that count."""
        self.product(
            x.numbers,
            self.weight,
            x.scale,
            self.layer.weight_scale,
            self.bias,
            activation=ACTIVATIONS[then.approximate],
            gate=then.gate,
            residual=None if then.residual is None else then.residual.tokens,
            out=out.tokens,
        )
        return out


def packable(dtype: torch.dtype) -> bool:
    """oneDNN has packed products of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    bfloat16, float16 = (getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported") for kind in ("bf16", "fp16"))
    asked = {torch.float32: lambda: True, torch.bfloat16: bfloat16, torch.float16: float16}
    return dtype in asked and bool(asked[dtype]())


def activate(x: Tensor, approximate: str) -> None:
    """GELU in place; float16, which the op does not take, by its definition."""
    call: Callable[..., Any] = plain_gelu if x.dtype == torch.float16 else gelu
    call(x, approximate=approximate, out=x)


class _PackedLayer:
    """One layer in oneDNN's own order of weights; GELU is part of the product."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()), layer.bias

    def __call__(self, x: Rows, out: Rows, then: Then = PLAIN) -> Rows:
        kind = ("none", "") if then.approximate is None else ("gelu", then.approximate)
        product = torch.ops.mkldnn._linear_pointwise
        return out.like(product(x.padded, self.weight, self.bias, kind[0], [], kind[1]))


class _PlainLayer:
    """One layer as it is, by `addmm` into memory that is there."""

    def __init__(self, layer: nn.Linear) -> None:
        self.weight, self.bias = layer.weight.detach().t(), layer.bias

    def __call__(self, x: Rows, out: Rows, then: Then = PLAIN) -> Rows:
        if self.bias is None:
            torch.mm(x.padded, self.weight, out=out.padded)
        else:
            torch.addmm(self.bias, x.padded, self.weight, out=out.padded)
        if then.approximate is not None:
            activate(out.tokens, then.approximate)
        return out


class _OurLayer:
    """One layer of ours, on the rows that count."""

    def __init__(self, linear: Callable[..., Tensor], weight: Any, bias: Tensor | None) -> None:
        self.linear, self.weight, self.bias = linear, weight, bias

    def __call__(self, x: Rows, out: Rows, then: Then = PLAIN) -> Rows:
        self.linear(
            x.tokens,
            self.weight,
            self.bias,
            activation=ACTIVATIONS[then.approximate],
            gate=then.gate,
            residual=None if then.residual is None else then.residual.tokens,
            out=out.tokens,
        )
        return out
