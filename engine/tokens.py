"""Which image tokens a row computes: what a network is handed, and the state of every token of a request.

The ids of a row are chosen before its network runs and told to nobody on the host. State changes once the network has
answered, so a row that failed can be tried again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vivace.engine.caching import Cell, caches
from vivace.engine.kept import Kept
from vivace.engine.noise import philox_words
from vivace.engine.plan import Plan
from vivace.engine.token_layout import Layout
from vivace.engine.token_rows import TokenRow, branch_weights, token_rows, tokens_of
from vivace.errors import ArgumentError, UnsupportedError

__all__ = ["Focus", "TokenRow", "Tokens", "token_rows"]

STEADY = 1 << 20  # rows without a gap before the first one: a token that was never left out is steady
FIRST_DRAW = 1 << 31  # of random selections, beyond every draw of a solver
OLDEST = 256  # ages that factors tell apart where no bound is given


@dataclass(frozen=True, slots=True, eq=False)
class Focus:
    """The image tokens that a group computes in a row. ids: int32 [n, M], ascending, on the device; tokens: all, N."""

    ids: Tensor
    tokens: int

    @property
    def count(self) -> int:
        """Tokens computed of every sample, M."""
        return int(self.ids.shape[1])

    def pick(self, positions: Sequence[int]) -> Focus:
        """The same for some of the samples."""
        return Focus(some_of(self.ids, positions), self.tokens)


class Tokens:
    """The tokens of one request: a plan run for some pictures.

    Args:
        pictures: numbers of the pictures, seed: of the request, or one of each; random selections are drawn by them.
        layout: where tokens lie in latents.
        like: a tensor on the device, of the dtype of predictions.
        values: numbers of the request by input name. mask: [n, *shape], above 0 where selector "mask" computes.
    Raises: ArgumentError for no mask, or one that touches no token or more than a row computes; UnsupportedError where
        a selection needs a number and the request gives a tensor.

    ages int32 [n, N]: rows since each token was computed, 0 in the last evaluated row; run int32 [n, N]: rows up to now
    in which it was computed without a gap; computed int32 [n, N]: evaluations so far that computed it; outs: by branch
    the raw prediction [n, *shape], of every token the newest; before: that one's predecessor, for selector "change";
    ids: the last selection; classes uint8 [n, N]: of the row that was evaluated last, see `AgeRef`.
    """

    def __init__(
        self,
        plan: Plan,
        pictures: Sequence[int],
        seed: int | Sequence[int],
        layout: Layout,
        like: Tensor,
        values: Mapping[str, float],
        mask: Tensor | None = None,
    ) -> None:
        self.plan, self.pictures, self.layout = tokens_of(plan), tuple(pictures), layout
        self.seeds = (seed,) * len(self.pictures) if isinstance(seed, int) else tuple(seed)
        self.grid, self.count, n = layout.grid, layout.tokens, len(self.pictures)
        self.ages = torch.zeros((n, self.count), dtype=torch.int32, device=like.device)
        self.run, self.computed = self.ages + STEADY, torch.zeros_like(self.ages)
        self.outs: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.difference: tuple[Tensor, ...] = ()  # cond and uncond of the last row that had both, kept for "guidance"
        self.ids: Tensor | None = None
        self.classes: Tensor | None = None
        self.kept: Kept | None = None  # memory of the request, where rows with all tokens leave what "attention" reads
        self._received = _received(plan)
        self._changes = any(row is not None and row.selector == "change" for row in self.plan.rows)
        self._guided = any(row is not None and row.stale for row in self.plan.rows)
        self._weights = _weights(plan, self.plan.rows, values, like.device)
        self._factors = {row.params: _factors(row, like.device) for row in self.plan.rows if row is not None}
        self.near: Tensor | None = None
        if _reads_mask(self.plan.rows):
            if mask is None:
                raise ArgumentError("request: selector 'mask' goes by input 'mask' as a tensor, not a number")
            self.near = self._near(mask)

    def planes(self, number: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(planes, weights [1, P]) that row `number` ranks by; none where it ranks by scores."""
        row = self._row(number)
        if number not in self._weights:
            return (), None
        if row.stale:
            return tuple(map(self.layout.planes, self.difference)), self._weights[number]
        planes = tuple(self.layout.planes(self.outs[branch]) for branch in row.reads)
        if row.selector == "change":
            planes += tuple(self.layout.planes(self.before[branch]) for branch in row.reads)
        return planes, self._weights[number]

    def scores(self, number: int) -> Tensor | None:
        """Scores [n, N] that row `number` ranks by; None where it ranks by planes."""
        selector = self._row(number).selector
        if selector == "random":
            draw = FIRST_DRAW + number
            drawn = zip(self.seeds, self.pictures, strict=True)
            words = [philox_words(seed, picture, draw, self.count) >> 8 for seed, picture in drawn]
            return _sent(torch.from_numpy(np.stack(words).astype(np.float32)), self.ages.device)
        if selector == "mask":
            return self.near
        if selector == "attention":
            assert self.kept is not None, "a request with such a row keeps what tokens received"
            slab, lanes = self.kept.places[self._received[number], 0]
            return some_of(slab.values, lanes)[:, 0]
        return None

    def factors(self, number: int) -> Tensor | None:
        """Of row `number`: exp(-starvation age) by age, float32; None: 1."""
        return self._factors[self._row(number).params]

    @property
    def heat(self) -> Tensor:
        """How many evaluations computed each token, int32 [n, *grid]."""
        return self.computed.view(len(self.pictures), *self.grid).clone()

    @property
    def nbytes(self) -> int:
        """Bytes of all this."""
        held = [self.ages, self.run, self.computed, *self.outs.values(), *self.before.values(), *self.difference]
        return sum(tensor.nbytes for tensor in held)

    def keep_outs(
        self, number: int, outs: Mapping[str, Tensor], pictures: Sequence[int], active: Tensor | None
    ) -> None:
        """Take over the complete predictions of row `number` for some pictures. active: pixels computed, None: all."""
        whole = len(pictures) == len(self.pictures)
        if self._guided and "uncond" not in outs and not self.difference and "uncond" in self.outs:
            self.difference = (self.outs["cond"].clone(), self.outs["uncond"])
        elif "uncond" in outs:
            self.difference = ()
        for branch, out in outs.items():
            if branch not in self.plan.after[number]:
                continue
            if branch not in self.outs:
                self.outs[branch] = out.new_zeros((len(self.pictures), *out.shape[1:]))
            mine = self.outs[branch]
            if self._changes:
                older = self.before.setdefault(branch, torch.zeros_like(mine))
                was = mine if whole else some_of(mine, pictures)
                now = was if active is None else torch.where(active, was, older if whole else some_of(older, pictures))
                put(older, pictures, now)
            put(mine, pictures, out)

    def _row(self, number: int) -> TokenRow:
        row = self.plan.rows[number]
        assert row is not None, "rows that select are token rows"
        return row

    def _near(self, mask: Tensor) -> Tensor:
        """Squared distance [n, N] of every token from the nearest one that the mask touches, in tokens."""
        n, axes = len(mask), len(self.grid)
        cut = [part for size, edge in zip(self.grid, self.layout.patch, strict=True) for part in (size, edge)]
        within = (self.layout.planes(mask).float().cpu() > 0).any(dim=1).reshape(n, *cut)
        touched = within.amax(dim=tuple(2 + 2 * axis for axis in range(axes))).view(n, -1)
        least = min(int(row.keep) for row in self.plan.rows if row is not None and row.selector in ("mask", "same"))
        places = torch.cartesian_prod(*(torch.arange(size) for size in self.grid)).view(-1, axes).float()
        found = torch.zeros((n, self.count))
        for picture, mine in enumerate(touched):
            count = int(mine.sum())
            if not 0 < count <= least:
                raise ArgumentError(
                    f"request: the mask of picture {picture} touches {count} of {self.count} tokens, rows of the plan "
                    f"compute {least}; " + ("mark what is to be edited" if not count else "raise keep or mark less")
                )
            inside = places[mine]
            for part in range(0, self.count, 1024):
                apart = places[part : part + 1024, None, :] - inside[None, :, :]
                found[picture, part : part + 1024] = apart.square().sum(dim=2).amin(dim=1)
        return _sent(found, self.ages.device)


