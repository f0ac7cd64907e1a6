"""Rows of a foreign network that keep and give again, for graphs: which parts its cells have, and lanes that are data.

What leaves a range of blocks, and in which shapes, a network shows when it runs. So the first row of a structure is
run once beforehand with memory that notes what it is handed and keeps nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vivace.engine.caching import Use
from vivace.engine.compiled import Evaluation
from vivace.engine.denoiser import samples_of
from vivace.engine.kept import Slab, Turn
from vivace.engine.tokens import Focus
from vivace.models.caching.foreign import Cached, Keeper
from vivace.models.caching.laid_out import LaidOut, Layouts
from vivace.models.caching.lanes import Lanes, Rows
from vivace.models.caching.planes import Place
from vivace.models.tokens.active import Active

IDS = "token ids"  # input of a piece
Runs = Callable[[Mapping[str, Tensor]], Callable[..., Any]]  # the tensors of a forward -> what runs it


class Noted(NamedTuple):
    """What a turn keeps or reads: shapes of one sample by part, and the dtype that is handed over for keeping."""

    shapes: dict[int, tuple[int, ...]]
    dtype: torch.dtype


class Noting(Lanes):
    """Keeps nothing and gives zeros; notes what it is handed."""

    def __init__(self, turn: Turn, rows: Rows, active: Active | None = None, behind: bool = False) -> None:
        super().__init__(turn, rows, active, behind)
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.handed = torch.float32

    @property
    def noted(self) -> Noted:
        """All of it."""
        return Noted(self.shapes, self.handed)

    def keep(self, part: int, fresh: Tensor, base: Tensor | None = None, text: bool = False) -> None:
        """Note the shape; where some tokens are handed, that of what was kept of all."""
        some, self.handed = self.active is not None and not text, fresh.dtype
        self.shapes[part] = super().lanes(part, None, fresh)[0].shape if some else tuple(fresh.shape[1:])

    def give(
        self,
        part: int,
        like: Tensor,
        shape: tuple[int, ...] | None = None,
        hidden: Tensor | None = None,
        text: bool = False,
    ) -> Tensor:
        """Note the shape of what is kept."""
        some = self.active is not None and not text
        held = super().lanes(part, None if some else shape, like)[0].shape
        self.shapes[part], self.handed = held, like.dtype
        return like.new_zeros((self.rows.count, *(shape or held))) if hidden is None else hidden

    def lanes(self, part: int, shape: tuple[int, ...] | None, like: Tensor) -> tuple[Slab, tuple[int, ...]]:
        """Memory that is nobody's, for keys and values, which a row of some tokens writes and reads."""
        held = super().lanes(part, None, like)[0].shape if shape is None else shape
        slab = Slab(held, 1, like.dtype, like.device)
        self.shapes[part], self.handed = held, like.dtype
        return slab, slab.take(self.rows.count)


