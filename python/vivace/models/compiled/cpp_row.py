"""Rows of the native DiT in C++: `vivace._C.Dit` around packed weights, with its arena."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from vivace.engine.compiled import Bucket
from vivace.models.compiled.kept_rows import NOTHING, KeptMemories, KeptRows
from vivace.models.compiled.packed import PackedDit
from vivace.models.compiled.parts import Part
from vivace.models.compiled.precisions import SITES, Kinds, dtype_in, plain
from vivace.models.compiled.scales import scale_table
from vivace.models.dit import DiT
from vivace.models.quantized.weights import QuantizedWeights

ALIGNMENT = 64  # bytes
KEPT = 64  # position tables and output shapes kept
CLOCKED = ("linear", "attention", "norm", "quantize", "rest")
Picks = Sequence[Sequence[tuple[int, int]]]
Fault = tuple[str, int]  # a linear whose input held NaN or infinity, and the sample


class Memory:
    """An arena that grows; rows that never run at the same time share one."""

    def __init__(self) -> None:
        self.bytes = _aligned(0)

    def grow(self, need: int) -> None:
        """Room for that many bytes."""
        if need > self.bytes.nbytes:
            self.bytes = _aligned(need)


class CppRow:
    """Evaluates rows by one call into C++; owns the outputs, which the next run overwrites.

    Args:
        kinds: the precisions of the blocks; None: the model's dtype. quantized: weights for those in int8.
        memory: shared with rows that never run at the same time; None: its own.
    """

    def __init__(
        self,
        model: DiT,
        kinds: Kinds | None = None,
        quantized: QuantizedWeights | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.weights = model, PackedDit(model, kinds or plain(model), quantized)
        self.clocked: tuple[int, ...] | None = None
        self.fault: Fault | None = None
        self._scales = scale_table(quantized, kinds or plain(model))
        self.memory = memory or Memory()
        self._sizes = (1, 1, 1)  # rows, samples, tokens the arena has room for
        self._some = False  # also for rows of some of the tokens
        self._threads = 1
        dtypes = [dtype_in(attention, model.dtype) for attention, _ in kinds or plain(model)]
        self._kept = KeptMemories([torch.empty(0, dtype=dtype) for dtype in dtypes])
        self._positions = lru_cache(KEPT)(self._table)
        self._out = lru_cache(KEPT)(partial(torch.empty, dtype=torch.float32))

    def reserve(self, branches: int, bucket: Bucket, some: bool = False) -> None:
        """Make the arena large enough for that many branches of a bucket; some: of token rows, too."""
        rows, samples, tokens = self._sizes
        wanted = branches * bucket.samples
        self._sizes = max(rows, wanted), max(samples, bucket.samples), max(tokens, bucket.tokens)
        self._some = self._some or some
        self._grow(torch.get_num_threads())

    def _grow(self, threads: int) -> None:
        """Room for all that was reserved, on that many threads."""
        self._threads = max(self._threads, threads)
        self.memory.grow(self.weights.runner.arena_bytes(*self._sizes, self._threads, self._some))

    def run(
        self,
        x: Tensor,
        lanes: Sequence[int],
        tables: Sequence[Tensor],
        picks: Picks,
        groups: Sequence[int] | None = None,
        *,
        part: Part | None = None,
        clock: bool = False,
        check: bool = False,
    ) -> tuple[Tensor, ...]:
        """Predictions float32 [n, C, H, W] per branch.

        x: [lanes, C, H, W], float32 or bfloat16; tables: of each sample the modulation [S, B, 6L + 2, D] float32;
        picks: of each sample the (row, branch) of its table for every branch of the network; groups: of each sample the
        timestep group of its activation scales, None where all go by token; part: what the branches keep and give
        again, and of which tokens (of others no pixel is written), None: nothing and all; clock: leave the nanoseconds
        of each of CLOCKED in `clocked`; check: leave in `fault` the first linear whose input held NaN or infinity, None
        if none.
        """
        out = self._out((len(picks[0]), len(lanes), *x.shape[1:]))
        kept = NOTHING if part is None else self._kept.of(part, len(lanes), self._hidden(x))
        outs = [branch.data_ptr() for branch in out]
        self._run(x, lanes, tables, picks, groups, outs, kept=kept, clock=clock, check=check)
        return out.unbind(0)

    def look(
        self,
        x: Tensor,
        lanes: Sequence[int],
        tables: Sequence[Tensor],
        picks: Picks,
        groups: Sequence[int] | None,
        blocks: int,
        *,
        check: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What that many blocks add to the hidden states, and these: float32 [B, n, N, D] each, in memory of their own.

        blocks: 0: what the attention of block 0 reads, and the hidden states before it.
        """
        shape = len(picks[0]), len(lanes), *self._hidden(x)
        signal, states = torch.empty(shape), torch.empty(shape)
        look = blocks, states.data_ptr(), signal.data_ptr()
        self._run(x, lanes, tables, picks, groups, [], look=look, check=check)
        return signal, states

    def _run(
        self,
        x: Tensor,
        lanes: Sequence[int],
        tables: Sequence[Tensor],
        picks: Picks,
        groups: Sequence[int] | None,
        outs: Sequence[int],
        *,
        kept: KeptRows = NOTHING,
        look: tuple[int, int, int] | None = None,
        clock: bool = False,
        check: bool = False,
    ) -> None:
        threads, some = torch.get_num_threads(), kept.some[1] > 0
        if threads > self._threads or some > self._some:
            self._some = some or self._some
            self._grow(threads)
        size, branches = (x.shape[2], x.shape[3]), len(picks[0])
        modulations = [
            table.data_ptr() + (pick[b][0] * table.shape[1] + pick[b][1]) * table.stride(1) * 4
            for b in range(branches)
            for table, pick in zip(tables, picks, strict=True)
        ]
        self.clocked, place = self.weights.runner.run(
            x=(x.data_ptr(), x.stride(0), str(x.dtype)[6:]),
            capacity=len(x),
            lanes=lanes,
            size=size,
            positions=self._positions(size).data_ptr(),
            modulations=modulations,
            x_scales=self._given(groups) * branches,
            outs=outs,
            arena=self.memory.bytes.data_ptr(),
            arena_bytes=self.memory.bytes.nbytes,
            threads=threads,
            clock=clock,
            check=check,
            uses=kept.uses,
            weights=kept.weights,
            some=kept.some,
            first=kept.first,
            start=kept.start,
            look=look,
        )
        self.fault = None if place < 0 else self._found(place, len(modulations), len(lanes))

    def _hidden(self, x: Tensor) -> tuple[int, int]:
        """Tokens and width of the hidden states of a latent."""
        patch = self.model.config.patch
        return x.shape[2] // patch * (x.shape[3] // patch), self.model.config.width

    def _given(self, groups: Sequence[int] | None) -> list[int]:
        """Addresses of the activation scales [L, 4] of samples in these timestep groups."""
        table = self._scales
        if groups is None or table is None:
            return []
        return [table.data_ptr() + group * table.stride(0) * 4 for group in groups]

    def _found(self, place: int, rows: int, samples: int) -> Fault:
        """The linear and the sample of a fault."""
        site, row = divmod(place, rows)
        block, part = divmod(site, len(SITES))
        name = "final" if block == self.model.config.layers else f"blocks.{block}.{SITES[part]}"
        return name, row % samples

    def _table(self, size: tuple[int, int]) -> Tensor:
        """Positions [N, D] float32 of latents of a size."""
        patch = self.model.config.patch
        return self.model.position_table((size[0] // patch, size[1] // patch)).contiguous()


def _aligned(size: int) -> Tensor:
    """Bytes that start at a multiple of ALIGNMENT, touched once so that no run meets a fresh page."""
    raw = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + size]
