"""The native DiT as a fixed sequence of ops over memory planned beforehand: what a graph captures.

Per block: norm and modulation | qkv | attention | out, gate, residual, norm, modulation | up, GELU | down, gate,
residual, norm, modulation. The same ops in the same order for every row; what changes is the contents of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.kernels.adaln_modulate import adaln_modulate
from vivace.kernels.adaln_modulate import reference as plain_adaln
from vivace.kernels.gated_residual import gated_residual
from vivace.kernels.gated_residual import reference as plain_gated
from vivace.kernels.norm_modulate import norm_modulate
from vivace.kernels.norm_modulate import reference as plain_norm
from vivace.models.compiled.linears import (
    PLAIN,
    EightBits,
    Linears,
    OurLinears,
    QuantizedProduct,
    Rows,
    Then,
    TorchLinears,
)
from vivace.models.compiled.parts import Part
from vivace.models.compiled.precisions import SITES, Kinds, dtype_in, layer_in, plain
from vivace.models.compiled.sequence_tokens import Keys, picked, planes_of
from vivace.models.compiled.sequence_walk import Walk
from vivace.models.dit import NORM_EPS, DiT
from vivace.models.dit_config import DiTConfig
from vivace.models.quantized.weights import QuantizedWeights
from vivace.models.rowwise import ROWS

Look = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Arena:
    """Memory of one evaluation of R rows of N tokens, width D: all that lives between two ops of the sequence.

    hidden and update have one dtype, normed, qkv, mixed and up another, the rest that of the model. cells [n, N, C p p]
    is as long as the rows, of which the samples use the first; out: predictions, one branch after the other, flat.
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
    def of(
        cls,
        config: DiTConfig,
        rows: int,
        tokens: int,
        like: Tensor,
        hidden: torch.dtype | None = None,
        widest: torch.dtype | None = None,
    ) -> Arena:
        """Zeros on the device of `like`. hidden: dtype of hidden states; widest: of activations; None: that of like."""
        width, cell = config.width, config.patch * config.patch
        height = rows * tokens + -(rows * tokens) % ROWS

        def memory(columns: int, dtype: torch.dtype | None = None) -> Rows:
            return Rows.of(like.new_zeros(height, columns, dtype=dtype or like.dtype), rows, tokens)

        return cls(
            hidden=memory(width, hidden),
            normed=memory(width, widest),
            qkv=memory(3 * width, widest),
            mixed=memory(width, widest),
            update=memory(width, hidden),
            up=memory(4 * width, widest),
            cells=memory(config.channels * cell),
            embedded=memory(width),
            pixels=memory(cell * config.out_channels),
            out=like.new_zeros(rows * tokens * cell * config.channels),
        )

    def at(self, dtype: torch.dtype) -> Arena:
        """The same memory, activations in a dtype that is no wider."""
        if self.normed.padded.dtype == dtype:
            return self

        def seen(rows: Rows) -> Rows:
            flat = rows.padded.view(-1).view(dtype)[: rows.padded.numel()]
            return rows.like(flat.view(rows.padded.shape))

        return replace(self, normed=seen(self.normed), qkv=seen(self.qkv), mixed=seen(self.mixed), up=seen(self.up))

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        parts = [getattr(self, field.name) for field in fields(self)]
        return sum((part.padded if isinstance(part, Rows) else part).nbytes for part in parts)


class _Linear(NamedTuple):
    """One linear of a block, prepared: the dtype of float activations around it, and its column in the table of scales.

    call: takes `Rows`, or `EightBits` where it is a `QuantizedProduct`.
    """

    name: str
    call: Any
    gated: bool
    dtype: torch.dtype
    column: int

    @property
    def eight(self) -> QuantizedProduct | None:
        """Where its input is quantized: what does it."""
        return self.call if isinstance(self.call, QuantizedProduct) else None


class _Block(NamedTuple):
    qkv: _Linear
    out: _Linear
    up: _Linear
    down: _Linear


