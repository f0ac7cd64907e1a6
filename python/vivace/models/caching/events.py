"""Where the uses of a row fall in a transformer of blocks with two halves: attention, then MLP.

Halves are counted through the network: half 2 i is the attention of block i, half 2 i + 1 its MLP. Everything that runs
such a row, eagerly, as a sequence of ops or in C++, goes through the same events in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from vivace.engine.caching import Use
from vivace.engine.plan import Action
from vivace.errors import UnsupportedError

if TYPE_CHECKING:
    from vivace.engine.kept import Turn

SITES = frozenset({"attn", "mlp", "residual", "block", "kv"})
LISTENS = "received"  # what attention tokens received: rows that tell are run eagerly, with other sites besides
HALVES = ("attn", "mlp")  # sites of half a block
OPEN, KEEP, APPLY, KEYS = "open", "keep", "apply", "keys"


class Event(NamedTuple):
    """What happens to the hidden states when `at` halves are done.

    action: OPEN remembers them for a range of site "residual" that begins here; KEEP keeps what the half or range that
    ends here gave; APPLY puts kept values in the place of halves [at, until); KEYS: keys and values of the attention
    that begins here are kept, and in a token row it reads kept ones. turn: whose, by position in the row.
    """

    at: int
    until: int
    action: str
    site: str
    turn: int

    @property
    def half(self) -> int:
        """The half that a KEEP or APPLY of site "attn" or "mlp" is about."""
        return self.at if self.action == APPLY else self.at - 1

    @property
    def keeps_half(self) -> bool:
        """It keeps what half a block gives."""
        return self.action == KEEP and self.site in HALVES


@lru_cache(4096)
def events_of(uses: tuple[Use, ...]) -> tuple[Event, ...]:
    """The events of a row in order. Raises UnsupportedError for sites that such blocks have not.

    An attention that does not run has no keys and values: what was kept of them stays.
    """
    found = []
    for turn, use in enumerate(uses):
        if use.site not in SITES:
            raise UnsupportedError(f"site {use.site!r}: blocks of attention and MLP keep {', '.join(sorted(SITES))}")
        first, last = use.blocks
        begin, end = 2 * first, 2 * last
        if use.site == "kv":
            found.append((begin, 4, Event(begin, begin, KEYS, use.site, turn)))
            continue
        if use.site in HALVES:
            begin += HALVES.index(use.site)
            end = begin + 1
        if use.action != Action.COMPUTE:
            found.append((begin, 3, Event(begin, end, APPLY, use.site, turn)))
            continue
        if use.site == "residual":
            found.append((begin, 2, Event(begin, begin, OPEN, use.site, turn)))
        found.append((end, 0 if use.site in HALVES else 1, Event(end, end, KEEP, use.site, turn)))
    applied = [range(event.at, event.until) for _, _, event in found if event.action == APPLY]
    return tuple(
        event
        for _, _, event in sorted(found)
        if event.action != KEYS or not any(event.at in halves for halves in applied)
    )


def uses_of(turns: Sequence[Turn]) -> tuple[Use, ...]:
    """The structure of a row's turns."""
    return tuple([turn.use for turn in turns])


def walk(
    events: Sequence[Event],
    first: int,
    last: int,
    half: Callable[[int, Event | None], None],
    event: Callable[[Event], None],
) -> None:
    """Go through halves [first, last) and the events between them.

    half: runs one, and does the KEEP of what it gives where there is one; event: does one of the others.
    """
    queue, done = list(reversed(events)), first
    while True:
        while queue and queue[-1].at == done:
            now = queue.pop()
            event(now)
            done = now.until
        if done == last:
            break
        now = queue[-1] if queue else None
        kept = now if now is not None and now.keeps_half and now.half == done else None
        if kept is not None:
            queue.pop()
        half(done, kept)
        done += 1
    if queue:
        raise RuntimeError(f"caches: a row's uses overlap or lie outside of halves {first} to {last}: {queue[-1]}")
