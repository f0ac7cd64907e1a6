"""`linear` on the CPU: csrc/ops/linear.*, packed weights, with AVX-512, AVX2 or plain C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vivace import _C
from vivace.kernels.gelu.cpu_impl import by_rows
from vivace.kernels.linear.check import ACTIVATIONS
from vivace.kernels.linear.packed import PackedWeight, pack_weight
from vivace.kernels.norm_modulate.cpu_impl import CODES, rows, vector, why_not

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
    packed, source = weight if isinstance(weight, PackedWeight) else pack_weight(weight), by_rows(x)
    if out is None:
        out = x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=out_dtype or x.dtype)
    to = Results(out, bias, gate, residual)
    threads, code = torch.get_num_threads(), ACTIVATION_CODES[activation]
    _C.linear(to.rows, rows(source), packed.numbers, to.bias, code, to.gate, to.residual, source.shape, threads)
    return to.written()


class Results:
    """Where results go and what they are combined with, as C++ takes it; keeps the tensors behind the addresses."""

    __slots__ = ("_held", "_out", "_target", "bias", "gate", "residual", "rows")

    def __init__(self, out: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None) -> None:
        direct = out.dtype in CODES
        self._out, self._target = out, by_rows(out if direct else out.new_empty(out.shape, dtype=torch.float32))
        wide = None if bias is None else bias.float().contiguous()
        factor = None if gate is None else by_token(gate.float(), out.shape)
        added = None if residual is None else by_rows(residual.to(self._target.dtype))
        self._held = (wide, factor, added)
        self.rows = rows(self._target)
        self.bias = 0 if wide is None else wide.data_ptr()
        self.gate = None if factor is None else vector(factor)
        self.residual = None if added is None else rows(added)

    def written(self) -> Tensor:
        """The tensor asked for, once the results are there."""
        if self._target.data_ptr() != self._out.data_ptr():
            self._out.copy_(self._target.view(self._out.shape))
        return self._out


def by_token(gate: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A gate of the rank of a result of this shape, 4 or more, as [B, tokens, N]; any other as it is."""
    return gate.expand(shape).flatten(1, -2) if gate.dim() > 3 else gate
