"""Networks of diffusers under the cache rules of a row: blocks that keep what they give, or are given what was kept.

An interceptor has every block's turn in one forward. Ranges of blocks (sites "residual" and "block") are kept and given
around blocks, other sites by stand-ins of modules inside them. What is kept lies in lanes of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vivace.engine.caching import RANGES
from vivace.engine.denoiser import BlockCall, BlockOut
from vivace.engine.kept import Slab, Turn
from vivace.engine.plan import Action, Rule, Variant
from vivace.errors import UnsupportedError
from vivace.kernels.cache_apply import cache_apply
from vivace.kernels.cache_update import cache_update
from vivace.models.caching.inside import Memory, Wrap, children_of, giving, inside, keeping
from vivace.models.caching.planes import TAKEN
from vivace.models.caching.wiring import HIDDEN, HIDDEN_OUT, STEM, TEXT, Exit, Wiring, half_of, wiring_of
from vivace.models.pipelines.blocks import ModuleParts
from vivace.models.pipelines.families import Half


class Rows:
    """The rows of a forward: a branch and the position of a sample each."""

    def __init__(self, rows: Sequence[tuple[str, int]]) -> None:
        self.count = len(rows)
        self.groups = [(b, tuple(n for _, n in group)) for b, group in groupby(rows, lambda row: row[0])]


class Lanes:
    """The lanes of a turn for the rows of a forward."""

    def __init__(self, turn: Turn, rows: Rows) -> None:
        self.use, self.rows = turn.use, rows
        self.turns = [(branch, turn.pick(samples)) for branch, samples in rows.groups]

    def start(self) -> int:
        """The first block of the longest run of ranges that is read with this cell."""
        return min(turn.start(branch) for branch, turn in self.turns)

    def keep(self, part: int, fresh: Tensor, base: Tensor | None = None) -> None:
        """Keep `fresh` [R, ...], or fresh - base, and the differences that the row makes."""
        fresh = _readable(fresh, self.rows.count)
        slab, lanes = self._places(part, tuple(fresh.shape[1:]), fresh)
        under = None if base is None else _readable(base, self.rows.count)
        cache_update(slab.values, lanes, fresh, base=under, made=self.use.made, scales=slab.scales)

    def give(
        self, part: int, like: Tensor, shape: tuple[int, ...] | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """What was kept or is forecast, [R, *shape] in the dtype of `like`, plus `hidden`. shape None: any."""
        slab, lanes = self._places(part, shape, like)
        numbers = [weights for _, turn in self.turns for weights in turn.weights]
        dtype = like.dtype if like.dtype in TAKEN else torch.float32
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        weights = torch.tensor(numbers, dtype=exact, device=slab.values.device)
        under = None if hidden is None else _readable(hidden, self.rows.count)
        given: dict[str, Any] = {"dtype": dtype} if under is None else {"hidden": under}
        made: Tensor = cache_apply(slab.values, lanes, weights, scales=slab.scales, **given)
        return made.to(like.dtype)

    def _places(self, part: int, shape: tuple[int, ...] | None, like: Tensor) -> tuple[Slab, Tensor]:
        """The slab, and the lane of every row."""
        found = [turn.places(branch, shape, part, like) for branch, turn in self.turns]
        slab = found[0][0]
        if any(other is not slab for other, _ in found):
            raise RuntimeError("cache: rows of one forward lie in slabs of different shapes")
        return slab, torch.tensor([lane for _, lanes in found for lane in lanes], device=slab.values.device)


def _readable(tensor: Tensor, count: int) -> Tensor:
    """`tensor` as the kernels read it. Raises RuntimeError when it has not a row for each sample."""
    if tensor.shape[0] != count:
        raise RuntimeError(f"cache: a block gives {tensor.shape[0]} rows in a forward of {count}")
    wide = tensor if tensor.dtype in TAKEN else tensor.float()
    return wide if wide.stride(-1) == 1 else wide.contiguous()


class Keeper:
    """The interceptor of one forward: keeps and gives what its turns say.

    rows: a branch and a sample's position in the turns for every row of the forward.
    """

    def __init__(self, parts: ModuleParts, wiring: Wiring, turns: Sequence[Turn], rows: Sequence[tuple[str, int]]):
        self.parts, self.wiring, self.rows = parts, wiring, Rows(rows)
        self._before: dict[int, list[Callable[[BlockCall], None]]] = {}
        self._after: dict[int, list[Callable[[BlockOut], None]]] = {}
        self._wraps: dict[int, dict[str, Wrap]] = {}
        self._exits: dict[int, list[tuple[Memory, Exit, bool]]] = {}  # what a block that does not run is given
        self._refills: dict[int, list[tuple[Memory, int, int]]] = {}  # skips of the stem that a block is given
        self._stem: Tensor | None = None
        for turn in turns:
            self._add(turn, turns)

    def _add(self, turn: Turn, turns: Sequence[Turn]) -> None:
        use, memory = turn.use, Lanes(turn, self.rows)
        first, last = use.blocks
        if use.site == "block":
            if use.reads:
                self.give_range(memory, first, last)
            else:
                self.keep_range(memory, memory.start(), last)
        elif use.site == "residual":
            for number, (begin, end) in enumerate(self.wiring.segments(first, last)):
                (self._give_residual if use.reads else self._keep_residual)(memory, 2 * number, begin, end)
        else:
            self._add_inside(turn, memory, turns)

    def _add_inside(self, turn: Turn, memory: Memory, turns: Sequence[Turn]) -> None:
        """A site of one block. Those that one projection gives are given with the first of them."""
        index, name = turn.use.blocks[0], self.parts.blocks[turn.use.blocks[0]].name
        half = half_of(self.parts.entries[index], turn.use.site)
        if half is None:
            raise UnsupportedError(f"block {index} ({name}) has no site {turn.use.site!r}")
        together = [other for other in turns if other.use.blocks == turn.use.blocks and other.use.site in half.sites]
        if len(together) < len(half.sites) or any(_numbers(other) != _numbers(turn) for other in together):
            raise UnsupportedError(_apart(index, name, half))
        if half.sites[0] == turn.use.site:
            block = self.parts.module.get_submodule(name)
            made = (giving if turn.use.reads else keeping)(block, half, memory)
            self._wraps.setdefault(index, {}).update(made)

    # --- ranges ------------------------------------------------------------------------------------------------------
    def keep_range(self, memory: Memory, first: int, last: int) -> None:
        """Keep everything that leaves blocks [first, last)."""
        for exit_ in self.wiring.exits(first, last):
            if exit_.block == STEM:
                self._before.setdefault(0, []).append(partial(_keep_stem, memory, exit_.part))
            else:
                self._after.setdefault(exit_.block, []).append(partial(_keep_exit, memory, exit_))

    def give_range(self, memory: Memory, first: int, last: int) -> None:
        """Blocks [first, last) do not run; what leaves them is given."""
        for block in range(first, last):
            self._exits.setdefault(block, [])
        for exit_ in self.wiring.exits(first, last):
            if exit_.block == STEM:
                skip = self.wiring.skips[exit_.part - 2]
                self._refills.setdefault(skip.consumer, []).append((memory, exit_.part, skip.taken))
            else:
                self._exits[exit_.block].append((memory, exit_, False))

    def _keep_residual(self, memory: Memory, part: int, first: int, last: int) -> None:
        """Keep hidden states out minus in, and the text's likewise."""
        base: dict[str, Any] = {}
        self._before.setdefault(first, []).append(lambda call: base.update(hidden=call.hidden, text=call.context))
        self._after.setdefault(last - 1, []).append(lambda out: memory.keep(part, out.hidden, base["hidden"]))
        if (writer := self.wiring.writer(first, last)) is not None:
            self._after.setdefault(writer, []).append(lambda out: memory.keep(part + 1, _text(out), base["text"]))

    def _give_residual(self, memory: Memory, part: int, first: int, last: int) -> None:
        for block in range(first, last):
            self._exits.setdefault(block, [])
        self._exits[last - 1].append((memory, Exit(part, last - 1), True))
        if (writer := self.wiring.writer(first, last)) is not None:
            self._exits[writer].append((memory, Exit(part + 1, writer), True))

    # --- the turn of a block -----------------------------------------------------------------------------------------
    def __call__(self, call: BlockCall) -> BlockOut:
        block = call.info.index
        if block == 0:
            self._stem = call.hidden
        for before in self._before.get(block, ()):
            before(call)
        out = self._given(call) if block in self._exits else call.compute(**self._changes(call))
        for after in self._after.get(block, ()):
            after(out)
        return out

    def _changes(self, call: BlockCall) -> dict[str, Any]:
        """How a block runs otherwise than in the plain network."""
        changes: dict[str, Any] = {}
        if wraps := self._wraps.get(call.info.index):
            changes["inside"] = partial(inside, wraps)
        if refills := self._refills.get(call.info.index):
            skips = list(call.skips)
            for memory, part, index in refills:
                skips[index] = self._refilled(memory, part, skips[index])
            changes["skips"] = tuple(skips)
        return changes

    def _refilled(self, memory: Memory, part: int, skip: Tensor) -> Tensor:
        """What the stem wrote when it was kept, in place of what it wrote now; what was added to it stays."""
        kept: Tensor = memory.give(part, skip)
        assert self._stem is not None, "the first block had its turn"
        return kept if skip is self._stem else kept + (skip - self._stem)

    def _given(self, call: BlockCall) -> BlockOut:
        """A block that does not run: what it is given, else what it was handed."""
        hidden, context, resized = call.hidden, call.context, self.wiring.resized
        skips = [call.hidden] * self.wiring.written[call.info.index]  # nobody reads those that are not given
        for memory, exit_, residual in self._exits[call.info.index]:
            if exit_.place is not None and exit_.place != HIDDEN_OUT:
                skips[exit_.place] = memory.give(exit_.part, call.hidden)
                continue
            text = exit_.part % 2 == TEXT and exit_.place is None
            like = context if text else hidden
            assert like is not None, "a block that writes text reads it"
            shape = None if resized else tuple(like.shape[1:])
            made = memory.give(exit_.part, like, shape, like if residual else None)
            hidden, context = (hidden, made) if text else (made, context)
        return BlockOut(hidden, context, tuple(skips))


