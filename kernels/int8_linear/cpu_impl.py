"""`int8_linear` on the CPU: csrc/ops/int8_linear.*, packed weights, AVX-512 VNNI, AVX2 or plain C++: exact sums."""

from __future__ import annotations

import torch
from torch import Tensor

from vivace import _C
from vivace.kernels.linear.cpu_impl import ACTIVATION_CODES, Results, placed
from vivace.kernels.linear.packed import CODES, PackedWeight, pack_weight
from vivace.kernels.norm_modulate.check import dtype_name
from vivace.kernels.philox_normal.cpu_impl import chosen_isa


def why_not(device: str, dtype: str) -> str | None:
    """Why this cannot make results of `dtype` on `device`; None when it can."""
    chosen_isa()
    if device != "cpu":
        return f"it runs CPU tensors, these are on {device}"
    return "float64 runs on the reference" if dtype == "float64" else None


def int8_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * act(x_scale weight_scale (x W^T) + bias), each that is None left out.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    packed = weight if isinstance(weight, PackedWeight) else pack_weight(weight)
    if out is None:
        out = x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=out_dtype or torch.bfloat16)
    wide = x if x.dtype != torch.float16 else x.float()
    source, where, sizes = placed(wide, CODES[dtype_name(wide.dtype)])
    by_row = x_scale if x_scale is None or x_scale.is_contiguous() else x_scale.contiguous()
    to = Results(out, bias, gate, residual)
    _C.int8_linear(
        to.rows,
        where,
        0 if by_row is None else by_row.data_ptr(),
        0 if smooth is None else smooth.data_ptr(),
        packed.numbers,
        weight_scale.data_ptr(),
        to.bias,
        ACTIVATION_CODES[activation],
        to.gate,
        to.residual,
        sizes,
        torch.get_num_threads(),
    )
    return to.written()
