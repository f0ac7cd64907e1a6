"""The image tokens of a request: chosen before a row's network, put together with the others after it.

The state and the order of its changes are those of `engine.tokens` and `engine.focusing`, for one request, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vivace.engine.noise import philox_words
from vivace.engine.plan import Plan
from vivace.engine.token_layout import Layout
from vivace.engine.token_rows import TokenRow, branch_weights, tokens_of
from vivace.errors import ArgumentError, UnsupportedError
from vivace.runtime.select import scores_of, select_tokens

Array: TypeAlias = NDArray[Any]
STEADY = 1 << 20  # rows without a gap before the first one: a token that was never left out is steady
FIRST_DRAW = 1 << 31  # of random selections, beyond every draw of a solver
OLDEST = 256  # ages that factors tell apart where no bound is given


class Tokens:
    """The tokens of a bound plan's run for pictures `pictures` of a seed.

    ages, run, computed: int32 [n, N], rows since each token was computed, rows up to now without a gap, evaluations
    that computed it; outs: by branch the newest raw prediction [n, *shape] of every token; classes: uint8 [n, N] of the
    row evaluated last, see `AgeRef`. Raises ArgumentError, UnsupportedError as the engine does.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        pictures: Sequence[int],
        seed: int,
        values: Mapping[str, float],
        mask: Array | None = None,
    ) -> None:
        self.plan, self.layout, self.pictures, self.seed = tokens_of(plan), layout, tuple(pictures), seed
        n, self.count = len(self.pictures), layout.tokens
        self.ages = np.zeros((n, self.count), np.int32)
        self.run, self.computed = self.ages + STEADY, np.zeros_like(self.ages)
        self.classes = np.zeros((n, self.count), np.uint8)
        self._classed = False
        self.told: dict[int, Array] = {}
        self.outs: dict[str, Array] = {}
        self._before: dict[str, Array] = {}
        self._difference: tuple[Array, ...] = ()  # cond and uncond of the last row that had both
        self._ids: Array | None = None
        rows = [row for row in self.plan.rows if row is not None]
        self._changes = any(row.selector == "change" for row in rows)
        self._guided = any(row.stale for row in rows)
        self._weights = _weights(plan, self.plan.rows, values)
        self._near: Array | None = None
        if any(row.selector == "mask" for row in rows):
            if mask is None:
                raise ArgumentError("request: selector 'mask' goes by input 'mask' as a tensor, not a number")
            self._near = _near(mask, layout, min(int(row.keep) for row in rows if row.selector in ("mask", "same")))

    def select(self, number: int, pictures: Sequence[int], received: Array | None) -> tuple[Array, Array]:
        """(ids int64 [m, keep], ages behind it) of row `number` for some pictures; state stays as it is.

        received: what tokens received of attention, float32 [n, N], for the selector "attention".
        """
        row, mine = self._row(number), list(pictures)
        ages = self.ages[mine]
        if row.selector == "same":
            assert self._ids is not None, "a row with the same tokens comes behind one that chose"
            return self._ids[mine], ages
        if number in self.told:
            ids = self.told[number][mine].astype(np.int64)
            return ids, np.where(self._active(ids), 0, ages + 1).astype(np.int32)
        return select_tokens(
            self._scores(row, number, mine, received),
            ages,
            int(row.keep),
            drop_high=row.drop_high,
            factors=_factors(row),
            bound=row.bound,
            least=int(row.least),
        )

    def merge(
        self, number: int, pictures: Sequence[int], outs: Mapping[str, Array], chosen: tuple[Array, Array] | None
    ) -> dict[str, Array]:
        """Predictions of all tokens [m, *shape] by branch, from those of row `number`; the state is now behind it.

        chosen: what `select` gave, None for a row of all tokens.
        """
        mine = list(pictures)
        active = None if chosen is None else self._active(chosen[0])
        self._classify(number, mine, active)
        pixels = None if active is None else pixels_of(self.layout, active)
        made = dict(outs)
        if pixels is not None:
            made = {branch: np.where(pixels, out, self.outs[branch][mine]) for branch, out in outs.items()}
        self._keep_outs(number, made, mine, pixels)
        self._counted(number, mine, active, chosen)
        return made

    def _active(self, ids: Array) -> Array:
        """bool [m, N]: computed."""
        active = np.zeros((len(ids), self.count), bool)
        np.put_along_axis(active, ids, True, axis=1)
        return active

    def _scores(self, row: TokenRow, number: int, mine: list[int], received: Array | None) -> Array:
        if row.selector == "random":
            drawn = [philox_words(self.seed, self.pictures[j], FIRST_DRAW + number, self.count) >> 8 for j in mine]
            return np.stack(drawn).astype(np.float32)
        if row.selector == "mask":
            assert self._near is not None, "a plan with such rows has its mask"
            return self._near[mine]
        if row.selector == "attention":
            assert received is not None, "a request with such a row keeps what tokens received"
            return received[mine]
        if row.stale:
            planes = list(self._difference)
        else:
            planes = [self.outs[branch] for branch in row.reads]
            if row.selector == "change":
                planes += [self._before[branch] for branch in row.reads]
        laid = [planes_of(self.layout, plane[mine]) for plane in planes]
        metric = "deviation" if row.selector == "deviation" else "norm"
        return scores_of(laid, self._weights[number], self.layout.patch, metric)

    def _classify(self, number: int, mine: list[int], active: Array | None) -> None:
        """Classes: 0 left out, 1 computed as in `depth` rows before, 1 + k k rows ago before that, last: older."""
        if not self.plan.classes[number] or (self.plan.stages[number] and self._classed):
            return
        gap = np.minimum(self.ages[mine], self.plan.gaps) + 2
        found = np.where(self.run[mine] >= self.plan.depth, 1, gap)
        self.classes[mine] = found if active is None else found * active
        self._classed = True

    def _keep_outs(self, number: int, outs: Mapping[str, Array], mine: list[int], pixels: Array | None) -> None:
        """Take over the complete predictions of a row."""
        if self._guided and "uncond" not in outs and not self._difference and "uncond" in self.outs:
            self._difference = (self.outs["cond"].copy(), self.outs["uncond"].copy())
        elif "uncond" in outs:
            self._difference = ()
        for branch, out in outs.items():
            if branch not in self.plan.after[number]:
                continue
            if branch not in self.outs:
                self.outs[branch] = np.zeros((len(self.pictures), *out.shape[1:]), out.dtype)
            held = self.outs[branch]
            if self._changes:
                older = self._before.setdefault(branch, np.zeros_like(held))
                older[mine] = held[mine] if pixels is None else np.where(pixels, held[mine], older[mine])
            held[mine] = out

    def _counted(self, number: int, mine: list[int], active: Array | None, chosen: tuple[Array, Array] | None) -> None:
        """Ages, runs and counts behind the row; further evaluations of a step change the counts alone."""
        self.computed[mine] += 1 if active is None else active.astype(np.int32)
        if self.plan.stages[number]:
            return
        run = self.run[mine] + 1
        self.run[mine] = run if active is None else run * active
        if chosen is None:
            self.ages[mine] = 0
            return
        ids, self.ages[mine] = chosen
        if self._ids is None or self._ids.shape[1] != ids.shape[1]:
            self._ids = np.zeros((len(self.pictures), ids.shape[1]), np.int64)
        self._ids[mine] = ids

    def _row(self, number: int) -> TokenRow:
        row = self.plan.rows[number]
        assert row is not None, "rows that select are token rows"
        return row