class Bound(Lanes):
    """The places of a turn by part. first: as `start` says."""

    def __init__(
        self, use: Use, rows: Rows, places: Mapping[int, Place], first: int, active: Active | None, behind: bool
    ) -> None:
        self.use, self.rows, self.active, self.behind = use, rows, active, behind
        self.places, self.first = places, first

    def start(self) -> int:
        """The first block of the longest run of ranges that is read with this cell."""
        return self.first

    def weights(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Weights [R, terms] of what is read."""
        found = next(iter(self.places.values())).weights
        assert found is not None, "what is read has weights"
        return found

    def lanes(self, part: int, shape: tuple[int, ...] | None, like: Tensor) -> Any:
        """The place of a part, and its lanes, which are data."""
        return self.places[part], self.places[part].lanes

    def index(self, lanes: Any, device: torch.device) -> Tensor:
        """They are a tensor."""
        made: Tensor = lanes
        return made


class ForeignLayouts:
    """Rows of foreign networks laid out. Shapes are known by structure, beyond `limit` the oldest are dropped."""

    limit = 256

    def __init__(self) -> None:
        self._noted: OrderedDict[Hashable, list[Noted]] = OrderedDict()
        self._layouts = Layouts()

    def of(
        self,
        cached: Cached,
        call: Evaluation,
        rows: Sequence[tuple[str, int]],
        filled: Sequence[bool],
        key: Hashable,
        try_out: Callable[[Runs], Any],
    ) -> tuple[LaidOut, Runs]:
        """What the piece of a row has besides its other inputs, and what runs its forward.

        rows, filled: as of `Layouts.of`; key: of network and arguments; try_out: runs the forward once.
        Raises UnsupportedError for turns that the network cannot do together.
        """
        turns, focus, x = call.turns, call.focus, call.x[:0]
        cached.check(turns)
        firsts, positions = [_first(turn, rows) for turn in turns], _positions(rows)
        structure = key, tuple([turn.use for turn in turns]), tuple(firsts)
        if focus is not None:
            structure = *structure, (focus.tokens, focus.count, positions)
        if structure not in self._noted:
            active = None if focus is None else Active(focus, [n for _, n in rows])
            self._noted[structure] = _tried(cached, turns, rows, active, try_out)
            if len(self._noted) > self.limit:
                self._noted.popitem(last=False)
        noted = self._noted[structure]
        dtypes = [each.dtype if turn.use.site == "kv" else x.dtype for each, turn in zip(noted, turns, strict=True)]
        likes = [x.new_empty(0, dtype=dtype) for dtype in dtypes]
        laid = self._layouts.of(turns, rows, filled, [each.shapes for each in noted], likes)
        laid = laid._replace(key=(laid.key, structure[2:]))
        if focus is not None:
            pictures = sorted({n for _, n in rows}) if max(positions) == 0 else [n for _, n in rows]
            laid = laid._replace(inputs={**laid.inputs, IDS: samples_of(focus.ids, pictures)})
        tokens = None if focus is None else (focus.tokens, positions)
        uses = [(turn.use, turn.model) for turn in turns]
        return laid, partial(_run, cached, uses, tuple(rows), firsts, tokens, laid.bind)


def _positions(rows: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """Which ids each row reads: those of the only picture, else its own."""
    return (0,) * len(rows) if len({n for _, n in rows}) == 1 else tuple(range(len(rows)))


def _first(turn: Turn, rows: Sequence[tuple[str, int]]) -> int:
    """Where what a turn of site "block" keeps begins to be read; 0 for others."""
    return Lanes(turn, Rows(rows)).start() if turn.use.site == "block" and not turn.use.reads else 0


def _tried(
    cached: Cached,
    turns: Sequence[Turn],
    rows: Sequence[tuple[str, int]],
    active: Active | None,
    try_out: Callable[[Runs], Any],
) -> list[Noted]:
    """What turns keep and read in a forward."""
    made: dict[Use, Noting] = {}

    def lanes(turn: Turn, *where: Any) -> Noting:
        made[turn.use] = Noting(turn, *where)
        return made[turn.use]

    keeper = Keeper(cached.parts, cached.wiring, turns, rows, active, lanes)
    try_out(lambda _: partial(cached.run, keeper))
    return [made[turn.use].noted for turn in turns]


def _run(
    cached: Cached,
    uses: Sequence[tuple[Use, str]],
    rows: Sequence[tuple[str, int]],
    firsts: Sequence[int],
    tokens: tuple[int, Sequence[int]] | None,
    bind: Callable[[Mapping[str, Tensor]], list[dict[int, Place]]],
    tensors: Mapping[str, Tensor],
) -> Callable[..., Any]:
    """The forward of a network over lanes that its tensors name, and of the tokens that they name."""
    active = None if tokens is None else Active(Focus(tensors[IDS], tokens[0]), tokens[1])
    of_use = {use: (places, first) for (use, _), places, first in zip(uses, bind(tensors), firsts, strict=True)}

    def lanes(turn: Turn, of_rows: Rows, some: Active | None, behind: bool) -> Bound:
        return Bound(turn.use, of_rows, *of_use[turn.use], some, behind)

    turns = [Turn(use, model, ()) for use, model in uses]
    return partial(cached.run, Keeper(cached.parts, cached.wiring, turns, rows, active, lanes))
