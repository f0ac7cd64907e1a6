"""The native DiT as a fixed sequence of ops over memory planned beforehand: what a graph captures.

Per block: norm and modulation | qkv | attention | out, gate, residual, norm, modulation | up, GELU | down, gate,
residual, norm, modulation. The same ops in the same order for every row; what changes is the contents of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.kernels.adaln_modulate import adaln_modulate
from vivace.kernels.adaln_modulate import reference as plain_adaln
from vivace.kernels.norm_modulate import norm_modulate
from vivace.kernels.norm_modulate import reference as plain_norm
from vivace.models.compiled.linears import Layer, Linears, Rows, Then, TorchLinears
from vivace.models.dit import NORM_EPS, Block, DiT
from vivace.models.dit_config import DiTConfig
from vivace.models.rowwise import ROWS


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Arena:
    """Memory of one evaluation of R rows of N tokens, width D: all that lives between two ops of the sequence.

    cells [n, N, C p p] is as long as the rows, of which the samples use the first; out: predictions, one branch after
    the other, flat.
    """

    hidden: Rows
    normed: Rows
    qkv: Rows
    mixed: Rows
    update: Rows
    up: Rows
    cells: Rows
    embedded: Rows
    pixels: Rows
    out: Tensor

    @classmethod
    def of(cls, config: DiTConfig, rows: int, tokens: int, like: Tensor) -> Arena:
        """Zeros for everything, in the dtype and on the device of `like`."""
        width, cell = config.width, config.patch * config.patch
        height = rows * tokens + -(rows * tokens) % ROWS

        def memory(columns: int) -> Rows:
            return Rows.of(like.new_zeros(height, columns), rows, tokens)

        columns = (width, width, 3 * width, width, width, 4 * width, config.channels * cell, width)
        out = like.new_zeros(rows * tokens * cell * config.channels)
        return cls(*map(memory, columns), memory(cell * config.out_channels), out)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        parts = [getattr(self, field.name) for field in fields(self)]
        return sum((part.padded if isinstance(part, Rows) else part).nbytes for part in parts)


class DitSequence:
    """prediction = DiT(x; modulation, positions), from ops that write where they are told.

    Agrees with `DiT.forward` within rounding. A sample has the same bits alone and in any batch.

    linears: the library that multiplies; None is torch's.
    """

    def __init__(self, model: DiT, linears: Linears | None = None) -> None:
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.linears = linears or TorchLinears(model.device, model.dtype)
        self._like = model.patches.weight
        self._patches, self._final = self.linears.prepare(model.patches), self.linears.prepare(model.final)
        self._blocks = [_Block(block, self.linears) for block in model.layers()]
        self._arenas: WeakValueDictionary[tuple[int, int], Arena] = WeakValueDictionary()
        exact = self.dtype == torch.float16  # which the fused ops do not take: their definitions
        self._norm: Callable[..., Any] = plain_norm.norm_modulate if exact else norm_modulate
        self._adaln: Callable[..., Any] = plain_adaln.adaln_modulate if exact else adaln_modulate

    def arena(self, rows: int, tokens: int) -> Arena:
        """The memory of that size: one for all who hold it, given back when nobody does."""
        arena = self._arenas.get((rows, tokens))
        if arena is None:
            with torch.inference_mode(False):
                arena = self._arenas[rows, tokens] = Arena.of(self.config, rows, tokens, self._like)
        return arena

    def run(
        self, x: Tensor, modulation: Tensor, positions: Tensor, branches: int, arena: Arena | None = None
    ) -> tuple[Tensor, ...]:
        """Predictions of every branch.

        Args:
            x: [n, C, H, W] in the model's dtype, H and W multiples of the patch.
            modulation: [R, 6L + 2, D] float32, R = branches * n, branch-major, as in `hoist.modulation_table`.
            positions: [N, D] in the model's dtype.
            arena: of (R, N); None is one that nobody else uses.
        Returns: B tensors [n, C, H, W] in the arena, which its next evaluation overwrites.
        """
        patch, channels = self.config.patch, self.config.channels
        n, _, height, width = x.shape
        down, across = height // patch, width // patch
        arena = arena or Arena.of(self.config, branches * n, down * across, self._like)
        vectors = modulation.unbind(1)
        self._embed(arena, x, positions, branches)
        self._norm(arena.hidden.tokens, vectors[1], vectors[0], eps=NORM_EPS, out=arena.normed.tokens)
        for i, block in enumerate(self._blocks):
            self._block(arena, block, vectors[6 * i : 6 * i + 8])
        pixels = self._final(arena.normed, arena.pixels).tokens
        pixels = pixels.view(-1, down, across, patch, patch, self.config.out_channels)[..., :channels]
        out = arena.out.view(-1, channels, down, patch, across, patch)
        out.copy_(pixels.permute(0, 5, 1, 3, 2, 4))
        return out.view(-1, channels, height, width).chunk(branches)

    def _embed(self, arena: Arena, x: Tensor, positions: Tensor, branches: int) -> None:
        """hidden = patches of x to tokens, plus positions; the same for every branch."""
        n, channels, height, width = x.shape
        patch = self.config.patch
        down, across = height // patch, width // patch
        count = n * down * across
        length = count + -count % ROWS
        cells, embedded = (Rows.of(r.padded[:length], n, down * across) for r in (arena.cells, arena.embedded))
        pieces = x.view(n, channels, down, patch, across, patch).permute(0, 2, 4, 1, 3, 5)
        cells.tokens.view(n, down, across, channels, patch, patch).copy_(pieces)
        tokens = self._patches(cells, embedded).tokens
        hidden = arena.hidden.tokens.view(branches, *tokens.shape)
        torch.add(tokens.expand_as(hidden), positions, out=hidden)

    def _block(self, arena: Arena, block: _Block, vectors: tuple[Tensor, ...]) -> None:
        """One block; `vectors`: its six, then shift and scale of the norm after it, [R, D] each."""
        _, _, gate1, shift2, scale2, gate2, shift, scale = vectors
        mixed = self._attention(arena, block.qkv(arena.normed, arena.qkv))
        self._update(arena, block.out, mixed, gate1, scale2, shift2, block.eps)
        up = block.up(arena.normed, arena.up, Then(block.approximate))
        self._update(arena, block.down, up, gate2, scale, shift, NORM_EPS)

    def _attention(self, arena: Arena, qkv: Rows) -> Rows:
        """softmax(q k^T / sqrt(K)) v of every head, back as rows."""
        rows, tokens, _ = qkv.tokens.shape
        heads = qkv.tokens.view(rows, tokens, 3, self.config.heads, self.config.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        if len(qkv.padded) == rows * tokens:  # nothing to fill up: torch lays the result out as rows
            return arena.mixed.like(mixed.reshape(rows * tokens, self.config.width))
        arena.mixed.tokens.view(mixed.shape).copy_(mixed)
        return arena.mixed

    def _update(
        self, arena: Arena, layer: Layer, x: Rows, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> None:
        """hidden += gate * layer(x), then normed = norm(hidden) * (1 + scale) + shift."""
        hidden, normed = arena.hidden.tokens, arena.normed.tokens
        if self.linears.gated:
            layer(x, arena.hidden, Then(gate=gate, residual=arena.hidden))
            self._norm(hidden, scale, shift, eps=eps, out=normed)
        else:
            update = layer(x, arena.update).tokens
            self._adaln(hidden, update, gate, scale, shift, eps=eps, out=normed, hidden_out=hidden)


class _Block:
    """The linears of one block, prepared, and what its MLP is like."""

    def __init__(self, block: Block, linears: Linears) -> None:
        self.qkv, self.out = linears.prepare(block.qkv), linears.prepare(block.out)
        self.up, self.down = linears.prepare(block.up), linears.prepare(block.down)
        self.eps, self.approximate = block.mlp_eps, block.approximate
