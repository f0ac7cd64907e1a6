"""Networks of diffusers under the cache rules of a row: blocks that keep what they give, or are given what was kept.

An interceptor has every block's turn in one forward. Ranges of blocks (sites "residual" and "block") are kept and given
around blocks, other sites by stand-ins of modules inside them. What is kept lies in lanes of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from vivace.engine.caching import KEYS, RANGES
from vivace.engine.denoiser import BlockCall, BlockOut
from vivace.engine.kept import Turn
from vivace.engine.merge_rows import SITE, merge_row
from vivace.engine.merging import Merging
from vivace.engine.plan import Action, Rule, Variant
from vivace.engine.tokens import Focus
from vivace.errors import UnsupportedError
from vivace.models.caching.inside import Memory, Wrap, both, children_of, giving, inside, keeping
from vivace.models.caching.lanes import Lanes, Rows
from vivace.models.caching.layers import SITE as LAYER
from vivace.models.caching.layers import Cut, check_added, ends_of, layers_in, nothing, noting, why_not_layers
from vivace.models.caching.wiring import HIDDEN, HIDDEN_OUT, STEM, TEXT, Exit, Wiring, half_of, wiring_of
from vivace.models.pipelines.blocks import ModuleParts
from vivace.models.pipelines.families import Half
from vivace.models.tokens.active import Active
from vivace.models.tokens.foreign import Compact, why_whole
from vivace.models.tokens.keys import STORES, attending, listening
from vivace.models.tokens.merging import Merger, joined, merging_blocks, why_not_merged


class Keeper:
    """The interceptor of one forward: keeps and gives what its turns say.

    rows: a branch and a sample's position in the turns for every row of the forward; active: the image tokens that it
    computes, None: all; lanes: makes the memory of a turn.
    """

    def __init__(
        self,
        parts: ModuleParts,
        wiring: Wiring,
        turns: Sequence[Turn],
        rows: Sequence[tuple[str, int]],
        active: Active | None = None,
        lanes: Callable[..., Lanes] = Lanes,
    ) -> None:
        self._lanes = lanes
        self.parts, self.wiring, self.rows, self.active = parts, wiring, Rows(rows), active
        self.merger: Merger | None = None
        self._compact = None if active is None else Compact(parts, active)
        self._keys: dict[int, dict[str, Wrap]] = {}
        self._image = 0  # image tokens that the block at work reads
        self._idle: set[tuple[int, str]] = set()  # (block, path) of modules that do not run
        self._before: dict[int, list[Callable[[BlockCall], None]]] = {}
        self._after: dict[int, list[Callable[[BlockOut], None]]] = {}
        self._wraps: dict[int, dict[str, Wrap]] = {}
        self.exits: dict[int, list[tuple[Memory, Exit, bool]]] = {}  # what a block that does not run is given
        self._refills: dict[int, list[tuple[Memory, int, int]]] = {}  # skips of the stem that a block is given
        self.cuts: dict[int, Cut] = {}  # blocks of which some layers run
        self._stem: Tensor | None = None
        for turn in turns:
            self._add(turn, turns)

    def _add(self, turn: Turn, turns: Sequence[Turn]) -> None:
        use, (first, last) = turn.use, turn.use.blocks
        record = None if use.site == LAYER else self.parts.entries[first].tokens
        memory = self._lanes(turn, self.rows, self.active, record is not None and record.behind)
        if use.site in KEYS:
            self._add_keys(use.site, first, memory)
        elif use.site == LAYER:
            self._add_layers(memory, first, last)
        elif use.site == "block":
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
        index, half = turn.use.blocks[0], _half_with(self.parts, turn, turns)
        if half.sites[0] == turn.use.site:
            block = self.parts.module.get_submodule(self.parts.blocks[index].name)
            made = (giving if turn.use.reads else keeping)(block, half, memory)
            self._wraps.setdefault(index, {}).update(made)
            self._idle |= {(index, path) for path in made if turn.use.reads}

    def _add_keys(self, site: str, index: int, memory: Lanes) -> None:
        """Keys and values of a block's self-attentions, or what tokens receive; of one that does not run nothing."""
        record, block = self.parts.entries[index].tokens, self.parts.module.get_submodule(self.parts.blocks[index].name)
        if record is None or (memory.use.reads != (self.active is not None)):
            raise RuntimeError(f"cache: keys of block {index} are read by rows of some tokens, kept by others")
        there = [path for path in record.attention if getattr(block, path, None) is not None]
        if site == "kv":
            made = attending(there, memory, record, self.active)
        else:  # selections read it, no network does
            made = {} if memory.use.reads else listening(there[0], memory, record, lambda: self._image)
        mine = self._keys.setdefault(index, {})
        mine |= {path: partial(both, mine[path], wrap) if path in mine else wrap for path, wrap in made.items()}

    def _add_layers(self, memory: Lanes, first: int, last: int) -> None:
        """Keep what enters the layer behind layers [first, last), or run none of these and give it."""
        ahead, behind = ends_of(self.parts, first, last)
        if memory.use.reads:
            for block in range(ahead.block + (ahead.place > 0), behind.block):
                self.exits.setdefault(block, [])
            if ahead.place:
                self.cuts[ahead.block] = Cut(slice(0, ahead.place), self.wiring.written[ahead.block])
            self.cuts[behind.block] = Cut(slice(behind.place, None), memory=memory)
        elif behind.place:
            block = self.parts.module.get_submodule(self.parts.blocks[behind.block].name)
            self._wraps.setdefault(behind.block, {}).update(noting(block, behind, memory))
        else:
            self._before.setdefault(behind.block, []).append(partial(_keep_stem, memory, HIDDEN))

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
            self.exits.setdefault(block, [])
        for exit_ in self.wiring.exits(first, last):
            if exit_.block == STEM:
                skip = self.wiring.skips[exit_.part - 2]
                self._refills.setdefault(skip.consumer, []).append((memory, exit_.part, skip.taken))
            else:
                self.exits[exit_.block].append((memory, exit_, False))

    def _keep_residual(self, memory: Memory, part: int, first: int, last: int) -> None:
        """Keep hidden states out minus in, and the text's likewise."""
        base: dict[str, Any] = {}
        self._before.setdefault(first, []).append(lambda call: base.update(hidden=call.hidden, text=call.context))
        self._after.setdefault(last - 1, []).append(lambda out: memory.keep(part, out.hidden, base["hidden"]))
        if (writer := self.wiring.writer(first, last)) is not None:
            self._after.setdefault(writer, []).append(lambda out: memory.keep(part + 1, _text(out), base["text"], True))

    def _give_residual(self, memory: Memory, part: int, first: int, last: int) -> None:
        for block in range(first, last):
            self.exits.setdefault(block, [])
        self.exits[last - 1].append((memory, Exit(part, last - 1), True))
        if (writer := self.wiring.writer(first, last)) is not None:
            self.exits[writer].append((memory, Exit(part + 1, writer), True))

    # --- the turn of a block -----------------------------------------------------------------------------------------
    def __call__(self, call: BlockCall) -> BlockOut:
        if self._compact is None:
            return self._turn(call)
        return self._compact.left(call, self._turn(self._compact.entered(call)))

    def _turn(self, call: BlockCall) -> BlockOut:
        block, self._image = call.info.index, call.hidden[:, call.image].shape[1]
        if block == 0:
            self._stem = call.hidden
        for before in self._before.get(block, ()):
            before(call)
        out = self._given(call) if block in self.exits else call.compute(**self._changes(call))
        if block in self.cuts:
            out = self.cuts[block].filled(out)
        for after in self._after.get(block, ()):
            after(out)
        return out

    def _changes(self, call: BlockCall) -> dict[str, Any]:
        """How a block runs otherwise than in the plain network."""
        changes: dict[str, Any] = {}
        wraps = self._inside(call.info.index)
        if self.merger is not None:
            wraps = joined(wraps, self.merger.wraps(call))
        if wraps:
            changes["inside"] = partial(inside, wraps)
        if refills := self._refills.get(call.info.index):
            skips = list(call.skips)
            for memory, part, index in refills:
                skips[index] = self._refilled(memory, part, skips[index])
            changes["skips"] = tuple(skips)
        if (cut := self.cuts.get(call.info.index)) is not None:
            changes |= cut.changes(call, changes.get("inside"))
        return changes

    def _inside(self, block: int) -> dict[str, Wrap]:
        """Stand-ins of modules in a block: those of its sites around those of its keys."""
        wraps = dict(self._wraps.get(block, {}))
        for path, of_keys in self._keys.get(block, {}).items():
            if (block, path) not in self._idle:
                around = wraps.get(path)
                wraps[path] = of_keys if around is None else partial(both, around, of_keys)
        return wraps

    def _refilled(self, memory: Memory, part: int, skip: Tensor) -> Tensor:
        """What the stem wrote when it was kept, in place of what it wrote now; what was added to it stays."""
        kept: Tensor = memory.give(part, skip)
        assert self._stem is not None, "the first block had its turn"
        return kept if skip is self._stem else kept + (skip - self._stem)

    def _given(self, call: BlockCall) -> BlockOut:
        """A block that does not run: what it is given, else what it was handed."""
        resized, context = self.wiring.resized, call.context
        hidden = nothing(call.hidden) if resized else call.hidden
        skips = [hidden] * self.wiring.written[call.info.index]  # nobody reads those that are not given
        for memory, exit_, residual in self.exits[call.info.index]:
            if exit_.place is not None and exit_.place != HIDDEN_OUT:
                skips[exit_.place] = memory.give(exit_.part, call.hidden)
                continue
            text = exit_.part % 2 == TEXT and exit_.place is None
            like = context if text else hidden
            assert like is not None, "a block that writes text reads it"
            shape = None if resized else tuple(like.shape[1:])
            made = memory.give(exit_.part, like, shape, like if residual else None, text)
            hidden, context = (hidden, made) if text else (made, context)
        return BlockOut(hidden, context, tuple(skips))


