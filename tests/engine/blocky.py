"""A tiny network of blocks that keeps, reuses and forecasts, in plain torch: enough to test sessions that cache."""

import torch

from tests.engine.toy import Toy
from vivace.engine.bind import ModelSpec
from vivace.engine.kept import Seen
from vivace.engine.plan import Action

SHAPE, BLOCKS, TOKENS, WIDTH = (3, 8, 8), 4, 4, 48


class Blocky(Toy):
    """h + attn(h) + mlp(h), four times; every sample by itself, so bits do not depend on the batch.

    runs: how often each (site, block) was computed for a sample of a branch.
    """

    sites = frozenset(("attn", "mlp", "residual", "block"))
    metrics = frozenset(("first_block", "modulated_input"))

    def __init__(self, prediction="eps"):
        super().__init__(prediction)
        self.spec = ModelSpec("blocky", "1" * 64, prediction, SHAPE, BLOCKS, (4, 4), width=WIDTH)
        generator = torch.Generator().manual_seed(0)
        self.matrices = torch.randn((BLOCKS, 2, WIDTH, WIDTH), generator=generator) / WIDTH**0.5
        self.runs = {}

    def why_not_kept(self, site, blocks):
        return None

    def evaluate(self, x, timesteps, conditions, variant, turns=(), resume=None):
        self.calls.append((len(x), variant.branches))
        outs = []
        for branch in variant.branches:
            rows = [self._row(x, s, timesteps, conditions, branch, turns, resume)[0] for s in range(len(x))]
            outs.append(torch.stack(rows))
        return tuple(outs)

    def look(self, x, timesteps, conditions, variant, metric, params):
        stop = int(params[0]) if metric == "first_block" else 0
        signals, states = [], {}
        for branch in variant.branches:
            rows = []
            for s in range(len(x)):
                start, h = self._row(x, s, timesteps, conditions, branch, (), None, stop)
                states[branch, s] = h
                rows.append(h - start if stop else h * (1 + timesteps[s] / 1000))
            signals.append(torch.stack(rows))
        return Seen(torch.stack(signals), variant.branches, stop, states, tuple(range(len(x))))

    def _row(self, x, s, timesteps, conditions, branch, turns, resume, stop=None):
        """(prediction, hidden) of one sample of one branch; with `stop` (stem, hidden after that many blocks)."""
        c = conditions[s] if branch == "cond" else 0.0
        stem = h = torch.tanh(x[s].reshape(TOKENS, WIDTH) + 0.001 * timesteps[s] + 0.1 * c)
        begin = 0
        if resume is not None:
            begin, h = resume.block, resume.states[branch, resume.samples[s]]
        mine = [turn for turn in turns if branch in turn.use.branches]
        reads = {turn.use.blocks[0]: turn for turn in mine if turn.use.reads and turn.use.site in ("residual", "block")}
        keeps = [turn for turn in mine if not turn.use.reads and turn.use.site in ("residual", "block")]
        sites = {(turn.use.site, turn.use.blocks[0]): turn for turn in mine if turn.use.site in ("attn", "mlp")}
        starts, i = {}, 0 if resume is None else begin
        while i < (BLOCKS if stop is None else stop):
            starts[i] = h
            if i in reads:
                value = self._value(reads[i], branch, s)
                h = value if reads[i].use.site == "block" else h + value
                i = reads[i].use.blocks[1]
                continue
            for k, site in enumerate(("attn", "mlp")):
                h = h + self._site(sites.get((site, i)), site, i, k, h, branch, s)
            i += 1
            for turn in keeps:
                if turn.use.blocks[1] == i:
                    self._keep(turn, branch, s, h if turn.use.site == "block" else h - starts[turn.use.blocks[0]])
        if stop is not None:
            return stem, h
        return (h * 0.5).reshape(SHAPE), h

    def _site(self, turn, site, block, k, h, branch, s):
        if turn is not None and turn.use.reads:
            return self._value(turn, branch, s)
        self.runs[site, block] = self.runs.get((site, block), 0) + 1
        value = 0.2 * torch.tanh(h @ self.matrices[block, k])
        if turn is not None:
            self._keep(turn, branch, s, value)
        return value

    def _keep(self, turn, branch, s, value):
        assert turn.use.action == Action.COMPUTE
        slab, lanes = turn.places(branch, (TOKENS, WIDTH), like=value)
        planes = slab.values[lanes[s]]
        for j in range(turn.use.made + 1):
            before = planes[j].clone()
            planes[j] = value
            value = value - before

    def _value(self, turn, branch, s):
        slab, lanes = turn.places(branch, (TOKENS, WIDTH))
        weights = turn.weights[s]
        return sum(weight * plane for weight, plane in zip(weights, slab.values[lanes[s]], strict=False))
