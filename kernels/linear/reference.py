"""The definition of `linear`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vivace.kernels.linear.packed import PackedWeight


def linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * act(x W^T + bias), each that is None left out."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    matrix = weight.unpack() if isinstance(weight, PackedWeight) else weight
    y = epilogue(product(x.to(wide), matrix.to(wide)), bias, activation, gate, residual)
    return y.to(out_dtype or x.dtype) if out is None else out.copy_(y)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x W^T, sample by sample: the bits of torch's product depend on the number of rows."""
    if x.dim() == 1:
        return functional.linear(x, matrix)
    return torch.stack([functional.linear(sample, matrix) for sample in x])


def epilogue(y: Tensor, bias: Tensor | None, activation: str, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual + gate * act(y + bias) in the dtype of y."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = activated(y, activation)
    if gate is not None:
        y = y * beside(gate, y)
    return y if residual is None else residual.to(y.dtype) + y


def activated(y: Tensor, activation: str) -> Tensor:
    """GELU by the error function or its approximation, y / (1 + exp(-y)), or y."""
    if activation == "silu":
        return functional.silu(y)
    if activation == "none":
        return y
    return functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def beside(gate: Tensor, y: Tensor) -> Tensor:
    """A gate [N], [B, N], [B, tokens, N] or of the rank of y, in its dtype and so that it multiplies y."""
    if gate.dim() not in (1, y.dim()):
        batch, columns = y.shape[0] if y.dim() > 1 else 1, y.shape[-1]
        by_token = gate[:, None] if gate.dim() == 2 else gate
        gate = by_token.expand(batch, y.numel() // (batch * columns), columns).reshape(y.shape)
    return gate.to(y.dtype)
