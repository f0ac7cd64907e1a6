"""The caches of one call of a pipeline: what its networks keep and give again, whichever way it batches branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.bind import normal_form
from vivace.engine.caching import READS, CachedRow, CachePlan, RowUse, caches, share_of
from vivace.engine.guards import Watch, watched
from vivace.engine.kept import Kept, KeptMemory, Sample, Turn, split
from vivace.engine.passes.rules import absolute
from vivace.engine.plan import Action, Binding, Guard, Plan, Step, Variant
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, StateError, UnsupportedError
from vivace.models.caching.foreign import Cached, Keeper
from vivace.models.caching.foreign_looks import Aside, Look, check_metric, metrics_of
from vivace.models.pipelines.branches import batch_of, half, output_of, with_output

ONE = "cond"  # the branch of plans that leave guidance to the pipeline


def gives_again(plan: Plan) -> bool:
    """Some row may give kept values."""
    rules = (rule for variant in plan.variants for rule in variant.rules)
    return any(rule.action in READS for rule in rules)


@dataclass(frozen=True, slots=True)
class CachedRows:
    """The evaluated rows of a plan. looks: of each row the guard that looks at it, None where nobody does.

    numbers: of these rows in the plan, those without evaluation counted too.
    """

    plan: CachePlan
    numbers: tuple[int, ...]
    steps: tuple[Step, ...]
    rows: tuple[CachedRow, ...]
    looks: tuple[Guard | None, ...]


def cached_rows(plan: Plan, blocks: int) -> CachedRows:
    """The rows of a plan for networks of that many blocks. Raises ArgumentError for a plan bound to another number."""
    if plan.binding is not None and plan.binding.blocks != blocks:
        raise ArgumentError(
            f"the plan is bound to a model of {plan.binding.blocks} blocks, the pipeline's has {blocks}"
        )
    bound = plan if plan.binding is not None else _bound(plan, blocks)
    evaluated = [i for i, step in enumerate(bound.steps) if step.variant is not None]
    found = caches(bound)
    looks = tuple(watched(bound, i) for i in evaluated)
    steps, rows = tuple(bound.steps[i] for i in evaluated), tuple(found.rows[i] for i in evaluated)
    return CachedRows(found, tuple(evaluated), steps, rows, looks)


def _bound(plan: Plan, blocks: int) -> Plan:
    """The plan with its blocks counted from the start; what else a binding says is not known here."""
    made = replace(plan, binding=Binding("pipeline", blocks, 1, 1, (1,)))

    def counted(variant: Variant) -> Variant:
        rules = tuple(replace(rule, blocks=absolute(made, rule.blocks, "accelerate")) for rule in variant.rules)
        return replace(variant, rules=normal_form(rules, variant.branches))

    steps = []
    for step in plan.steps:
        guard = None if step.guard is None else replace(step.guard, otherwise=counted(step.guard.otherwise))
        variant = None if step.variant is None else counted(step.variant)
        steps.append(replace(step, variant=variant, guard=guard))
    return replace(made, steps=tuple(steps))


@dataclass(frozen=True, slots=True)
class Given:
    """Share of an evaluation's work that was computed, and how many sites were reused and forecast."""

    share: float = 1.0
    reused: int = 0
    forecast: int = 0


class Offer:
    """What a pipeline's networks can run of a plan, as executors ask it of a `Denoiser`."""

    precisions: frozenset[str] = frozenset()

    def __init__(self, plan: Plan, networks: Mapping[str, Any]) -> None:
        self.models = ("main", *(variant.model for variant in plan.variants))
        speaks = gives_again(plan) or any(step.guard is not None for step in plan.steps)
        self._cached = [Cached(network) for network in networks.values()] if speaks else []
        every = [each.sites for each in self._cached]
        self.sites = frozenset.intersection(*every) if every else frozenset()
        metrics = [metrics_of(each) for each in self._cached]
        self.metrics = frozenset.intersection(*metrics) if metrics else frozenset()
        self._check(plan)

    def why_not_kept(self, site: str, blocks: tuple[int, int]) -> str | None:
        """Nothing here: `_check` asks with blocks that are counted."""
        return None

    def _check(self, plan: Plan) -> None:
        """Raise UnsupportedError naming the first row whose caches a network cannot run; PlanError."""
        if self._cached:
            verify(plan)
        for cached in self._cached:
            rows = cached_rows(plan, len(cached.parts.blocks))
            for i, step in enumerate(rows.steps):
                for variant in (step.variant, None if step.guard is None else step.guard.otherwise):
                    if variant is not None and (why := cached.why_not(variant)) is not None:
                        raise UnsupportedError(f"evaluation {i}: a pipeline's network cannot run it: {why}")


