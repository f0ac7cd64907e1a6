"""Which pictures of which requests run a row together: those that share structure, whatever their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.caching import RowUse, free_of_x
from vivace.engine.executors import Group, KernelRows
from vivace.engine.focusing import Member, Together
from vivace.engine.guiding import Hearers
from vivace.engine.kept import Sample, Seen, Turn
from vivace.engine.looking import HEARD, hears, watched
from vivace.engine.merge_rows import merge_row
from vivace.engine.merging import MergeSample, Merging
from vivace.engine.plan import Guard, Variant
from vivace.engine.request import State
from vivace.engine.token_rows import TokenRow, focused

Look = Callable[[Sequence["Part"], str, Sequence[float]], Seen]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Pictures of one request whose next row has one structure. row -1: the start.

    seen: a look at the first blocks from which they go on, places: where they are in it.
    """

    state: State
    pictures: tuple[int, ...]
    row: int
    variant: Variant | None
    uses: tuple[RowUse, ...] = ()
    seen: Seen | None = None
    places: tuple[int, ...] = ()

    @property
    def key(self) -> Hashable:
        """Parts of equal keys run together."""
        structure = tuple([item.use for item in self.uses])
        made = self.row in self.state.ahead
        return id(self.state.pool), self.variant, structure, self.outs, id(self.seen), made, self.tokens

    @property
    def outs(self) -> tuple[str, ...]:
        """Branches of the row's out slots, of which a guard's variant may run some."""
        return self.state.plan.steps[self.row].branches if self.row >= 0 else ()

    @property
    def tokens(self) -> TokenRow | None:
        """What its row chooses tokens by; None where it computes all."""
        return self.state.tokens.plan.rows[self.row] if self.state.tokens is not None and self.row >= 0 else None

    @property
    def span(self) -> tuple[int, int]:
        """Its kernel rows in the lowered plan."""
        lowered = self.state.entry.lowered
        return lowered.spans[self.row] if self.row >= 0 else lowered.start


def whole(state: State) -> Part:
    """All pictures of a state at their next row, as the plan says it."""
    step = state.plan.steps[state.row]
    return Part(state, tuple(range(len(state.lanes))), state.row, step.variant, state.caches.rows[state.row].uses)


def chosen(states: Sequence[State], look: Look) -> list[Part]:
    """The next rows of `states` with guards decided, parts of a state apart where its pictures differ."""
    parts: list[Part] = []
    looks: dict[Hashable, list[Part]] = {}
    for state in states:
        part, own = whole(state), state.plan.steps[state.row].guard
        if own is not None and own.metric in HEARD and state.watch is not None:
            parts += _split(part, state.watch.recall(own, state.row))
            continue
        guard = watched(state.plan, state.row) if state.watch is not None else None
        if guard is None or state.watch is None:
            parts.append(part)
        elif state.watch.stuck(guard) and state.plan.steps[state.row].guard is guard:
            parts += _split(part, state.watch.stay(state.row))
        elif state.watch.stuck(guard):
            parts.append(part)
        else:
            key = id(state.pool), part.variant, guard.metric, guard.params[:1]
            looks.setdefault(key, []).append(part)
    for members in looks.values():
        guard = watched(members[0].state.plan, members[0].row)
        assert guard is not None
        bare = [replace(part, uses=()) for part in members]  # a look keeps nothing, whatever the rows do
        seen, first = look(bare, guard.metric, guard.params), 0
        for part in members:
            places = tuple(range(first, first := first + len(part.pictures)))
            parts += _decided(replace(part, seen=seen, places=places), guard)
    return parts


def _decided(part: Part, watching: Guard) -> list[Part]:
    """A part after its look: whole where it has no guard of its own, else by what the guard says of each picture."""
    state = part.state
    assert state.watch is not None and part.seen is not None
    signal = part.seen.signal[:, list(part.places)]
    guard = state.plan.steps[part.row].guard
    if guard is not None:
        return _split(part, state.watch.decide(guard, signal, part.row))
    state.watch.computed(watching, signal)
    return [part if part.tokens is None else replace(part, seen=None, places=())]  # a look ran all tokens


def _split(part: Part, fired: Sequence[bool]) -> list[Part]:
    """The pictures whose guard did not fire, and those whose did."""
    step, row = part.state.plan.steps[part.row], part.state.caches.rows[part.row]
    assert step.guard is not None
    parts = []
    for wanted, variant, uses in ((False, step.variant, row.uses), (True, step.guard.otherwise, row.otherwise)):
        mine = [k for k, j in enumerate(part.pictures) if fired[j] == wanted]
        if mine:
            pictures = tuple(part.pictures[k] for k in mine)
            places = tuple(part.places[k] for k in mine) if part.seen is not None else ()
            parts.append(replace(part, pictures=pictures, variant=variant, uses=uses, places=places))
    return parts


def grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that run together."""
    if len(parts) == 1:
        return [list(parts)]
    groups: dict[Hashable, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.key, []).append(part)
    return list(groups.values())


def ahead(part: Part) -> list[Part]:
    """The rows from a part's on that can be evaluated together with it: they read nothing of x and do the same."""
    state, rows = part.state, [part]
    if part.variant is None or state.watch is not None or not free_of_x(part.variant, part.uses):
        return rows
    for row in range(part.row + 1, len(state.plan.steps)):
        following = replace(part, row=row, variant=state.plan.steps[row].variant, uses=state.caches.rows[row].uses)
        if state.plan.steps[row].net_inputs or following.key != part.key:
            break
        rows.append(following)
    return rows


