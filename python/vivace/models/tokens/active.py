"""The image tokens that the rows of one forward of a foreign network compute: gathered with all that goes by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vivace.engine.tokens import Focus
from vivace.errors import UnsupportedError
from vivace.models.pipelines.records import Rows, Tokens


class Active:
    """The active tokens of a forward.

    focus: of the pictures; rows: the position in it of the picture of each row of the forward.
    """

    def __init__(self, focus: Focus, rows: Sequence[int]) -> None:
        self.tokens, self.count = focus.tokens, focus.count
        ids, pictures = focus.ids.long(), len(focus.ids)
        times = len(rows) // pictures
        if tuple(rows) == tuple(range(pictures)) * times:
            self._ids = ids if times == 1 else ids.repeat(times, 1)
        else:
            self._ids = torch.cat([ids[position : position + 1] for position in rows])
        self.same = pictures == 1  # of all rows
        self.tables: list[Tensor] = []  # with a row for each picture, where the network has one for all
        self.row = torch.arange(len(rows), device=ids.device)[:, None]
        self._places: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def places(self, text: int, behind: bool) -> Tensor:
        """int64 [R, text + M]: active tokens in a sequence of text and image tokens, those of the text among them."""
        return self._both(text, behind)[0]

    def ids(self, text: int, behind: bool) -> Tensor:
        """The same as int32, which the ops take."""
        return self._both(text, behind)[1]

    def _both(self, text: int, behind: bool) -> tuple[Tensor, Tensor]:
        if (text, behind) not in self._places:
            words = torch.arange(text, device=self._ids.device).expand(len(self._ids), -1)
            both = (self._ids, words + self.tokens) if behind else (words, self._ids + text)
            made = torch.cat(both, dim=1) if text else self._ids
            self._places[text, behind] = made, made.int()
        return self._places[text, behind]

    def text_of(self, length: int, what: str) -> int:
        """Text tokens in a sequence of that length with all image tokens. Raises UnsupportedError for a shorter one."""
        if length < self.tokens:
            raise UnsupportedError(
                f"{what}: has rows for {length} tokens, the row of the plan is about {self.tokens} image tokens; a row "
                "of some tokens needs the tokens of the plan's latent, no more and no fewer"
            )
        return length - self.tokens

    def gather(self, full: Tensor, behind: bool, what: str = "hidden states") -> Tensor:
        """[R, text + M, ...] of full [R, text + N, ...]."""
        at = self.places(self.text_of(full.shape[1], what), behind)
        return full.index_select(1, at[0]) if self.same else full.expand(len(at), *full.shape[1:])[self.row, at]

    def scatter(self, fresh: Tensor, behind: bool) -> Tensor:
        """[R, text + N, ...] of fresh [R, text + M, ...], zeros where no token is active."""
        text = fresh.shape[1] - self.count
        full = fresh.new_zeros((fresh.shape[0], text + self.tokens, *fresh.shape[2:]))
        full[self.row, self.places(text, behind)] = fresh
        return full

    def options(self, tokens: Tokens, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a block that have a row for each token, with those of active tokens; made once a forward."""
        made: dict[str, Any] = {}
        for rows in tokens.options:
            value = given.get(rows.name)
            if isinstance(value, Tensor):
                made[rows.name] = self._option(rows, value, tokens.behind)
            elif value is not None:
                count = 1 if rows.first else len(value)
                picked = [self._option(rows, part, tokens.behind) for part in value[:count]]
                made[rows.name] = (*picked, *value[count:])
        return made

    def _option(self, rows: Rows, value: Tensor, behind: bool) -> Tensor:
        if value.shape[rows.axis] == 1 or rows.dims not in (0, value.dim()):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = value, self._rows_of(rows, value, behind)
        return self._made[id(value)][1]

    def _rows_of(self, rows: Rows, value: Tensor, behind: bool) -> Tensor:
        if rows.axis == 1:
            return self.gather(value, behind, rows.name)
        at = self.places(self.text_of(value.shape[0], rows.name), behind)
        if self.same:
            return value.index_select(0, at[0])
        self.tables.append(value[at])
        return self.tables[-1]