class CallCaches:
    """What one call of a pipeline keeps, by network and branch; made anew where its run starts anew.

    silent: the plan leaves guidance to the pipeline, so that its one branch stands for all those the pipeline runs. A
    guard decides once a row for all pictures: it fires where it fires for each of them. Where branches are calls of
    their own, the first call decides.
    """

    def __init__(self, plan: Plan, network: Any, silent: bool) -> None:
        self._networks: dict[int, Cached] = {}
        self.rows = cached_rows(plan, len(self._of(network).parts.blocks))
        self.silent, self.memory = silent, KeptMemory()
        self.watch: Watch | None = None
        self._counts: dict[int, tuple[int, int]] = {}  # by evaluation: sites reused and forecast
        self._kept: dict[tuple[str, str], Kept] = {}
        self._fired: dict[int, bool] = {}

    def run(self, number: int, name: str, network: Any, branches: Sequence[str], args: Any, kwargs: Any) -> Any:
        """What a network answers in evaluation `number` to rows [branch][picture].

        branches: of the batch, in order; name: of the network. Raises StateError where nothing was kept.
        """
        cached, batch = self._of(network), batch_of(args, kwargs)
        pictures = batch // len(branches)
        rows = [(branch, picture) for branch in branches for picture in range(pictures)]
        if self.silent:
            rows = [(ONE, row) for row in range(batch)]
        fired, look = self._decide(number, cached, rows, pictures, args, kwargs)
        row, step = self.rows.rows[number], self.rows.steps[number]
        uses = row.otherwise if fired else row.uses
        turns = self._turns(uses, number, name, branches, pictures)
        self._count(number, uses, branches)
        parts = [((ONE,), tuple(turns))] if self.silent else split(branches, turns)
        assert step.variant is not None, "rows are evaluated"
        if len(parts) == 1:
            return _forward(cached, parts[0][1], rows, look, args, kwargs)
        results, outs = None, {}
        for names, mine in parts:
            (branch,) = names  # there are two branches in a batch
            which = branches.index(branch)
            own = [(branch, picture) for picture in range(pictures)]
            seen = None if look is None else _half_of(look, pictures, which)
            given = half(args, batch, which), half(kwargs, batch, which)
            results = _forward(cached, mine, own, seen, *given)
            outs[branch] = output_of(results)
        return with_output(results, torch.cat([outs[branch] for branch in branches]))

    def told(self) -> dict[str, Any]:
        """Cells and bytes, for the receipt."""
        per = len(self._kept) if self.silent else 1
        kept = sum(each.nbytes for each in self._kept.values())
        return {
            "cells": per * len(self.rows.plan.planes),
            "planes": per * sum(self.rows.plan.planes.values()),
            "bytes_planned": None,
            "bytes": kept + (self.watch.nbytes if self.watch is not None else 0),
        }

    def given(self, number: int) -> Given:
        """What an evaluation that ran computed, attention counted as a third of a block, and what it was given."""
        fired, step, row = self._fired.get(number, False), self.rows.steps[number], self.rows.rows[number]
        variant = step.guard.otherwise if fired and step.guard is not None else step.variant
        blocks = max(len(each.parts.blocks) for each in self._networks.values())
        assert variant is not None, "rows are evaluated"
        return Given(share_of(variant, row.otherwise if fired else row.uses, blocks), *self._counts.get(number, (0, 0)))

    def _of(self, network: Any) -> Cached:
        if id(network) not in self._networks:
            self._networks[id(network)] = Cached(network)
        return self._networks[id(network)]

    def _count(self, number: int, uses: Sequence[RowUse], branches: Sequence[str]) -> None:
        reused, forecast = self._counts.get(number, (0, 0))
        for item in uses:
            spoken = len(branches) if self.silent else sum(branch in item.use.branches for branch in branches)
            reused += spoken * (item.use.action == Action.REUSE)
            forecast += spoken * (item.use.action == Action.FORECAST)
        self._counts[number] = reused, forecast

    def _turns(
        self, uses: Sequence[RowUse], number: int, name: str, branches: Sequence[str], pictures: int
    ) -> list[Turn]:
        """The turns of this call."""
        variant = self.rows.steps[number].variant
        if not uses or variant is None:
            return []
        reads = any(item.use.reads for item in uses)
        whose = [self._memory(number, name, branch, pictures, reads) for branch in branches]
        if not self.silent:
            whose = whose[:1]  # one memory holds the cells of all branches
        places = [(kept, picture) for kept in whose for picture in range(pictures)]
        return [
            Turn(item.use, variant.model, tuple(Sample(kept, picture, item.weights) for kept, picture in places))
            for item in uses
            if self.silent or set(item.use.branches) & set(branches)
        ]

    def _memory(self, number: int, name: str, branch: str, pictures: int, reads: bool) -> Kept:
        """The memory of a branch, or of all of them. Raises StateError where a row would read what was not kept."""
        key = (name, branch) if self.silent else ("", "")
        if key not in self._kept:
            if reads:
                raise StateError(
                    f"evaluation {number} of the plan gives again what network {name!r} kept of branch {branch!r}, and "
                    "it kept nothing: the pipeline did not run it before. Let the first evaluation after such a change "
                    "compute everything (a plan with apply_experts does)"
                )
            self._kept[key] = Kept(self.memory, self.rows.plan, pictures)
        if self._kept[key].pictures != pictures:
            raise StateError(
                f"evaluation {number}: the pipeline hands its network {pictures} pictures a branch, it began with "
                f"{self._kept[key].pictures}; a plan with caches needs the same number in every step"
            )
        return self._kept[key]

    def _decide(
        self, number: int, cached: Cached, rows: Sequence[tuple[str, int]], pictures: int, args: Any, kwargs: Any
    ) -> tuple[bool, Look | None]:
        """Whether the row's guard fires, and the look at the first blocks that the run goes on from."""
        guard, watching = self.rows.steps[number].guard, self.rows.looks[number]
        if watching is None or number in self._fired:  # a further call of the row follows the first
            return self._fired.get(number, False), None
        self.watch = self.watch or Watch(pictures)
        if self.watch.stuck(watching):
            self._fired[number] = watching is guard and all(self.watch.stay(self.rows.numbers[number]))
            return self._fired[number], None
        check_metric(cached, watching.metric)
        look = Look(cached, rows, watching.metric, watching.params)
        cached.parts.forward(look, *args, **kwargs)
        assert look.signal is not None, "a look measures"
        signal = look.signal.unflatten(0, (-1, pictures))
        each = (False,) if guard is None else self.watch.decide(guard, signal, self.rows.numbers[number])
        if not all(each):
            self.watch.computed(watching, signal)
        if guard is not None:
            joint = (all(each),) * pictures
            self.watch.decisions[-1] = replace(self.watch.decisions[-1], fired=joint)
        self._fired[number] = all(each)
        return all(each), look


def _forward(
    cached: Cached, turns: Sequence[Turn], rows: Sequence[tuple[str, int]], look: Look | None, args: Any, kwargs: Any
) -> Any:
    """The network's forward as its turns say, from where a look ended."""
    keeper = Keeper(cached.parts, cached.wiring, turns, rows)
    if look is not None and look.block and all(turn.use.blocks[0] >= look.block for turn in turns):
        keeper.give_range(look.held, 0, look.block)
    return cached.parts.forward(keeper, *args, **kwargs)


def _half_of(look: Look, pictures: int, which: int) -> Any:
    """A look at the rows of one branch."""
    rows = slice(which * pictures, (which + 1) * pictures)
    parts: dict[int, Tensor] = {part: tensor[rows] for part, tensor in look.held.parts.items()}
    return _Held(look.block, Aside(parts))


@dataclass(frozen=True, slots=True)
class _Held:
    """What is left of a look for some of its rows."""

    block: int
    held: Aside
