"""Adaptive Guidance in a pipeline's loop: one decision a row for all pictures of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from vivace.engine.guards import Decision, Watch
from vivace.engine.guiding import BOTH
from vivace.engine.looking import HEARD, hears
from vivace.engine.plan import Plan, Step


class Adaptive:
    """The guards of one call; what they measure is begun anew where its run starts anew, what they decided is kept."""

    def __init__(self, plan: Plan) -> None:
        self.asked = hears(plan)
        self._watch: Watch | None = None
        self._stopped: dict[int, bool] = {}
        self._decisions: list[Decision] = []

    def restart(self) -> None:
        """Nothing was measured yet."""
        self._watch = None
        self._stopped = {}

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """By row of the plan, for the receipt."""
        return tuple(self._decisions)

    def row(self, number: int, step: Step) -> Step:
        """The row with the branches that it runs: its guard's where that fires for every picture. Decided once."""
        guard = step.guard
        if guard is None or guard.metric not in HEARD or self._watch is None:
            return step
        if number not in self._stopped:
            fired = all(self._watch.recall(guard, number))
            self._decisions[-1] = replace(self._decisions[-1], fired=(fired,) * self._watch.pictures)
            self._stopped[number] = fired
        return replace(step, variant=guard.otherwise) if self._stopped[number] else step

    def note(self, outs: Mapping[str, Tensor]) -> None:
        """Measure the predictions [n, ...] of a row by branch."""
        if not self.asked or not set(BOTH) <= outs.keys():
            return
        pictures = len(outs["cond"])
        self._watch = self._watch or Watch(pictures, self._decisions)
        for picture in range(pictures):
            self._watch.cosines.note(picture, outs["cond"][picture], outs["uncond"][picture])
