"""`adaln_modulate` on a GPU: one program a row; the norm takes h from registers, rounded as it is stored."""
# Kernels are traced by triton, not typed.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vivace.kernels.norm_modulate.triton_impl import (
    modulated,
    normalised,
    place,
    read,
    row_block,
    rows,
    vector,
    warps,
    why_not,
    write,
)
from vivace.kernels.philox_normal.triton_impl import on_device

__all__ = ["adaln_modulate", "why_not"]


def adaln_modulate(
    hidden: Tensor,
    update: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,
    hidden_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = hidden + gate * update, m = (norm(h) * weight + bias) * (1 + scale) + shift, one pass."""
    hidden_out = hidden.new_empty(hidden.shape) if hidden_out is None else hidden_out
    out = hidden.new_empty(hidden.shape) if out is None else out
    batch, tokens, width = hidden.shape
    block = row_block(width)
    with on_device(hidden.device):
        _adaln_modulate[batch * tokens,](
            *rows(hidden_out),
            *rows(out),
            *rows(hidden),
            *rows(update),
            *vector(gate),
            *vector(scale),
            *vector(shift),
            weight,
            bias,
            tokens,
            width,
            eps,
            CENTRED=kind == "layer",
            BLOCK=block,
            num_warps=warps(block),
            enable_fp_fusion=False,
        )
    return hidden_out, out


@triton.jit
def _adaln_modulate(
    hidden_out,
    hidden_out_sample,  # strides of samples and of tokens, here and below
    hidden_out_token,
    out,
    out_sample,
    out_token,
    hidden,
    hidden_sample,
    hidden_token,
    update,
    update_sample,
    update_token,
    gate,
    gate_sample,
    gate_token,
    scale,
    scale_sample,
    scale_token,
    shift,
    shift_sample,
    shift_token,
    weight,
    bias,
    tokens,
    width,
    eps,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n = place(tokens)
    i = tl.arange(0, BLOCK)
    here = i < width
    step = read(update + b * update_sample + n * update_token, i, here)
    if gate is not None:
        step = read(gate + b * gate_sample + n * gate_token, i, here) * step
    h = read(hidden + b * hidden_sample + n * hidden_token, i, here) + step
    write(hidden_out + b * hidden_out_sample + n * hidden_out_token, i, here, h)
    h = h.to(hidden_out.dtype.element_ty).to(tl.float32)
    y = normalised(h, here, width, eps, CENTRED, BLOCK)
    scale_at, shift_at = b * scale_sample + n * scale_token, b * shift_sample + n * shift_token
    y = modulated(y, weight, bias, scale, scale_at, shift, shift_at, i, here)
    write(out + b * out_sample + n * out_token, i, here, y)
