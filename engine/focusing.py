"""The tokens of a group in one row: chosen before its network runs, put together with the others after it.

Pictures of several requests run together. Their states are read and written picture by picture; nothing is read on the
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vivace.engine.token_rows import TokenRow
from vivace.engine.tokens import Focus, Tokens, put, some_of
from vivace.kernels.select_tokens import select_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """Pictures of one request in a group. row: of its plan; tokens None: its plan always computes all."""

    tokens: Tokens | None
    row: int
    pictures: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Together:
    """The tokens of a group in one row: `select` before the network, `merge` after it, then `classes`."""

    members: tuple[Member, ...]
    some: bool  # a token row
    focus: Focus | None = None
    classes: Tensor | None = None
    _ages: Tensor | None = field(default=None, repr=False)

    @property
    def patch(self) -> tuple[int, ...]:
        """Edge of a token in latent elements by axis, as `solver_step` takes it."""
        return next(member.tokens.layout.by_element for member in self.members if member.tokens is not None)

    def select(self) -> Focus | None:
        """The tokens of the row; None where it computes all. State stays as it is."""
        if self.some:
            members = [(member.tokens, member) for member in self.members if member.tokens is not None]
            first, number = members[0][0], members[0][1].row
            row = first.plan.rows[number]
            assert row is not None, "members of a token row are at token rows"
            ages = _joined([some_of(tokens.ages, member.pictures) for tokens, member in members], copy=True)
            if row.selector == "same":
                ids = _joined([some_of(_known(tokens.ids), member.pictures) for tokens, member in members])
            else:
                ids = self._ranked(members, row, ages, first.factors(number))
            self._ages = ages
            self.focus = Focus(ids, first.count)
        return self.focus

    def _ranked(
        self, members: Sequence[tuple[Tokens, Member]], row: TokenRow, ages: Tensor, factors: Tensor | None
    ) -> Tensor:
        """ids of a row that chooses anew; writes the ages after it."""
        tokens = members[0][0]
        given: dict[str, Any] = {"drop_high": row.drop_high, "factors": factors, "bound": row.bound}
        given["least"] = int(row.least)
        scores = [(each.scores(member.row), member) for each, member in members]
        if scores[0][0] is not None:
            rows = [some_of(found, member.pictures) for found, member in scores if found is not None]
            return select_tokens((), None, ages, int(row.keep), scores=_joined(rows), **given)
        read = [(*each.planes(member.row), member) for each, member in members]
        planes = [
            _joined([some_of(planes[k], member.pictures) for planes, _, member in read]) for k in range(len(read[0][0]))
        ]
        weights = _joined([_known(weight).expand(len(member.pictures), -1) for _, weight, member in read])
        metric = "deviation" if row.selector == "deviation" else "norm"
        return select_tokens(
            planes, weights.contiguous(), ages, int(row.keep), patch=tokens.layout.patch, metric=metric, **given
        )

    def merge(self, outs: tuple[Tensor, ...], branches: Sequence[str]) -> tuple[Tensor, ...]:
        """Predictions of all tokens, [n, *shape] a branch, from those of the row; the state is now behind the row."""
        active = None if self.focus is None else self._active(self.focus)
        self.classes = self._classes(active)
        pixels = None if active is None else self._pixels(active)
        found = dict(zip(branches, outs, strict=True))
        first = 0
        parts: list[dict[str, Tensor]] = []
        for member in self.members:
            rows = slice(first, first := first + len(member.pictures))
            mine = {branch: out[rows] for branch, out in found.items()}
            if member.tokens is not None:
                mine = self._merged(member.tokens, member, mine, None if pixels is None else pixels[rows])
                self._counted(member.tokens, member, rows, active)
            parts.append(mine)
        if pixels is None:
            return outs
        return tuple(_joined([part[branch] for part in parts]) for branch in branches)

    @staticmethod
    def _merged(tokens: Tokens, member: Member, outs: dict[str, Tensor], pixels: Tensor | None) -> dict[str, Tensor]:
        """Predictions of one member, tokens that were left out with their last ones."""
        if pixels is not None:
            outs = {
                branch: torch.where(pixels, out, some_of(tokens.outs[branch], member.pictures))
                for branch, out in outs.items()
            }
        tokens.keep_outs(member.row, outs, member.pictures, pixels)
        if pixels is None or len(member.pictures) < len(tokens.pictures):
            return outs
        return {branch: tokens.outs.get(branch, out) if branch in tokens.plan.after[member.row] else out
                for branch, out in outs.items()}  # fmt: skip

    def _counted(self, tokens: Tokens, member: Member, rows: slice, active: Tensor | None) -> None:
        """Ages, runs and counts behind the row; further evaluations of a step change the counts alone."""
        mine, pictures = None if active is None else active[rows], member.pictures
        ones: Tensor | int = 1 if mine is None else mine.to(torch.int32)
        put(tokens.computed, pictures, some_of(tokens.computed, pictures) + ones)
        if self.classes is not None and tokens.plan.classes[member.row]:
            if tokens.classes is None:
                tokens.classes = torch.zeros_like(tokens.ages, dtype=torch.uint8)
            put(tokens.classes, pictures, self.classes[rows])
        if tokens.plan.stages[member.row]:
            return
        run = some_of(tokens.run, pictures) + 1
        put(tokens.run, pictures, run if mine is None else run * mine)
        if mine is None:
            put(tokens.ages, pictures, torch.zeros_like(run))
            return
        put(tokens.ages, pictures, _known(self._ages)[rows])
        _put_ids(tokens, pictures, _known(self.focus).ids[rows])

    def _classes(self, active: Tensor | None) -> Tensor | None:
        """uint8 [n, N]: 0 left out, 1 computed as in `depth` rows before, 1 + k k rows ago before that, last: older."""
        if not any(member.tokens is not None and member.tokens.plan.classes[member.row] for member in self.members):
            return None
        parts, first = [], 0
        count = next(member.tokens.count for member in self.members if member.tokens is not None)
        device = next(member.tokens.ages.device for member in self.members if member.tokens is not None)
        for member in self.members:
            rows, tokens = slice(first, first := first + len(member.pictures)), member.tokens
            if tokens is None or not tokens.plan.classes[member.row]:
                parts.append(torch.zeros((len(member.pictures), count), dtype=torch.uint8, device=device))
            elif tokens.plan.stages[member.row] and tokens.classes is not None:
                parts.append(some_of(tokens.classes, member.pictures))
            else:
                gap = some_of(tokens.ages, member.pictures).clamp(max=tokens.plan.gaps) + 2
                steady = some_of(tokens.run, member.pictures) >= tokens.plan.depth
                found = gap.masked_fill(steady, 1)
                parts.append((found if active is None else found * active[rows]).to(torch.uint8))
        return _joined(parts)

    def _active(self, focus: Focus) -> Tensor:
        """bool [n, N]: computed in this row."""
        none = torch.zeros((len(focus.ids), focus.tokens), dtype=torch.bool, device=focus.ids.device)
        return none.scatter_(1, focus.ids.long(), True)

    def _pixels(self, active: Tensor) -> Tensor:
        """bool [n, *shape] of `active`, 1 for the axis of channels."""
        tokens = next(member.tokens for member in self.members if member.tokens is not None)
        pixels: Tensor = tokens.layout.pixels(active)
        return pixels


def _known(value: Any) -> Any:
    assert value is not None, "a token row was chosen before"
    return value


def _put_ids(tokens: Tokens, pictures: Sequence[int], ids: Tensor) -> None:
    if tokens.ids is None or tokens.ids.shape[1] != ids.shape[1]:
        tokens.ids = ids.new_zeros((len(tokens.pictures), ids.shape[1]))
    put(tokens.ids, pictures, ids)


def _joined(parts: Sequence[Tensor], copy: bool = False) -> Tensor:
    if len(parts) == 1:
        return parts[0].clone() if copy else parts[0]
    return torch.cat(list(parts))