def _reads_mask(rows: Sequence[TokenRow | None]) -> bool:
    return any(row is not None and row.selector == "mask" for row in rows)


def _received(plan: Plan) -> dict[int, Cell]:
    """Of rows that rank by attention the cell of branch "cond" in which it lies."""
    found = {}
    for number, step in enumerate(plan.steps):
        if step.variant is not None and step.variant.selector == "attention":
            block = next(rule.blocks[1] for rule in step.variant.rules if rule.site == "received")
            found[number] = caches(plan).cells[step.variant.model, "received", block, "cond"]
    return found


def _weights(
    plan: Plan, rows: Sequence[TokenRow | None], values: Mapping[str, float], device: torch.device
) -> dict[int, Tensor]:
    """Weights [1, P] on the planes that each row ranks by, sent to the device at once."""
    found: dict[int, list[float]] = {}
    for number, row in enumerate(rows):
        if row is None or not row.reads:
            continue
        if row.selector == "guidance":
            found[number] = [1.0, -1.0]
            continue
        last = next(step for step in reversed(plan.steps[:number]) if step.variant is not None)
        try:
            by_branch = branch_weights(last, values)
        except KeyError as error:
            raise UnsupportedError(
                f"step {number}: selector {row.selector!r} needs input {error.args[0]!r} as a number, not a tensor"
            ) from None
        weights = [by_branch[branch] for branch in row.reads]
        found[number] = weights + [-weight for weight in weights] if row.selector == "change" else weights
    if not found:
        return {}
    widest = max(map(len, found.values()))
    table = _sent(torch.tensor([each + [0.0] * (widest - len(each)) for each in found.values()]).float(), device)
    return {number: table[k : k + 1, : len(found[number])] for k, number in enumerate(found)}


def _factors(row: TokenRow, device: torch.device) -> Tensor | None:
    """exp(-starvation age) by age; None without starvation."""
    if not row.starvation:
        return None
    ages = range(row.bound + 1 if row.bound >= 0 else OLDEST)
    return _sent(torch.tensor([math.exp(-row.starvation * age) for age in ages], dtype=torch.float32), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def some_of(tensor: Tensor, positions: Sequence[int]) -> Tensor:
    """Rows of a tensor: a view where they lie in order. Positions are known on the host, so nothing waits."""
    first, count = positions[0], len(positions)
    if tuple(positions) == tuple(range(first, first + count)):
        return tensor if count == len(tensor) else tensor[first : first + count]
    return torch.cat([tensor[position : position + 1] for position in positions])


def put(tensor: Tensor, positions: Sequence[int], values: Tensor) -> None:
    """Write rows of a tensor in place."""
    first, count = positions[0], len(positions)
    if tuple(positions) == tuple(range(first, first + count)):
        tensor[first : first + count].copy_(values)
        return
    for position, value in zip(positions, values, strict=True):
        tensor[position].copy_(value)