def _half_with(parts: ModuleParts, turn: Turn, turns: Sequence[Turn]) -> Half:
    """What gives a turn's site of one block. Raises UnsupportedError for turns that split what gives several."""
    index, name = turn.use.blocks[0], parts.blocks[turn.use.blocks[0]].name
    half = half_of(parts.entries[index], turn.use.site)
    if half is None:
        raise UnsupportedError(f"block {index} ({name}) has no site {turn.use.site!r}")
    together = [other for other in turns if other.use.blocks == turn.use.blocks and other.use.site in half.sites]
    if len(together) < len(half.sites) or any(_numbers(other) != _numbers(turn) for other in together):
        raise UnsupportedError(_apart(index, name, half))
    return half


def _text(out: BlockOut) -> Tensor:
    assert out.context is not None, "a block that writes text gives it"
    return out.context


def _keep_stem(memory: Memory, part: int, call: BlockCall) -> None:
    memory.keep(part, call.hidden)


def _keep_exit(memory: Memory, exit_: Exit, out: BlockOut) -> None:
    if exit_.place is None:
        text = exit_.part != HIDDEN
        memory.keep(exit_.part, _text(out) if text else out.hidden, text=text)
    else:
        memory.keep(exit_.part, out.hidden if exit_.place == HIDDEN_OUT else out.skips[exit_.place])


