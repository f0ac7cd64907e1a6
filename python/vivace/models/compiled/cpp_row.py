"""Rows of the native DiT in C++: `vivace._C.Dit` around packed weights, with its arena."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from vivace import _C
from vivace.engine.compiled import Bucket
from vivace.kernels.linear import PackedWeight, pack_weight
from vivace.models.compiled.packs import kept
from vivace.models.dit import NORM_EPS, DiT

ALIGNMENT = 64  # bytes
KEPT = 64  # position tables and output shapes kept
Picks = Sequence[Sequence[tuple[int, int]]]


class PackedDit:
    """Weights of a DiT as the C++ runner reads them: packed linears with float32 biases. Immutable, shared."""

    def __init__(self, model: DiT) -> None:
        config = model.config
        self.kept: list[tuple[PackedWeight, Tensor | None]] = []
        self.nbytes = 0
        self.runner = _C.Dit(
            heads=config.heads,
            patch=config.patch,
            channels=config.channels,
            out_channels=config.out_channels,
            gelu=config.gelu,
            eps=(NORM_EPS, config.norm_eps, NORM_EPS),
            dtype=str(model.dtype).removeprefix("torch."),
            patches=self._packed(model.patches),
            blocks=[tuple(map(self._packed, (b.qkv, b.out, b.up, b.down))) for b in model.layers()],
            final=self._packed(model.final),
        )

    def _packed(self, layer: nn.Linear) -> tuple[int, int, int, int]:
        weight = pack_weight(layer.weight)
        bias = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
        self.kept.append((weight, bias))
        self.nbytes += weight.nbytes + (0 if bias is None else bias.nbytes)
        return weight.data_ptr(), *weight.shape, 0 if bias is None else bias.data_ptr()


class CppRow:
    """Evaluates rows by one call into C++; owns the arena and the outputs, which the next run overwrites."""

    def __init__(self, model: DiT) -> None:
        self.model, self.weights = model, kept(model, "row", PackedDit)
        self._arena = _aligned(0)
        self._sizes: tuple[int, ...] = (1, 1, 1)  # rows, samples, tokens the arena has room for
        self._threads = 1
        self._positions = lru_cache(KEPT)(self._table)
        self._out = lru_cache(KEPT)(partial(torch.empty, dtype=torch.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and arena."""
        return self.weights.nbytes + self._arena.nbytes

    def reserve(self, branches: int, bucket: Bucket) -> None:
        """Make the arena large enough for that many branches of a bucket."""
        sizes = branches * bucket.samples, bucket.samples, bucket.tokens
        self._sizes = tuple(map(max, self._sizes, sizes))
        self._grow(torch.get_num_threads())

    def _grow(self, threads: int) -> None:
        """Room for all that was reserved, on that many threads."""
        self._threads = max(self._threads, threads)
        need = self.weights.runner.arena_bytes(*self._sizes, self._threads)
        if need > self._arena.nbytes:
            self._arena = _aligned(need)

    def run(
        self, x: Tensor, lanes: Sequence[int], tables: Sequence[Tensor], picks: Picks, *, clock: bool = False
    ) -> tuple[Tensor, ...]:
        """Predictions float32 [n, C, H, W] per branch.

        x: [lanes, C, H, W], float32 or bfloat16; tables: of each sample the modulation [S, B, 6L + 2, D] float32;
        picks: of each sample the (row, branch) of its table for every branch of the network; clock: leave the
        nanoseconds of linears, attention, norms and the rest in `clocked`.
        """
        capacity, channels, height, width = x.shape
        threads = torch.get_num_threads()
        if threads > self._threads:
            self._grow(threads)
        size, branches = (height, width), len(picks[0])
        out = self._out((branches, len(lanes), channels, height, width))
        modulations = [
            table.data_ptr() + (pick[b][0] * table.shape[1] + pick[b][1]) * table.stride(1) * 4
            for b in range(branches)
            for table, pick in zip(tables, picks, strict=True)
        ]
        self.clocked = self.weights.runner.run(
            x=(x.data_ptr(), x.stride(0), str(x.dtype)[6:]),
            capacity=capacity,
            lanes=lanes,
            size=size,
            positions=self._positions(size).data_ptr(),
            modulations=modulations,
            outs=[part.data_ptr() for part in out],
            arena=self._arena.data_ptr(),
            arena_bytes=self._arena.nbytes,
            threads=threads,
            clock=clock,
        )
        return out.unbind(0)

    def _table(self, size: tuple[int, int]) -> Tensor:
        """Positions [N, D] float32 of latents of a size."""
        patch = self.model.config.patch
        return self.model.position_table((size[0] // patch, size[1] // patch)).contiguous()


def _aligned(size: int) -> Tensor:
    """Bytes that start at a multiple of ALIGNMENT, touched once so that no run meets a fresh page."""
    raw = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + size]
