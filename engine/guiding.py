"""Adaptive Guidance at run time: how alike the branches were, measured on the predictions of rows that ran both.

gamma = <cond, uncond> / (|cond| |uncond|) of a picture, over all elements of what the network returned. Rows without
both branches measure nothing. A guard on `METRIC` reads the last gamma of its picture before its row is evaluated, so
no block is looked at and any network will do. (Castillo et al. 2023, section 4.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vivace.engine.plan import Guard

BOTH = ("cond", "uncond")


@dataclass(slots=True)
class Cosines:
    """The last gamma of every picture of a request, float64 scalars on the device; None: no row measured it yet.

    keeps: the differences cond - uncond of that row are kept too, float32 at least; fires: rows since it.
    """

    last: list[Tensor | None]
    keeps: bool = False
    stuck: list[bool] = field(init=False)
    fires: list[int] = field(init=False)
    differences: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.last)
        self.stuck, self.fires, self.differences = [False] * count, [0] * count, [None] * count

    def note(self, picture: int, cond: Tensor, uncond: Tensor) -> None:
        """Measure the predictions [...] of a picture; nothing waits for the device."""
        self.last[picture], self.fires[picture] = cosine(cond, uncond), 0
        if self.keeps:
            self.differences[picture] = _wide(cond) - _wide(uncond)

    def estimate(self, picture: int, cond: Tensor) -> Tensor:
        """What is read for uncond where it did not run: cond, or cond - the kept difference."""
        kept = self.differences[picture]
        return cond if kept is None else (_wide(cond) - kept).to(cond.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the differences."""
        return sum(kept.nbytes for kept in self.differences if kept is not None)

    def decide(self, guard: Guard) -> tuple[tuple[bool, ...], tuple[float | None, ...]]:
        """Whether the guard fires, by picture, and the gammas it compared, None where it fired for good before.

        Reads the device once, unless it fired for all. A picture that was not measured yet never fires.
        """
        if guard.sticky and all(self.stuck):
            return (True,) * len(self.last), (None,) * len(self.last)
        known = [gamma for gamma in self.last if gamma is not None]
        numbers = iter(torch.stack(known).tolist() if known else ())
        values = [math.nan if gamma is None else float(next(numbers)) for gamma in self.last]
        stays = [guard.sticky and stuck for stuck in self.stuck]
        most = guard.params[0] if guard.params else math.inf  # rows in a row that an estimate serves
        fired = [
            stay or (count < most and (value > guard.threshold if guard.rule == "above" else value < guard.threshold))
            for stay, count, value in zip(stays, self.fires, values, strict=True)
        ]
        self.fires = [count + fires for count, fires in zip(self.fires, fired, strict=True)]
        self.stuck = [fires and guard.sticky for fires in fired]
        compared = [None if stay or math.isnan(v) else v for stay, v in zip(stays, values, strict=True)]
        return tuple(fired), tuple(compared)


def cosine(cond: Tensor, uncond: Tensor) -> Tensor:
    """gamma of two predictions of one picture: a float64 scalar on their device, NaN where one of them is 0."""
    a, b = cond.double(), uncond.double()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def _wide(x: Tensor) -> Tensor:
    """In float32, float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, slots=True)
class Hearers:
    """Who notes the predictions of a group's samples: cosines and picture of each, None where its plan does not ask."""

    samples: tuple[tuple[Cosines, int] | None, ...]

    def heard(self, names: Sequence[str], ran: Sequence[str], outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Predictions `outs` [n, ...] of branches `names`, of which `ran` were computed, noted where both were; else
        with what is estimated of uncond."""
        if set(BOTH) <= set(ran):
            self._note(names, outs)
            return outs
        keeping = any(sample is not None and sample[0].keeps for sample in self.samples)
        if "uncond" not in names or not keeping:
            return outs
        cond = outs[list(names).index("cond")]
        made = [row if s is None else s[0].estimate(s[1], row) for s, row in zip(self.samples, cond, strict=True)]
        return tuple(torch.stack(made) if name == "uncond" else out for name, out in zip(names, outs, strict=True))

    def _note(self, names: Sequence[str], outs: Sequence[Tensor]) -> None:
        found: Mapping[str, Tensor] = dict(zip(names, outs, strict=True))
        for n, sample in enumerate(self.samples):
            if sample is not None:
                cosines, picture = sample
                cosines.note(picture, found["cond"][n], found["uncond"][n])
