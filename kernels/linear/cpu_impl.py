"""`linear` on the CPU: csrc/ops/linear.*, packed weights, with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.gelu.cpu_impl import by_rows
from vivace.kernels.linear.check import ACTIVATIONS
from vivace.kernels.linear.packed import PackedWeight, pack_weight
from vivace.kernels.norm_modulate.cpu_impl import CODES, Rows, vector, why_not

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["linear", "why_not"]

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


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
    """residual + gate * act(x W^T + bias), each that is None left out.

    Uses at most `torch.get_num_threads()` threads of the extension's own pool; the bits do not depend on them.
    """
    packed = weight if isinstance(weight, PackedWeight) else pack_weight(weight)
    if out is None:
        out = x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=out_dtype or x.dtype)
    source, where, sizes = placed(x, CODES[x.dtype])
    to = Results(out, bias, gate, residual)
    threads, code = torch.get_num_threads(), ACTIVATION_CODES[activation]
    _C.linear(to.rows, where, packed.numbers, to.bias, code, to.gate, to.residual, sizes, threads)
    return to.written()


class Results:
    """Where results go and what they are combined with, as C++ takes it; keeps the tensors behind the addresses."""

    __slots__ = ("_held", "_out", "_target", "bias", "gate", "residual", "rows")

    def __init__(self, out: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None) -> None:
        code = CODES.get(out.dtype)
        target = out if code is not None else torch.empty(out.shape, dtype=torch.float32)
        self._out, self.bias, self.gate = out, 0, None
        self._target, self.rows, _ = placed(target, code or 0)
        if bias is not None:
            bias = bias if bias.dtype == torch.float32 else bias.float()
            self.bias = bias.data_ptr()
        if gate is not None:
            gate = by_token(gate if gate.dtype == torch.float32 else gate.float(), out.shape)
            self.gate = vector(gate)
        self.residual = None
        if residual is not None:
            kind = target.dtype
            residual, self.residual, _ = placed(residual if residual.dtype == kind else residual.to(kind), self.rows[1])
        self._held = bias, gate, residual

    def written(self) -> Tensor:
        """The tensor asked for, once the results are there."""
        if self._target is not self._out and self._target.data_ptr() != self._out.data_ptr():
            self._out.copy_(self._target.view(self._out.shape))
        return self._out


def placed(tensor: Tensor, code: int) -> tuple[Tensor, Rows, Sequence[int]]:
    """[B, ..., F], of the dtype with this code, as C++ takes it, and its three sizes; first the tensor that the address
    belongs to, a copy where there is no such view.
    """
    if tensor.dim() == 2:
        (count, width), (samples, _) = tensor.shape, tensor.stride()
        return tensor, (tensor.data_ptr(), code, samples, 0), (count, 1, width)
    view = by_rows(tensor)
    samples, tokens, _ = view.stride()
    return view, (view.data_ptr(), code, samples, tokens), view.shape


def by_token(gate: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A gate of the rank of a result of this shape, 4 or more, as [B, tokens, N]; any other as it is."""
    return gate.expand(shape).flatten(1, -2) if gate.dim() > 3 else gate