def _text(out: BlockOut) -> Tensor:
    assert out.context is not None, "a block that writes text gives it"
    return out.context


def _keep_stem(memory: Memory, part: int, call: BlockCall) -> None:
    memory.keep(part, call.hidden)


def _keep_exit(memory: Memory, exit_: Exit, out: BlockOut) -> None:
    if exit_.place is None:
        memory.keep(exit_.part, out.hidden if exit_.part == HIDDEN else _text(out))
    else:
        memory.keep(exit_.part, out.hidden if exit_.place == HIDDEN_OUT else out.skips[exit_.place])


class Cached:
    """What caches need of one network: its blocks, how they are wired, and which sites they have."""

    def __init__(self, network: Any) -> None:
        self.parts = ModuleParts(network)
        self.wiring = wiring_of(self.parts)

    def forward(self, turns: Sequence[Turn], rows: Sequence[tuple[str, int]], *args: Any, **kwargs: Any) -> Any:
        """The network's forward on these rows, a branch and a sample's position each, as the turns say."""
        return self.parts.forward(Keeper(self.parts, self.wiring, turns, rows), *args, **kwargs)

    @property
    def sites(self) -> frozenset[str]:
        """Sites that some block has."""
        found = {"block"} if self.wiring.resized else set(RANGES)
        for info, entry in zip(self.parts.blocks, self.parts.entries, strict=True):
            block = self.parts.module.get_submodule(info.name)
            found |= {site for half in entry.inside if children_of(block, half.children) for site in half.sites}
        return frozenset(found)

    def why_not(self, variant: Variant) -> str | None:
        """Why the cache rules of a bound variant cannot run on this network; None when they can."""
        spoken: dict[tuple[int, str, str], Any] = {}
        for rule in variant.rules:
            if rule.action is None:
                continue
            if (reason := self.lacks(rule.site, rule.blocks)) is not None:
                return reason
            for block in range(*rule.blocks) if rule.site not in RANGES else ():
                spoken |= {(block, rule.site, branch): _said(rule) for branch in rule.branches or variant.branches}
        return self._splits(spoken)

    def lacks(self, site: str, blocks: tuple[int, int]) -> str | None:
        """Why a site of these blocks cannot be kept; None when it can."""
        if site == "residual" and self.wiring.resized:
            return f"blocks of {self._name} change the shape of what they read; use site 'block'"
        inner = () if site in RANGES else range(*blocks)
        return next((reason for block in inner if (reason := self._lacks(block, site)) is not None), None)

    @property
    def _name(self) -> str:
        return type(self.parts.module).__name__

    def _lacks(self, block: int, site: str) -> str | None:
        """Why a block has no such site."""
        info, entry = self.parts.blocks[block], self.parts.entries[block]
        module = self.parts.module.get_submodule(info.name)
        there = [site for half in entry.inside if children_of(module, half.children) for site in half.sites]
        if site in there:
            return None
        whole = ["block"] if self.wiring.resized else list(RANGES)
        kind = type(module).__name__
        return f"block {block} ({info.name}, {kind}) has no site {site!r}; it has {', '.join([*there, *whole])}"

    def _splits(self, spoken: Mapping[tuple[int, str, str], Any]) -> str | None:
        """Why a row splits what one projection of a block gives."""
        for block, site, branch in spoken:
            half = half_of(self.parts.entries[block], site)
            if half is None or len(half.sites) == 1:
                continue
            if any(spoken.get((block, other, branch)) != spoken[block, site, branch] for other in half.sites):
                return _apart(block, self.parts.blocks[block].name, half)
        return None


def _said(rule: Rule) -> tuple[Any, ...]:
    """What rules of one projection must agree on, as far as the structure of a row tells."""
    return Action(rule.action or 0), rule.order, rule.store


def _numbers(turn: Turn) -> tuple[Any, ...]:
    """What turns of one projection must agree on."""
    use = turn.use
    weights = tuple(sample.weights for sample in turn.samples)
    return use.action, use.branches, use.made, use.planes, use.store, weights


def _apart(block: int, name: str, half: Half) -> str:
    return (
        f"block {block} ({name}) gives {' and '.join(half.sites)} in one projection; rules must say the same of both, "
        "or use site 'residual'"
    )
