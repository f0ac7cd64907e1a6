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
    """`vivace.kernels.linear`: bias, activation, gate and residual in the product's own pass."""

    gated = True

    def __init__(self, device: torch.device) -> None:
        self.how = "vivace.kernels.linear"
        self.packs = device.type == "cpu"

    def prepare(self, layer: nn.Linear) -> Layer:
        """The layer, its weight packed once on the CPU."""
        from vivace.kernels.linear import linear, pack_weight

        return _OurLayer(linear, pack_weight(layer.weight) if self.packs else layer.weight, layer.bias)


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
