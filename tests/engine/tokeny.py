"""A tiny transformer that runs rows of some tokens, in plain torch: enough to test sessions that select tokens.

Every token's output depends on the keys and values of all tokens, and on nothing else of the batch.
"""

import torch

from tests.engine.toy import Toy
from vivace.engine.bind import ModelSpec
from vivace.engine.plan import Action

BLOCKS, HEAD = 3, 4
SHAPE = (3, 8, 8)


def summed(x, matrix):
    """x @ matrix, every element summed alone, so that its bits do not depend on the rows beside it."""
    return (x[:, :, None] * matrix).sum(dim=1)


class Tokeny(Toy):
    """x + attention + MLP, three times, over patches of latents of any rank; `runs`: tokens of every evaluation."""

    sites = frozenset(("attn", "mlp", "kv", "received"))

    def __init__(self, prediction="eps", shape=SHAPE, patch=None):
        super().__init__(prediction)
        self.patch = patch or (2,) * (len(shape) - 1)
        self.width = shape[0] * int(torch.tensor(self.patch).prod())
        self.spec = ModelSpec("tokeny", "2" * 64, prediction, shape, BLOCKS, self.patch, width=self.width)
        generator = torch.Generator().manual_seed(0)
        self.matrices = torch.randn((BLOCKS, 5, self.width, self.width), generator=generator) / self.width**0.5
        self.places = torch.randn((1 << 12, self.width), generator=generator)
        self.runs, self.broken = [], False

    def why_not_kept(self, site, blocks):
        return None

    def evaluate(self, x, timesteps, conditions, variant, turns=(), resume=None, focus=None):
        self.calls.append((len(x), variant.branches))
        self.runs += [None if focus is None else focus.ids[s].tolist() for s in range(len(x))]
        outs = []
        for branch in variant.branches:
            mine = [turn for turn in turns if branch in turn.use.branches]
            rows = [
                self.row(x[s], timesteps[s], conditions[s], branch, {
                    (turn.use.site, turn.use.blocks[0]): (turn, s) for turn in mine
                }, None if focus is None else focus.ids[s].long())
                for s in range(len(x))
            ]  # fmt: skip
            outs.append(torch.stack(rows))
        if self.broken:
            raise RuntimeError("out of memory")
        return tuple(outs)

    def row(self, x, timestep, condition, branch, turns, ids):
        """The prediction of one sample; pixels of tokens that are not in `ids` are NaN."""
        h = torch.tanh(self.cut(x) + 0.001 * timestep + (0.1 * condition if branch == "cond" else 0.0))
        h = h + 0.1 * self.places[: len(h)]
        count = len(h)
        h = h if ids is None else h[ids]
        for block in range(BLOCKS):
            h = h + self.site(turns.get(("attn", block)), branch, ids, count, lambda h=h, b=block: self.attention(
                h, b, turns.get(("kv", b)), branch, ids, turns.get(("received", b))))  # fmt: skip
            h = h + self.site(turns.get(("mlp", block)), branch, ids, count, lambda h=h, b=block: 0.2 * torch.tanh(
                summed(h, self.matrices[b, 4])))  # fmt: skip
        full = torch.full((count, self.width), torch.nan)
        full[torch.arange(count) if ids is None else ids] = 0.5 * h
        return self.joined(full, x.shape)

    def attention(self, h, block, turn, branch, ids, listener):
        q, k, v = (summed(h, self.matrices[block, i]) for i in range(3))
        if turn is not None:
            item, s = turn
            slab, lanes = item.places(branch, None if item.use.reads else (len(h), 2 * self.width), like=h)
            kept = slab.values[lanes[s], 0]
            kept[torch.arange(len(h)) if ids is None else ids] = torch.cat((k, v), dim=1).to(kept.dtype)
            if ids is not None:
                k, v = kept.to(h.dtype).split(self.width, dim=1)
        else:
            assert ids is None, "a row of some tokens reads the keys and values of the others"
        weights = torch.softmax((q[:, None, :] * k).sum(dim=2) / HEAD, dim=1)
        if listener is not None and ids is None:
            slab, lanes = listener[0].places(branch, (len(h),), like=h)
            slab.values[lanes[listener[1]], 0] = weights.sum(dim=0)
        return 0.3 * summed((weights[:, :, None] * v).sum(dim=1), self.matrices[block, 3])

    def site(self, turn, branch, ids, count, compute):
        """A site's result for the tokens of the row, given again or kept by `turn`."""
        if turn is None:
            return compute()
        item, s = turn
        slab, lanes = item.places(branch, None if item.use.reads else (count, self.width), like=self.places)
        planes, weights = slab.values[lanes[s]], item.weights[s]
        if item.use.reads:
            value = sum(weight * plane for weight, plane in zip(weights, planes, strict=False))
            return value if ids is None else value[ids]
        assert item.use.action == Action.COMPUTE
        value = found = compute()
        if ids is not None:
            assert not item.use.made
            planes[0][ids] = value
            return found
        for j in range(item.use.made + 1):
            before = planes[j].clone()
            planes[j] = value
            value = value - before
        return found

    def cut(self, x):
        """[C, *spatial] -> [N, width], tokens in row-major order of their grid."""
        axes = len(self.patch)
        sizes = [part for size, edge in zip(x.shape[1:], self.patch, strict=True) for part in (size // edge, edge)]
        x = x.view(x.shape[0], *sizes)
        grid, inner = [1 + 2 * a for a in range(axes)], [2 + 2 * a for a in range(axes)]
        return x.permute(*grid, 0, *inner).reshape(-1, self.width)

    def joined(self, h, shape):
        """The inverse of `cut`."""
        axes, grid = len(self.patch), [size // edge for size, edge in zip(shape[1:], self.patch, strict=True)]
        h = h.view(*grid, shape[0], *self.patch)
        order = [axes] + [place for a in range(axes) for place in (a, axes + 1 + a)]
        return h.permute(*order).reshape(shape)
