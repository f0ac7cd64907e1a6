"""What the linear layers of a denoiser read on calibration samples: channel maxima, counts, a random sample of rows.

Layers are replaced by stand-ins that look at their input and then do what the layer does. Per layer and timestep group:

    maxima  [K]     max |x_j| over every row
    counts          rows seen
    rows    [n, K]  a uniform random sample of the rows, bounded (a reservoir kept by random keys)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vivace.engine.calibrate.draw import Progress, Sample, group_of
from vivace.engine.denoiser import Denoiser
from vivace.engine.noise import philox_words
from vivace.engine.plan import Variant
from vivace.models.quantized.reach import block_linears, network_of, with_linears

AT_ONCE = 8  # samples in a forward
ROWS = 1024  # of a layer, over all groups
MOST_BYTES = 256 << 20  # of the rows of all layers
KEYS_DRAW = 0x6B657973  # upper counter word of the keys: far from those that make pictures


@dataclass(eq=False)
class Seen:
    """What one layer read. kept: by group (keys, rows); vector: it reads one row a sample."""

    maxima: list[Tensor | None]
    counts: list[int]
    kept: list[tuple[Tensor, Tensor] | None]
    vector: bool = False

    def rows(self) -> tuple[Tensor, Tensor]:
        """All kept rows [n, K] with their groups [n], groups in order."""
        found = [(g, pair[1]) for g, pair in enumerate(self.kept) if pair is not None]
        groups = torch.cat([torch.full((len(rows),), g) for g, rows in found])
        return torch.cat([rows for _, rows in found]), groups


@dataclass(eq=False)
class Recorder:
    """Looks at the inputs of layers. group: of the samples that run now; most: rows kept of a layer and group."""

    groups: int
    most: int
    seed: int = 0
    group: int = 0
    seen: dict[str, Seen] = field(default_factory=dict)
    _calls: dict[tuple[str, int], int] = field(default_factory=dict)
    _keys: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def tap(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        """A function that records its input and then does what the layer does."""
        self.seen[name] = Seen([None] * self.groups, [0] * self.groups, [None] * self.groups)

        def look(x: Tensor) -> Tensor:
            self.look(name, x)
            return nn.functional.linear(x, layer.weight, layer.bias)

        return look

    def look(self, name: str, x: Tensor) -> None:
        """Record one input [..., K] of a layer."""
        seen, g = self.seen[name], self.group
        seen.vector |= x.dim() < 3 or x.shape[1:-1].numel() == 1
        flat = x.detach().reshape(-1, x.shape[-1])
        largest = flat.abs().amax(0).float().cpu()
        before = seen.maxima[g]
        seen.maxima[g] = largest if before is None else torch.maximum(before, largest)
        seen.counts[g] += len(flat)
        call = self._calls[name, g] = self._calls.get((name, g), -1) + 1
        keys = self._drawn(g, call, len(flat))
        first = keys.argsort(stable=True)[: self.most]
        rows, kept = flat[first.to(flat.device)].float().cpu(), seen.kept[g]
        keys = keys[first]
        if kept is not None:
            keys, rows = torch.cat((kept[0], keys)), torch.cat((kept[1], rows))
            least = keys.argsort(stable=True)[: self.most]
            keys, rows = keys[least], rows[least]
        seen.kept[g] = keys, rows

    def _drawn(self, group: int, call: int, count: int) -> Tensor:
        """Random keys [count] of the rows of a call, the same for every layer."""
        where = group, call, count
        if where not in self._keys:
            self._keys = {key: value for key, value in self._keys.items() if key[:2] == where[:2]}
            words = philox_words(self.seed, KEYS_DRAW + group, call, count)
            self._keys[where] = torch.from_numpy(words.astype(np.int64))
        return self._keys[where]


def collect_inputs(
    denoiser: Denoiser,
    samples: Sequence[Sample],
    conditions: Sequence[Any],
    edges: Sequence[float],
    *,
    seed: int = 0,
    rows: int = ROWS,
    progress: Progress | None = None,
) -> Recorder:
    """Run the network on all samples, group by group, and record what the linears of its blocks read.

    conditions: by prompt number. rows: kept of a layer at most, fewer where all layers would take more than
    `MOST_BYTES`.
    """
    network, groups = network_of(denoiser), len(edges) + 1
    linears = block_linears(network)
    a_row = 4 * sum(layer.in_features for layer in linears.values())
    most = max(1, min(rows, MOST_BYTES // a_row) // groups)
    recorder = Recorder(groups, most, seed)
    observed, done = with_linears(denoiser, {name: recorder.tap(name, layer) for name, layer in linears.items()}), 0
    for batch in batches(samples, edges):
        recorder.group = group_of(edges, batch[0].timestep)
        evaluate(observed, batch, conditions)
        done += len(batch)
        if progress is not None:
            progress("inputs of layers", done, len(samples))
    return recorder


def batches(samples: Sequence[Sample], edges: Sequence[float]) -> list[list[Sample]]:
    """Samples that can share a forward: of one group and set of branches, a few at a time, in order of groups."""
    sets: dict[tuple[int, tuple[str, ...]], list[Sample]] = {}
    for sample in samples:
        sets.setdefault((group_of(edges, sample.timestep), sample.branches), []).append(sample)
    return [sets[key][i : i + AT_ONCE] for key in sorted(sets) for i in range(0, len(sets[key]), AT_ONCE)]


@torch.no_grad()
def evaluate(denoiser: Denoiser, batch: Sequence[Sample], conditions: Sequence[Any]) -> Tensor:
    """Predictions of a batch, float32 on the CPU [samples, branches, ...]."""
    x = torch.stack([sample.x for sample in batch]).to(denoiser.device, denoiser.dtype)
    times = [sample.timestep for sample in batch]
    given = [conditions[sample.prompt] for sample in batch]
    outs = denoiser.evaluate(x, times, given, Variant(branches=batch[0].branches))
    return torch.stack([out.float().cpu() for out in outs], dim=1)