class Run(NamedTuple):
    """One evaluation: its memory, activation scales [R, 4L] or None, who looks at inputs of linears, vectors [R, D]."""

    arena: Arena
    x_scales: Tensor | None
    look: Look | None
    vectors: tuple[Tensor, ...]

    def given(self, linear: _Linear) -> Tensor | None:
        """The scales [R] of a linear's input."""
        return None if self.x_scales is None else self.x_scales[:, linear.column].contiguous()


class DitSequence:
    """prediction = DiT(x; modulation, positions), from ops that write where they are told.

    Agrees with `DiT.forward` within rounding. A sample has the same bits alone and in any batch.

    Args:
        linears: the library that multiplies in the model's dtype; None is torch's. Those in other precisions are ours.
        kinds: the precisions of the blocks; None: all the model's. Where activations are of another dtype than the
            model, hidden states are float32.
        quantized: weights on the model's device.
    """

    def __init__(
        self,
        model: DiT,
        linears: Linears | None = None,
        kinds: Kinds | None = None,
        quantized: QuantizedWeights | None = None,
    ) -> None:
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.linears = linears or TorchLinears(model.device, model.dtype)
        self._like, kinds = model.patches.weight, kinds or plain(model)
        dtypes = {dtype_in(name, model.dtype) for pair in kinds for name in pair}
        wider = torch.promote_types(model.dtype, torch.float32)
        self._hidden = model.dtype if dtypes == {model.dtype} else wider
        self._widest = max(dtypes | {model.dtype}, key=lambda dtype: dtype.itemsize)
        self._patches, self._final = self.linears.prepare(model.patches), self.linears.prepare(model.final)
        self._blocks = [_Block(*self._block(model, i, kinds[i], quantized)) for i in range(len(kinds))]
        self._eps = [(block.mlp_eps, block.approximate) for block in model.layers()]
        self._head = _Linear("final", self._final, False, model.dtype, -1)
        self._arenas: WeakValueDictionary[tuple[int, int], Arena] = WeakValueDictionary()
        exact = self._hidden == torch.float16  # which the fused ops do not take: their definitions
        self._norm: Callable[..., Any] = plain_norm.norm_modulate if exact else norm_modulate
        self._adaln: Callable[..., Any] = plain_adaln.adaln_modulate if exact else adaln_modulate
        self._gated: Callable[..., Any] = plain_gated.gated_residual if exact else gated_residual

    def _block(
        self, model: DiT, index: int, kind: tuple[str | None, str | None], quantized: QuantizedWeights | None
    ) -> list[_Linear]:
        """The linears of a block in their precisions."""
        made = []
        for place, part in enumerate(SITES):
            precision, layer = kind[place // 2], getattr(model.layers()[index], part)
            dtype, held = dtype_in(precision, model.dtype), layer_in(quantized, index, part, kind[place // 2])
            linears, call = self.linears, None
            if held is not None:
                call = QuantizedProduct(held, layer.bias)
            elif precision is not None or self._hidden != model.dtype:
                linears = OurLinears(model.device, dtype)
            gated = call is not None or linears.gated
            name = f"blocks.{index}.{part}"
            made.append(_Linear(name, call or linears.prepare(layer), gated, dtype, len(SITES) * index + place))
        return made

    def arena(self, rows: int, tokens: int) -> Arena:
        """The memory of that size: one for all who hold it, given back when nobody does."""
        arena = self._arenas.get((rows, tokens))
        if arena is None:
            with torch.inference_mode(False):
                arena = self._arenas[rows, tokens] = self._made(rows, tokens)
        return arena

    def key_dtype(self, block: int) -> torch.dtype:
        """What the keys and values of a block are made in."""
        return self._blocks[block].qkv.dtype

    def _made(self, rows: int, tokens: int) -> Arena:
        return Arena.of(self.config, rows, tokens, self._like, self._hidden, self._widest)

    def run(
        self,
        x: Tensor,
        modulation: Tensor,
        positions: Tensor,
        branches: int,
        arena: Arena | None = None,
        x_scales: Tensor | None = None,
        look: Look | None = None,
        part: Part | None = None,
    ) -> tuple[Tensor, ...]:
        """Predictions of every branch.

        Args:
            x: [n, C, H, W] in the model's dtype, H and W multiples of the patch.
            modulation: [R, 6L + 2, D] float32, R = branches * n, branch-major, as in `hoist.modulation_table`.
            positions: [N, D] in the model's dtype.
            arena: of (R, N), of a token row (R, M); None is one that nobody else uses.
            x_scales: float32 [R, 4L], scales of quantized inputs, 0 where tokens have their own; None: everywhere.
            look: called with the name of every linear of a block or the head, and its input [R, N, K], or the scales
                [R, N] of one that is quantized.
            part: what the branches keep and give again, and of which tokens; None: nothing, and all.
        Returns: B tensors [n, C, H, W] in the arena, which its next evaluation overwrites. Of a token row pixels of
            other tokens are 0.
        """
        patch, channels = self.config.patch, self.config.channels
        n, _, height, width = x.shape
        down, across = height // patch, width // patch
        part = part or Part(("",) * branches)
        ids = None if part.focus is None else part.focus.ids
        arena = arena or self._made(branches * n, down * across if ids is None else ids.shape[1])
        run = Run(arena, x_scales, look, modulation.unbind(1))
        if part.states is None:
            self._embed(arena, x, positions, branches, ids)
        else:
            arena.hidden.tokens.copy_(part.states.flatten(0, 1))
        normed = Walk(self, run, part, 2 * len(self._blocks)).input_of_head()
        if look is not None:
            look("final", normed.tokens)
        pixels = self._final(normed, arena.pixels).tokens
        if ids is not None:
            some = pixels.view(*pixels.shape[:2], patch, patch, self.config.out_channels)[..., :channels]
            return planes_of(some, ids, (channels, height, width)).chunk(branches)
        pixels = pixels.view(-1, down, across, patch, patch, self.config.out_channels)[..., :channels]
        out = arena.out.view(-1, channels, down, patch, across, patch)
        out.copy_(pixels.permute(0, 5, 1, 3, 2, 4))
        return out.view(-1, channels, height, width).chunk(branches)

    def _embed(self, arena: Arena, x: Tensor, positions: Tensor, branches: int, ids: Tensor | None = None) -> None:
        """hidden = patches of x to tokens, plus positions; the same for every branch."""
        n, channels, height, width = x.shape
        patch = self.config.patch
        down, across = height // patch, width // patch
        each = down * across if ids is None else ids.shape[1]
        count = n * each
        length = count + -count % ROWS
        cells, embedded = (Rows.of(r.padded[:length], n, each) for r in (arena.cells, arena.embedded))
        pieces = x.view(n, channels, down, patch, across, patch).permute(0, 2, 4, 1, 3, 5)
        if ids is None:
            cells.tokens.view(n, down, across, channels, patch, patch).copy_(pieces)
        else:
            cells.tokens.view(n, each, channels, patch, patch).copy_(picked(pieces, ids))
            positions = positions[ids]
        tokens = self._patches(cells, embedded).tokens
        hidden = arena.hidden.tokens.view(branches, *tokens.shape)
        torch.add(tokens.expand_as(hidden), positions, out=hidden)

    def look(
        self,
        x: Tensor,
        modulation: Tensor,
        positions: Tensor,
        branches: int,
        arena: Arena,
        x_scales: Tensor | None,
        look: Look | None,
        blocks: int,
    ) -> tuple[Tensor, Tensor]:
        """What that many blocks add to the hidden states, float32, and these: [R, N, D]; arguments as of `run`.

        blocks: 0: what the attention of block 0 reads, and the hidden states before it.
        """
        run, hidden = Run(arena, x_scales, look, modulation.unbind(1)), arena.hidden.tokens
        self._embed(arena, x, positions, branches)
        start = hidden.to(torch.float32, copy=True)
        if not blocks:
            return plain_norm.norm_modulate(start, run.vectors[1], run.vectors[0], eps=NORM_EPS), hidden.clone()
        Walk(self, run, Part(("",) * branches), 2 * blocks, ends=True)
        return hidden.float() - start, hidden.clone()

    def inside(self, run: Run, half: int, x: Any, keys: Keys | None = None) -> Any:
        """Half a block from its norm to the input of its last linear. keys: what an attention keeps and reads."""
        block = self._blocks[half // 2]
        if half % 2 == 0:
            arena = run.arena.at(block.qkv.dtype)
            return self._attention(arena, self._product(run, block.qkv, x, arena.qkv), keys)
        return self._product(run, block.up, x, run.arena.at(block.up.dtype).up, Then(self._eps[half // 2][1]))

    def _entry(self, half: int) -> tuple[_Linear, float]:
        """The first linear of a half, or the head's, and the eps of the norm before it."""
        if half == 2 * len(self._blocks):
            return self._head, NORM_EPS
        block = self._blocks[half // 2]
        return (block.up, self._eps[half // 2][0]) if half % 2 else (block.qkv, NORM_EPS)

    def _attention(self, arena: Arena, qkv: Rows, keys: Keys | None) -> Rows:
        """softmax(q k^T / sqrt(K)) v of every head, back as rows."""
        rows, tokens, _ = qkv.tokens.shape
        heads = qkv.tokens.view(rows, tokens, 3, self.config.heads, self.config.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if keys is not None and (kept := keys.attended(qkv.tokens)) is not None:
            shape = rows, kept.shape[1], 2, self.config.heads, self.config.head_dim
            key, value = kept.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        if len(qkv.padded) == rows * tokens:  # nothing to fill up: torch lays the result out as rows
            return arena.mixed.like(mixed.reshape(rows * tokens, self.config.width))
        arena.mixed.tokens.view(mixed.shape).copy_(mixed)
        return arena.mixed

    def _product(self, run: Run, linear: _Linear, x: Any, out: Rows, then: Then = PLAIN) -> Rows:
        """act(x W^T + b), then gate and residual."""
        if run.look is not None:
            run.look(linear.name, x.scale if isinstance(x, EightBits) else x.tokens)
        made: Rows = linear.call(x, out, then)
        return made

    def normed(self, run: Run, half: int) -> Any:
        """norm(hidden) * (1 + scale) + shift as the first linear of a half, or the head's, reads it."""
        (linear, eps), (shift, scale) = self._entry(half), run.vectors[3 * half : 3 * half + 2]
        hidden = run.arena.hidden.tokens
        if linear.eight is not None:
            return linear.eight.normed(hidden, scale, shift, eps, run.given(linear))
        normed = run.arena.at(linear.dtype).normed
        if linear.dtype in (hidden.dtype, torch.bfloat16):
            self._norm(hidden, scale, shift, eps=eps, out=normed.tokens)
        else:
            normed.tokens.copy_(self._norm(hidden, scale, shift, eps=eps))
        return normed

    def update(self, run: Run, half: int, x: Rows, keeps: Callable[..., None] | None, more: bool) -> Any:
        """hidden += gate * layer(x) by the last linear of a half; `normed` of the next half, if there is `more`.

        keeps: takes what the layer gives, before its gate, and does the rest where the layer would have.
        """
        block, hidden, gate = self._blocks[half // 2], run.arena.hidden, run.vectors[3 * half + 2]
        linear = block.down if half % 2 else block.out
        q = x if linear.eight is None else linear.eight.quantized(x.tokens, run.given(linear))
        if linear.gated:
            if keeps is None:
                self._product(run, linear, q, hidden, Then(gate=gate, residual=hidden))
            else:
                wide = hidden.like(hidden.padded.new_empty(hidden.padded.shape, dtype=torch.float32))
                keeps(self._product(run, linear, q, wide).tokens, hidden=hidden.tokens, gate=gate)
            return self.normed(run, half + 1) if more else None
        update = self._product(run, linear, q, run.arena.update).tokens
        if keeps is not None:
            keeps(update)
        after, eps = self._entry(half + 1)
        if not more or after.eight is not None or after.dtype != hidden.tokens.dtype:
            self._gated(hidden.tokens, update, gate, out=hidden.tokens)
            return self.normed(run, half + 1) if more else None
        normed, (shift, scale) = run.arena.at(after.dtype).normed, run.vectors[3 * half + 3 : 3 * half + 5]
        args = (hidden.tokens, update, gate, scale, shift)
        self._adaln(*args, eps=eps, out=normed.tokens, hidden_out=hidden.tokens)
        return normed
