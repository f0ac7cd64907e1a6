"""The definition of `qk_norm_rope`: plain torch, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace.kernels.norm_modulate.reference import working_dtype


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    kind: str = "rms",
    pairs: str = "interleaved",
    eps: float = 1e-6,
    rotate_from: int = 0,
    rotate_key: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(x) * weight + bias of query and key, then y * cos + turned(y) * sin."""
    results = []
    for i, (x, weight, bias) in enumerate(((query, query_weight, query_bias), (key, key_weight, key_bias))):
        y = normed(x.to(working_dtype(x)), weight, bias, kind, eps)
        if cos is not None and sin is not None and (rotate_key or i == 0):
            y = rotated(y, cos, sin, pairs, rotate_from)
        results.append(y.to(x.dtype).contiguous() if out is None else out[i].copy_(y))
    return results[0], results[1]


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """norm(x) * weight + bias of [B, N, H, K], by head, or by token where the weight has H*K elements."""
    if kind == "none":
        return x
    vector = weight if weight is not None else bias
    y = x if vector is None or len(vector) == x.shape[-1] else x.flatten(2)
    if kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.view(x.shape) if y.dim() == 3 else y


def rotated(y: Tensor, cos: Tensor, sin: Tensor, pairs: str, rotate_from: int) -> Tensor:
    """y * cos + turned(y) * sin for the tokens that have a row of cos and sin."""
    end = rotate_from + cos.shape[-2]
    part = y[:, rotate_from:end]
    if pairs == "interleaved":
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    part = part * cos.unsqueeze(-2).to(y.dtype) + turned * sin.unsqueeze(-2).to(y.dtype)
    return torch.cat((y[:, :rotate_from], part, y[:, end:]), dim=1)
