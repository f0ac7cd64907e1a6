"""A row of a `DitSequence` half by half, with what it keeps and what is given again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vivace.models.caching.events import APPLY, HALVES, KEYS, OPEN, Event, events_of, uses_of, walk
from vivace.models.caching.planes import given, keep
from vivace.models.compiled.parts import Part
from vivace.models.compiled.sequence_tokens import Keys

if TYPE_CHECKING:
    from vivace.models.compiled.sequence import DitSequence, Run


class Walk:
    """Half by half through the blocks, hidden states in the arena.

    last: halves until the end; ends: nothing reads them there as the head does.
    """

    def __init__(self, sequence: DitSequence, run: Run, part: Part, last: int, ends: bool = False) -> None:
        self.sequence, self.run, self.part, self.last = sequence, run, part, last
        events = events_of(uses_of(part.turns))
        self.unread = {event.at for event in events if event.action == APPLY} | ({last} if ends else set())
        self.ready: tuple[int, Any] = (-1, None)  # a half, and what its first linear reads
        self.base = run.arena.hidden.tokens
        self.keys: Keys | None = None  # of the attention that comes next
        walk(events, 2 * part.block, last, self._half, self._event)

    def input_of_head(self) -> Any:
        """What the final linear reads."""
        return self._input(self.last)

    def _input(self, half: int) -> Any:
        return self.ready[1] if self.ready[0] == half else self.sequence.normed(self.run, half)

    def _half(self, half: int, kept: Event | None) -> None:
        part = self.part
        if self.keys is None and part.focus is not None and half % 2 == 0:
            raise RuntimeError(f"block {half // 2}: a token row attends, and no keys and values were kept")
        x = self.sequence.inside(self.run, half, self._input(half), self.keys)
        self.keys = None
        keeps = None if kept is None else partial(keep, part.turns[kept.turn], part.branches, focus=part.focus)
        more = half + 1 not in self.unread
        self.ready = half + 1 if more else -1, self.sequence.update(self.run, half, x, keeps, more)

    def _event(self, event: Event) -> None:
        hidden, turn = self.run.arena.hidden.tokens, self.part.turns[event.turn]
        if event.action == OPEN:
            self.base = hidden.clone()
        elif event.action == KEYS:
            self.keys = Keys(turn, self.part.branches, self.part.focus)
        elif event.action != APPLY:
            base = self.base if event.site == "residual" else None
            keep(turn, self.part.branches, hidden, base, focus=self.part.focus)
        else:
            gate = self.run.vectors[3 * event.half + 2] if event.site in HALVES else None
            given(turn, self.part.branches, hidden, gate, hidden, self.part.focus)
