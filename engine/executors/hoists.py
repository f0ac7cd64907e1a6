"""What left the loop of requests, kept for the next request with the same plan and condition."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from vivace.engine.compiled import Hoisted
from vivace.engine.plan import Plan


class Hoists(Protocol):
    """A model that computes what does not depend on x before the loop."""

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> Hoisted | None:
        """For the rows of a plan that are fed `timesteps`; None: nothing leaves the loop."""
        ...


class Kept:
    """Results of a model's `hoist`, the least recently used dropped beyond `limit`; with `on` False there are none."""

    limit = 16

    def __init__(self, model: Hoists, on: bool = True) -> None:
        self.model, self.on = model, on
        self._found: OrderedDict[Hashable, Hoisted] = OrderedDict()

    def of_plan(self, plan: Plan, condition: Any) -> Hoisted | None:
        """For every row of a plan, the row number first, and all branches of the plan."""
        branches = tuple(dict.fromkeys(branch for variant in plan.variants for branch in variant.branches))
        return self.of_rows(tuple(step.timestep for step in plan.steps), branches, condition)

    def of_rows(self, timesteps: tuple[float, ...], branches: tuple[str, ...], condition: Any) -> Hoisted | None:
        """For rows at `timesteps`."""
        if not self.on:
            return None
        key = (timesteps, branches, condition)
        if not _hashable(condition):
            return self.model.hoist(timesteps, branches, condition)
        if key not in self._found:
            made = self.model.hoist(timesteps, branches, condition)
            if made is None:
                return None
            self._found[key] = made
            if len(self._found) > self.limit:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]


def _hashable(condition: Any) -> bool:
    """The condition can be looked up; one that holds a mapping cannot, though its class says so."""
    try:
        hash(condition)
    except TypeError:
        return False
    return True
