"""Merged tokens: what a request keeps for them, and what a group of rows merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vivace.engine.merge_rows import MergeRow, merge_bytes, merges
from vivace.engine.plan import Plan


@dataclass(slots=True, eq=False)
class Merges:
    """What merging keeps of a request's pictures, from its first use to the end of the request.

    seeds, pictures: of each; maps: (model, block, place in the block) -> of each picture (int32 [N] merged token of
    each token, int32 [M] the token that each merged one stands for); importance: of each picture |cond - uncond|,
    float32 [*spatial], mean over channels, of the last evaluation with both; grids: (height, width) by tokens.
    """

    seeds: tuple[int, ...]
    pictures: tuple[int, ...]
    wants: bool = False  # importance
    maps: dict[tuple[str, int, int], dict[int, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    importance: dict[int, Tensor] = field(default_factory=dict)
    grids: dict[int, tuple[int, int]] = field(default_factory=dict)
    made: int = 0  # maps made, and used again, of one picture
    used: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of maps and importance."""
        of_maps = sum(t.nbytes for each in self.maps.values() for pair in each.values() for t in pair)
        return of_maps + sum(t.nbytes for t in self.importance.values())

    def note(self, picture: int, cond: Tensor, uncond: Tensor) -> None:
        """Keep a picture's importance: predictions [C, *spatial] of both branches, or [N, C] of packed tokens."""
        axis = 0 if cond.dim() != 2 else 1
        self.importance[picture] = (cond.float() - uncond.float()).abs().mean(dim=axis)

    def told(self, plan: Plan) -> dict[str, Any]:
        """For the receipt."""
        per = merge_bytes(plan)
        planned = None if per is None else per * len(self.pictures)
        return {"layers": len(self.maps), "made": self.made, "reused": self.used, "bytes_planned": planned} | {
            "bytes": self.nbytes
        }


def unmerged(plan: Plan, state: Merges | None) -> tuple[str, ...]:
    """A warning where merging was asked for and no token was merged."""
    named = plan.recipe is not None and any(name == "apply_merge" for name, _ in plan.recipe.passes)
    if not (named or merges(plan)) or (state is not None and state.maps):
        return ()
    return ("merging had no effect: no token was merged (apply_merge)",)


@dataclass(frozen=True, slots=True)
class MergeSample:
    """One picture's side of a merge: whose maps, which of its pictures, at which row of its plan."""

    state: Merges
    picture: int
    row: int


@dataclass(frozen=True, slots=True)
class Merging:
    """What a group's row merges, and for whom. row: None where it merges nothing; samples: None: it keeps nothing."""

    model: str
    row: MergeRow | None
    samples: tuple[MergeSample | None, ...]

    def pick(self, positions: Sequence[int]) -> Merging:
        """The same for some of the samples."""
        return Merging(self.model, self.row, tuple(self.samples[position] for position in positions))

    def note(self, outs: Mapping[str, Tensor]) -> None:
        """Keep what later rows need of predictions [n, ...] by branch; nothing where a branch is missing."""
        if "cond" in outs and "uncond" in outs:
            for position, sample in enumerate(self.samples):
                if sample is not None and sample.state.wants:
                    sample.state.note(sample.picture, outs["cond"][position], outs["uncond"][position])