def evaluated_ahead(parts: Sequence[Part], predict: Callable[[Sequence[Part]], tuple[Tensor, ...]]) -> None:
    """Leave with the states of parts of one key the predictions of all rows that read nothing of x, if several do."""
    together = [following for part in parts for following in ahead(part)]
    if len(together) == len(parts) or parts[0].row in parts[0].state.ahead:
        return
    outs, first = predict(together), 0
    for part in together:
        last = first + len(part.pictures)
        part.state.ahead[part.row] = tuple(out[first:last].clone() for out in outs)
        first = last


def _given(parts: Sequence[Part]) -> tuple[Tensor, ...] | None:
    """Predictions made ahead, taken from the states; None where there are none."""
    if parts[0].row not in parts[0].state.ahead:
        return None
    made = [part.state.ahead.pop(part.row) for part in parts]
    return made[0] if len(made) == 1 else tuple(torch.cat(outs) for outs in zip(*made, strict=True))


def group_of(parts: Sequence[Part]) -> Group:
    """What an executor runs for parts of one key."""
    first = parts[0]
    sizes = [len(part.pictures) for part in parts]
    rows = [max(part.row, 0) for part in parts]
    return Group(
        first.variant,
        _chain([_of(part, part.state.lanes) for part in parts]),
        _spread([part.state.plan.steps[row].timestep for part, row in zip(parts, rows, strict=True)], sizes),
        _spread([part.state.condition for part in parts], sizes),
        _spread(rows, sizes),
        _spread([part.state.hoisted for part in parts], sizes),
        _kernel_rows(parts, sizes),
        _chain([_of(part, part.state.seeds) for part in parts]),
        _chain([_of(part, part.state.pictures) for part in parts]),
        first.row,
        [],
        first.outs,
        _given(parts),
        _turns(parts) if first.uses else (),
        None if first.seen is None else first.seen.pick([place for part in parts for place in part.places]),
        merging=_merging(parts),
        tokens=_together(parts),
        hearers=_hearers(parts),
    )


def _hearers(parts: Sequence[Part]) -> Hearers | None:
    """Who notes what a group predicts; None where no plan of it asks."""
    asked = [part.state.watch if part.variant is not None and hears(part.state.plan) else None for part in parts]
    if not any(asked):
        return None
    found: list[tuple[Any, int] | None] = []
    for part, watch in zip(parts, asked, strict=True):
        found += [None if watch is None else (watch.cosines, j) for j in part.pictures]
    return Hearers(tuple(found))


def _together(parts: Sequence[Part]) -> Together | None:
    """The tokens of a group's pictures; None where no plan speaks of them."""
    if parts[0].variant is None or all(part.state.tokens is None for part in parts):
        return None
    members = tuple(Member(part.state.tokens, part.row, part.pictures) for part in parts)
    return Together(members, focused(parts[0].variant))


def _merging(parts: Sequence[Part]) -> Merging | None:
    """What the parts of a group merge, and whose importance is kept; None where none does."""
    first = parts[0]
    if first.variant is None or all(part.state.merges is None for part in parts):
        return None
    samples = (
        None if part.state.merges is None else MergeSample(part.state.merges, j, part.row)
        for part in parts
        for j in part.pictures
    )
    return Merging(first.variant.model, merge_row(first.variant), tuple(samples))


def _of(part: Part, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of a part's pictures, out of those of all pictures of its state."""
    return numbers if len(part.pictures) == len(numbers) else tuple([numbers[j] for j in part.pictures])


def _chain(numbers: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return numbers[0] if len(numbers) == 1 else tuple(itertools.chain.from_iterable(numbers))


def _spread(values: Sequence[Any], sizes: Sequence[int]) -> tuple[Any, ...]:
    """Each value as often as its part has pictures."""
    return tuple([value for value, size in zip(values, sizes, strict=True) for _ in range(size)])


def _kernel_rows(parts: Sequence[Part], sizes: Sequence[int]) -> tuple[KernelRows, ...]:
    """What the plan rows launch after the network: their k-th launches together, reductions and classes apart."""
    rows = []
    entries = _spread([(part.state.entry, part.state.entry.lowered.launches(part.span)) for part in parts], sizes)
    for k in range(max((len(launches) for _, launches in entries), default=0)):
        kinds: dict[tuple[bool, bool, bool], list[tuple[int, int]]] = {}
        for position, (entry, launches) in enumerate(entries):
            if k < len(launches):
                lowered, row = entry.lowered, launches[k]
                kind = lowered.reduces(row), row in lowered.fans, row in lowered.maps
                kinds.setdefault(kind, []).append((position, entry.base + launches[k]))
        for kind, mine in sorted(kinds.items()):
            rows.append(KernelRows(tuple([p for p, _ in mine]), tuple([row for _, row in mine]), *kind))
    return tuple(rows)


def _turns(parts: Sequence[Part]) -> tuple[Turn, ...]:
    """The uses of a group, each with the memory and the weights of every sample."""
    first = parts[0]
    if first.variant is None:
        return ()
    return tuple(
        Turn(
            item.use,
            first.variant.model,
            tuple(
                Sample(part.state.kept, j, part.uses[k].weights)
                for part in parts
                if part.state.kept is not None
                for j in part.pictures
            ),
        )
        for k, item in enumerate(first.uses)
        if not (item.use.reads and item.use.site == "received")  # selections read it, no network does
    )
