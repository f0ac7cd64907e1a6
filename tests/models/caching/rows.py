"""Rows of a tiny DiT that keep and give again, run every way, each with memory of its own."""

import copy
from functools import partial

import torch

from vivace.engine.caching import CachePlan, Cell, Use
from vivace.engine.compiled import Bucket
from vivace.engine.kept import Kept, KeptMemory, Sample, Turn, split
from vivace.engine.plan import Action
from vivace.engine.tokens import Focus
from vivace.models.caching.looks import going_on, states_of
from vivace.models.caching.native import look, predict
from vivace.models.compiled.cpp_row import CppRow
from vivace.models.compiled.hoist import modulation_table
from vivace.models.compiled.parts import Part
from vivace.models.compiled.precisions import nearest, own_precisions
from vivace.models.compiled.sequence_row import SequenceRow
from vivace.models.dit import DiT
from vivace.models.quantized.layers import forward_at
from vivace.models.quantized.native import PreciseDiT

BRANCHES = ("cond", "uncond")
TIMES, LABELS = [999.0, 741.5, 500.0, 20.0], [4, 10]
SAMPLES, BLOCKS = 3, 3
WAYS = {"cpp": CppRow, "sequence": SequenceRow}


def keep(site, blocks, made=0, branches=BRANCHES):
    """One row's say of a site: what it gives is kept."""
    return site, blocks, Action.COMPUTE, made, (), branches


def give(site, blocks, *weights, branches=BRANCHES):
    """Kept planes take the place of what the site gives."""
    return site, blocks, Action.FORECAST if len(weights) > 1 else Action.REUSE, 0, weights or (1.0,), branches


def every(say, sites, *args, **options):
    """The same of several sites of every block."""
    return [say(site, (i, i + 1), *args, **options) for i in range(BLOCKS) for site in sites]


class Memory:
    """What a request of SAMPLES pictures keeps, and the turns of its rows."""

    def __init__(self, rows, store=None):
        self.store, self.planes = store, {}
        for row in rows:
            for site, (first, last), _action, made, weights, branches in row:
                for branch in branches:
                    cell = Cell("main", site, first, last, branch)
                    self.planes[cell] = max(self.planes.get(cell, 1), made + 1, len(weights))
        plan = CachePlan((), self.planes, dict.fromkeys(self.planes, store))
        self.memory = KeptMemory()
        self.kept = Kept(self.memory, plan, SAMPLES)

    def turns(self, row, samples=range(SAMPLES)):
        made = []
        for site, blocks, action, differences, weights, branches in row:
            planes = self.planes[Cell("main", site, *blocks, branches[0])]
            terms = len(weights)
            use = Use(site, blocks, action, branches, differences, planes, terms, self.store)
            made.append(Turn(use, "main", tuple(Sample(self.kept, sample, weights) for sample in samples)))
        return tuple(made)


class Case:
    """A model in some precisions, and latents of four rows."""

    def __init__(self, folder, dtype, kinds=None):
        self.model = DiT.load(folder, dtype)
        self.kinds = kinds
        self.quantized = None if kinds is None else nearest(self.model)
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(len(TIMES), SAMPLES, 4, 6, 10, generator=g, dtype=torch.float64).to(dtype)
        self.tokens = 15
        self.made = {}

    def exact(self):
        """The same network in float64, all of it."""
        wide = copy.copy(self)
        wide.model, wide.x, wide.kinds, wide.made = copy.deepcopy(self.model).double(), self.x.double(), None, {}
        return wide

    def network(self):
        if self.kinds is None:
            return self.model
        own = [own_precisions(pair, self.model.dtype) for pair in self.kinds]
        return PreciseDiT.standing_for(self.model, own, self.quantized.layers)

    def row(self, way):
        if way not in self.made:
            self.made[way] = WAYS[way](self.model, self.kinds, self.quantized)
            self.made[way].reserve(len(BRANCHES), Bucket(15, SAMPLES))
        return self.made[way]

    def eager(self, i, turns, samples=range(SAMPLES), seen=None, focus=None):
        """Predictions [B, n, C, H, W] of row i."""
        samples, outs = list(samples), {}
        t = torch.full((len(samples),), TIMES[i], dtype=torch.float64)
        seen = going_on(seen, turns)
        for names, mine in split(BRANCHES, turns):
            places = [BRANCHES.index(name) for name in names]
            labels = torch.tensor([[LABELS[place]] * len(samples) for place in places])
            states = {} if seen is None else {"hidden": states_of(seen, names), "block": seen.block}
            with forward_at(TIMES[i : i + 1]):
                made = predict(self.network(), self.x[i, samples], t, labels, names, mine, **states, focus=focus)
            outs.update(zip(names, made, strict=True))
        return torch.stack([outs[name] for name in BRANCHES])

    def look(self, i, metric, params, samples):
        """What a look at row i sees."""
        t = torch.full((len(samples),), TIMES[i], dtype=torch.float64)
        labels = torch.tensor(LABELS)[:, None].expand(2, len(samples))
        return look(self.network(), self.x[i, samples], t, labels, BRANCHES, metric, params)

    def compiled(self, way, i, turns, samples=range(SAMPLES), seen=None, focus=None, **options):
        samples, outs = list(samples), {}
        seen = going_on(seen, turns)
        for names, mine in split(BRANCHES, turns):
            places = [BRANCHES.index(name) for name in names]
            states = (None, 0) if seen is None else (states_of(seen, names).contiguous(), seen.block)
            part = Part(names, mine, *states, focus)
            made = self.row(way).run(*self.inputs(i, samples, places), part=part, **options)
            outs.update((name, out.clone()) for name, out in zip(names, made, strict=True))
        return torch.stack([outs[name] for name in BRANCHES])

    def inputs(self, i, samples, places=(0, 1)):
        """x, lanes, tables, picks and groups of a row."""
        table = modulation_table(self.model, TIMES, LABELS)
        picks = [[(i, place) for place in places] for _ in samples]
        return self.x[i], samples, [table] * len(samples), picks, None

    def run(self, way, rows, store=None, samples=range(SAMPLES), ids=None):
        """All rows one after the other: predictions [rows, B, n, C, H, W]; ids: of each row, None or [SAMPLES, M].

        Of token rows pixels of other tokens are 0.
        """
        memory = Memory(rows, store)
        made = []
        for i, row in enumerate(rows):
            turns, some = memory.turns(row, samples), None if ids is None else ids[i]
            focus = None if some is None else Focus(some[list(samples)], self.tokens)
            run = self.eager if way == "eager" else partial(self.compiled, way)
            out = run(i, turns, samples, focus=focus)
            made.append(out if focus is None else torch.where(self.shown(focus) > 0, out, 0))
        return torch.stack(made)

    def shown(self, focus):
        """1 in pixels of active tokens, 0 in others: [n, 1, H, W]."""
        patch, (height, width) = self.model.config.patch, self.x.shape[-2:]
        mask = torch.zeros(len(focus.ids), focus.tokens, dtype=self.x.dtype)
        mask.scatter_(1, focus.ids.long(), 1.0)
        mask = mask.view(-1, 1, height // patch, width // patch)
        return mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