class Cached:
    """What caches need of one network: its blocks, how they are wired, and which sites they have."""

    def __init__(self, network: Any) -> None:
        self.parts = ModuleParts(network)
        self.wiring = wiring_of(self.parts)
        self.whole = why_whole(self.parts)  # why rows of some tokens cannot run

    def forward(
        self,
        turns: Sequence[Turn],
        rows: Sequence[tuple[str, int]],
        *args: Any,
        focus: Focus | None = None,
        **kwargs: Any,
    ) -> Any:
        """The network's forward on these rows, a branch and a sample's position each, as the turns say."""
        return self.run(self.keeper(turns, rows, focus), *args, **kwargs)

    def keeper(
        self,
        turns: Sequence[Turn],
        rows: Sequence[tuple[str, int]],
        focus: Focus | None = None,
        merging: Merging | None = None,
    ) -> Keeper:
        """The interceptor of a forward. focus: the image tokens that it computes of each sample, None: all; merging:
        what it merges, None: nothing."""
        active = None if focus is None else Active(focus, [sample for _, sample in rows])
        made = Keeper(self.parts, self.wiring, turns, rows, active)
        made.merger = None if merging is None else Merger(self.parts, merging, rows)
        return made

    def check(self, turns: Sequence[Turn]) -> None:
        """Raise UnsupportedError for turns of a row that the network cannot do together."""
        for turn in turns:
            if turn.use.site in (*RANGES, *KEYS):
                continue
            half = half_of(self.parts.entries[turn.use.blocks[0]], turn.use.site)
            if half is None or len(half.sites) > 1:
                _half_with(self.parts, turn, turns)

    def run(self, keeper: Keeper, *args: Any, **kwargs: Any) -> Any:
        """The network's forward by an interceptor of this network."""
        check_added(kwargs, [self.parts.blocks[index].kind for index in (*keeper.exits, *keeper.cuts)])
        if keeper.merger is not None:
            keeper.merger.see(args, kwargs)
        return self.parts.forward(keeper, *args, **kwargs)

    @property
    def sites(self) -> frozenset[str]:
        """Sites that some block has; those of keys where rows of some tokens can run."""
        found = set(self._ranges)
        found |= set(KEYS) if self.whole is None else set()
        found |= {SITE} if merging_blocks(self.parts) else set()
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
            if (row := merge_row(variant)) is not None and rule.site == SITE:
                reasons = (why_not_merged(self.parts, site, rule.blocks) for site in row.sites)
                if (why := next(filter(None, reasons), None)) is not None:
                    return f"merged tokens of blocks {rule.blocks}: {why}"
                continue
            if (reason := self.lacks(rule.site, rule.blocks)) is not None:
                return reason
            if rule.site == "kv" and rule.store not in STORES:
                return f"keys and values kept in {rule.store}: an attention reads {', '.join(filter(None, STORES))}"
            for block in range(*rule.blocks) if rule.site not in RANGES else ():
                spoken |= {(block, rule.site, branch): _said(rule) for branch in rule.branches or variant.branches}
        return self._splits(spoken)

    def lacks(self, site: str, blocks: tuple[int, int]) -> str | None:
        """Why a site of these blocks cannot be kept; None when it can."""
        if site.startswith(SITE):
            return why_not_merged(self.parts, site.removeprefix(f"{SITE}_") if site != SITE else "attn", blocks)
        if site in KEYS:
            return self.whole
        if site == LAYER:
            return why_not_layers(self.parts, *blocks)
        if site == "residual" and self.wiring.resized:
            return f"blocks of {self._name} change the shape of what they read; use site 'block'"
        inner = () if site in RANGES else range(*blocks)
        return next((reason for block in inner if (reason := self._lacks(block, site)) is not None), None)

    @property
    def _ranges(self) -> tuple[str, ...]:
        """Sites of ranges that the network has."""
        if not self.wiring.resized:
            return "residual", "block"
        return ("block", LAYER) if layers_in(self.parts) else ("block",)

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
        whole = self._ranges
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