def planes_of(layout: Layout, latents: Array) -> Array:
    """Latents [n, *shape] as [n, channels, places...]."""
    if layout.packed:
        return latents.reshape(*latents.shape[:2], -1, layout.places).transpose(0, 2, 1, 3)
    return np.moveaxis(latents, 1 + layout.channels, 1)


def pixels_of(layout: Layout, tokens: Array) -> Array:
    """A value of each token [n, N] for each element: [n, *shape] with 1 for the axis of channels."""
    axes = [axis for axis in range(len(layout.shape)) if axis != layout.channels]
    grid = [layout.shape[axis] // layout.edges[axis] for axis in axes]
    wide = tokens.reshape(len(tokens), *grid)
    for place, axis in enumerate(axes):
        wide = wide.repeat(layout.edges[axis], axis=1 + place)
    return np.expand_dims(wide, 1 + layout.channels)


def _weights(plan: Plan, rows: Sequence[TokenRow | None], values: Mapping[str, float]) -> dict[int, list[float]]:
    """Weights on the planes that each row ranks by."""
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
    return found


def _factors(row: TokenRow) -> Array | None:
    """exp(-starvation age) by age; None without starvation."""
    if not row.starvation:
        return None
    ages = range(row.bound + 1 if row.bound >= 0 else OLDEST)
    return np.array([math.exp(-row.starvation * age) for age in ages], np.float32)


def _near(mask: Array, layout: Layout, least: int) -> Array:
    """Squared distance [n, N] of every token from the nearest one that the mask touches, in tokens."""
    n, grid = len(mask), layout.grid
    cut = [part for size, edge in zip(grid, layout.patch, strict=True) for part in (size, edge)]
    within = (planes_of(layout, mask) > 0).any(axis=1).reshape(n, *cut)
    touched = within.max(axis=tuple(2 + 2 * axis for axis in range(len(grid)))).reshape(n, -1)
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, len(grid))
    found = np.zeros((n, layout.tokens), np.float32)
    for picture, mine in enumerate(touched):
        count = int(mine.sum())
        if not 0 < count <= least:
            raise ArgumentError(
                f"request: the mask of picture {picture} touches {count} of {layout.tokens} tokens, rows of the plan "
                f"compute {least}; " + ("mark what is to be edited" if not count else "raise keep or mark less")
            )
        for part in range(0, layout.tokens, 1024):
            apart = places[part : part + 1024, None, :] - places[mine][None, :, :]
            found[picture, part : part + 1024] = (apart**2).sum(axis=2).min(axis=1)
    return found
