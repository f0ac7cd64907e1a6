"""The native DiT with caches, in plain torch and our ops: what every compiled form of it is compared with.

A half that is kept is computed and added as ever; what it gave before its gate goes into the planes. A half that is
reused or forecast is not run: hidden + gate * v, of float32 v, rounded once to the dtype of the hidden states. Of a
range of blocks, "residual" is what it adds to the hidden states, "block" the hidden states that leave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.engine.kept import Seen, Turn
from vivace.engine.merge_rows import SITES as MERGED
from vivace.engine.merging import Merging
from vivace.engine.tokens import Focus
from vivace.models.caching.events import APPLY, HALVES, KEYS, LISTENS, OPEN, Event, events_of, uses_of, walk
from vivace.models.caching.looks import look_blocks
from vivace.models.caching.planes import given, keep
from vivace.models.dit import NORM_EPS, DiT, Held, Modulation
from vivace.models.tokens.maps import Maps
from vivace.models.tokens.merge import Merged
from vivace.models.tokens.native import attended, listen


@torch.no_grad()
def predict(
    model: DiT,
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    branches: Sequence[str],
    turns: Sequence[Turn],
    hidden: Tensor | None = None,
    block: int = 0,
    focus: Focus | None = None,
    merging: Merging | None = None,
) -> tuple[Tensor, ...]:
    """One prediction [n, C, H, W] a branch of a network that keeps and reuses what `turns` say.

    Args:
        x, t, labels: as of `DiT.forward`; branches: what the rows of `labels` are called, all in every use of `turns`.
        hidden: what a look at blocks [0, block) left, [B, n, N, D].
        focus: the tokens of a token row, whose hidden states are [R, M, D] from the stem to the head; None: all. Pixels
            of tokens that are not computed are 0. merging: what blocks merge, None: nothing.
    """
    modulation, ids = model.condition(t, labels), None if focus is None else focus.ids
    if hidden is None:
        hidden = model.embed(x, ids).repeat(len(branches), 1, 1)
    else:
        hidden = hidden.flatten(0, 1)
    made = _Pass(model, modulation, branches, turns, focus)
    if merging is not None:
        size = model.config.patch
        rows = [(branch, n) for branch in branches for n in range(len(x))]
        made.merges, made.grid = Maps(merging, rows), (x.shape[2] // size, x.shape[3] // size)
    hidden = made.run(hidden, block, len(model.blocks))
    return model.head(hidden, modulation, (x.shape[2], x.shape[3]), ids)


@torch.no_grad()
def look(
    model: DiT,
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    branches: tuple[str, ...],
    metric: str,
    params: Sequence[float],
) -> Seen:
    """The first blocks of a network, and what a guard measures there.

    "first_block": blocks [0, p), p = params[0], and what they add to the hidden states; "modulated_input": no block,
    and what the attention of block 0 reads.
    """
    block, rows = look_blocks(metric, params, len(model.blocks)), labels.shape
    modulation = model.condition(t, labels)
    start = model.embed(x).repeat(len(branches), 1, 1)
    states = _Pass(model, modulation, (), ()).run(start, 0, block)
    if metric == "first_block":
        signal = states.float() - start.float()
    else:
        shift, scale, _ = (vector.float() for vector in modulation.of_half(0, 0))
        signal = torch.addcmul(shift, F.layer_norm(start.float(), start.shape[-1:], eps=NORM_EPS), scale)
    samples = tuple(range(rows[1]))
    return Seen(signal.unflatten(0, rows), branches, block, states.unflatten(0, rows), samples)


class _Pass:
    """One way through blocks with the uses of a row; hidden states [R, N, D] are made anew by whatever changes them."""

    def __init__(
        self,
        model: DiT,
        modulation: Modulation,
        branches: Sequence[str],
        turns: Sequence[Turn],
        focus: Focus | None = None,
    ) -> None:
        self.model, self.modulation, self.branches, self.focus = model, modulation, branches, focus
        self.turns = [turn for turn in turns if turn.use.site != LISTENS]
        self.listeners = {turn.use.blocks[0]: turn for turn in turns if turn.use.site == LISTENS}
        self.merges: Maps | None = None
        self.grid = (0, 0)  # of tokens, where they are merged
        self._merged: tuple[int, Merged | None] = (-1, None)  # of the block at work
        self.base = self.hidden = torch.empty(0)
        self.keys: Turn | None = None  # of the attention that comes next

    def run(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Hidden states after blocks [first, last)."""
        self.hidden = hidden
        walk(events_of(uses_of(self.turns)), 2 * first, 2 * last, self._half, self._event)
        return self.hidden

    def _half(self, half: int, kept: Event | None) -> None:
        place = half // 2, half % 2
        fresh = self.model.fresh(*place, self.hidden, self.modulation, self._held(half), self._by(half))
        if kept is not None:
            self._keep(kept, fresh)
        self.hidden = self.model.joined(*place, self.hidden, self.modulation, fresh)

    def _by(self, half: int) -> Merged | None:
        """What a half merges its tokens by: made of what the first half that runs of its block reads."""
        said = None if self.merges is None else self.merges.row.of(half // 2)
        if self.merges is None or said is None:
            return None
        if self._merged[0] != half // 2:
            self._merged = half // 2, self.merges.of(half // 2, 0, self.hidden, self.grid, *said)
        return self._merged[1] if MERGED[half % 2] in self.merges.row.sites else None

    def _held(self, half: int) -> Held | None:
        """What an attention attends to, where that is not its own keys and values alone."""
        if half % 2:
            return None
        turn, self.keys = self.keys, None
        if turn is None and self.focus is not None:
            raise RuntimeError(f"block {half // 2}: a token row attends, and no keys and values were kept")
        if turn is None and half // 2 not in self.listeners:
            return None
        return partial(self._attended, half // 2, turn)

    def _attended(
        self, block: int, turn: Turn | None, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        if block in self.listeners:
            listen(self.listeners[block], self.branches, query, key)
        return (key, value) if turn is None else attended(turn, self.branches, self.focus, key, value)

    def _event(self, event: Event) -> None:
        if event.action == OPEN:
            self.base = self.hidden
        elif event.action == KEYS:
            self.keys = self.turns[event.turn]
        elif event.action != APPLY:
            self._keep(event, self.hidden, self.base if event.site == "residual" else None)
        else:
            self.hidden = self._applied(event)

    def _keep(self, event: Event, fresh: Tensor, base: Tensor | None = None) -> None:
        keep(self.turns[event.turn], self.branches, fresh, base, focus=self.focus)

    def _applied(self, event: Event) -> Tensor:
        """Hidden states with kept values in the place of what is not run."""
        gate = self.modulation.of_half(event.half // 2, event.half % 2)[2] if event.site in HALVES else None
        return given(self.turns[event.turn], self.branches, self.hidden, gate, focus=self.focus)
