"""The caches of one call of a pipeline: what its networks keep and give again, whichever way it batches branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.bind import normal_form, token_count
from vivace.engine.caching import KEYS, READS, CachedRow, CachePlan, RowUse, caches, share_of
from vivace.engine.guards import Watch
from vivace.engine.kept import Kept, KeptMemory, Sample, Turn, split
from vivace.engine.looking import HEARD, watched
from vivace.engine.merge_rows import SITE, guided, merge_row, merges
from vivace.engine.merging import Merges, MergeSample, Merging
from vivace.engine.passes.rules import absolute
from vivace.engine.plan import Action, Binding, Guard, Plan, Step, Variant
from vivace.engine.token_layout import Layout
from vivace.engine.token_rows import focused, token_rows, tokens_of
from vivace.engine.tokens import Focus
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, StateError, UnsupportedError
from vivace.models.caching.foreign import Cached, Keeper
from vivace.models.caching.foreign_looks import Aside, Look, check_metric, metrics_of
from vivace.models.caching.layers import layers_in
from vivace.models.pipelines.branches import batch_of, half, latent_of, numbers_of, output_of, with_output
from vivace.models.tokens.active import Active
from vivace.models.tokens.called import CallTokens
from vivace.models.tokens.foreign import check_inputs
from vivace.models.tokens.merging import Merger

ONE = "cond"  # the branch of plans that leave guidance to the pipeline


def gives_again(plan: Plan) -> bool:
    """Some row may give kept values, or merges tokens by kept maps."""
    rules = (rule for variant in plan.variants for rule in variant.rules)
    return any(rule.action in READS or rule.site == SITE for rule in rules)


@dataclass(frozen=True, slots=True)
class CachedRows:
    """The evaluated rows of a plan. looks: of each row the guard that looks at it, None where nobody does.

    numbers: of these rows in the plan, those without evaluation counted too; bound: that plan.
    """

    plan: CachePlan
    numbers: tuple[int, ...]
    steps: tuple[Step, ...]
    rows: tuple[CachedRow, ...]
    looks: tuple[Guard | None, ...]
    bound: Plan

    @property
    def keeps(self) -> bool:
        """Rows keep what blocks gave, or are guarded."""
        return bool(self.plan.planes) or any(look is not None for look in self.looks)


def cached_rows(plan: Plan, blocks: int, tokens: int = 0, layers: int = 0) -> CachedRows:
    """The rows of a plan for networks of that many blocks. Raises ArgumentError for a plan bound to another number.

    tokens: image tokens of the network's latents; 0: not known, shares of them stay shares. layers: of a UNet.
    """
    if plan.binding is not None and tokens and tokens_of(plan) and plan.binding.tokens != tokens:
        raise ArgumentError(
            f"the plan is bound to {plan.binding.tokens} image tokens, the call's latents have {tokens}"
        )
    if plan.binding is not None and plan.binding.blocks != blocks:
        raise ArgumentError(
            f"the plan is bound to a model of {plan.binding.blocks} blocks, the pipeline's has {blocks}"
        )
    bound = plan if plan.binding is not None else _bound(plan, blocks, tokens or 1, layers)
    evaluated = [i for i, step in enumerate(bound.steps) if step.variant is not None]
    found = caches(bound)
    looks = tuple(watched(bound, i) for i in evaluated)
    steps, rows = tuple(bound.steps[i] for i in evaluated), tuple(found.rows[i] for i in evaluated)
    return CachedRows(found, tuple(evaluated), steps, rows, looks, bound)


def _bound(plan: Plan, blocks: int, tokens: int, layers: int) -> Plan:
    """The plan with its blocks counted from the start and its tokens; what else a binding says is not known here."""
    made = replace(plan, binding=Binding("pipeline", blocks, tokens, 1, (1,), layers=layers))

    def counted(variant: Variant) -> Variant:
        places = (absolute(made, rule.blocks, "accelerate", rule.site) for rule in variant.rules)
        rules = tuple(replace(rule, blocks=at) for rule, at in zip(variant.rules, places, strict=True))
        keep = variant.keep if tokens == 1 else float(token_count(variant.keep, tokens, 1))
        return replace(variant, rules=normal_form(rules, variant.branches), keep=keep)

    steps = []
    for step in plan.steps:
        guard = None if step.guard is None else replace(step.guard, otherwise=counted(step.guard.otherwise))
        variant = None if step.variant is None else counted(step.variant)
        steps.append(replace(step, variant=variant, guard=guard))
    return replace(made, steps=tuple(steps))


@dataclass(frozen=True, slots=True)
class Given:
    """Share of an evaluation's work that was computed, how many sites were reused and forecast, and the image tokens
    that were computed of each picture, None: all."""

    share: float = 1.0
    reused: int = 0
    forecast: int = 0
    tokens: int | None = None


class Offer:
    """What a pipeline's networks can run of a plan, as executors ask it of a `Denoiser`."""

    precisions: frozenset[str] = frozenset()

    def __init__(self, plan: Plan, networks: Mapping[str, Any]) -> None:
        self.models = ("main", *(variant.model for variant in plan.variants))
        looks = any(step.guard is not None and step.guard.metric not in HEARD for step in plan.steps)
        speaks = gives_again(plan) or looks
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
        if any(row is not None and row.selector == "mask" for row in token_rows(plan)):
            raise UnsupportedError(
                "selector 'mask': a pipeline's call gives a plan no mask; use vivace.load and compile"
            )
        for cached in self._cached:
            rows = cached_rows(plan, len(cached.parts.blocks), 0, len(layers_in(cached.parts)))
            for i, step in enumerate(rows.steps):
                for variant in (step.variant, None if step.guard is None else step.guard.otherwise):
                    if variant is not None and (why := cached.why_not(variant)) is not None:
                        raise UnsupportedError(f"evaluation {i}: a pipeline's network cannot run it: {why}")


class CallCaches:
    """What one call of a pipeline keeps, by network and branch; made anew where its run starts anew.

    silent: the plan leaves guidance to the pipeline, so that its one branch stands for all those the pipeline runs. A
    guard decides once a row for all pictures: it fires where it fires for each of them. Where branches are calls of
    their own, the first call decides. latent: shape of a sample as the network takes it; values: numbers of the call.
    """

    def __init__(
        self,
        plan: Plan,
        network: Any,
        silent: bool,
        generator: Any = None,
        latent: tuple[int, ...] = (),
        values: Mapping[str, float] | None = None,
    ) -> None:
        self.plan, self._generator = plan, generator
        self.merges: Merges | None = None
        self._outs: dict[str, Tensor] = {}  # of the evaluation at work, where importance is kept
        self._networks: dict[int, Cached] = {}
        parts, some = self._of(network).parts, bool(tokens_of(plan))
        count = parts.family.latents(network, latent).tokens if some else 0
        self.rows = cached_rows(plan, len(parts.blocks), count, len(layers_in(parts)))
        self.tokens = CallTokens(self.rows.bound, self.rows.numbers, values or {}) if some else None
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
        merging, focus = self._merging(number, pictures), None if self.tokens is None else self.tokens.focus(number)
        if self.tokens is not None:
            check_inputs(kwargs)
        pairs = [(branch, picture) for branch in branches for picture in range(pictures)]
        if len(parts) == 1:
            result = _forward(cached, parts[0][1], rows, look, args, kwargs, merging, pairs, focus)
            self._note(merging, branches, result, args, kwargs)
            return self._complete(number, cached, branches, result)
        parts.sort(key=lambda part: "cond" not in part[0])  # whose maps the others use
        results, outs = None, {}
        for names, mine in parts:
            (branch,) = names  # there are two branches in a batch
            which = branches.index(branch)
            own = [(branch, picture) for picture in range(pictures)]
            seen = None if look is None else _half_of(look, pictures, which)
            given = half(args, batch, which), half(kwargs, batch, which)
            results = _forward(cached, mine, own, seen, *given, merging, own, focus)
            outs[branch] = output_of(results)
        joined = with_output(results, torch.cat([outs[branch] for branch in branches]))
        self._note(merging, branches, joined, args, kwargs)
        return self._complete(number, cached, branches, joined)

    def _complete(self, number: int, cached: Cached, branches: Sequence[str], result: Any) -> Any:
        """A network's answer with the last predictions of tokens that were left out."""
        if self.tokens is None:
            return result
        out = output_of(result)
        layout = cached.parts.family.latents(cached.parts.module, tuple(out.shape[1:]))
        return with_output(result, self.tokens.complete(number, branches, out, layout))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Where the image tokens of latents of that shape lie."""
        parts = next(iter(self._networks.values())).parts
        return parts.family.latents(parts.module, shape)

    def advanced(self, number: int, outs: Sequence[Tensor]) -> Tensor | None:
        """Note the predictions that the plan's ops read of an evaluation; its tokens' classes where these matter."""
        if self.tokens is None:
            return None
        seeds, pictures = numbers_of(self._generator, len(outs[0]))
        layout = self.layout(tuple(outs[0].shape[1:]))
        kept = [each for (_, branch), each in self._kept.items() if branch in ("", ONE)][-1:]  # of the newest network
        return self.tokens.advanced(number, outs, layout, seeds, pictures, *kept)

    def _merging(self, number: int, pictures: int) -> Merging | None:
        """What an evaluation merges, and whose importance is kept; None for a plan that merges nothing."""
        variant = self.rows.steps[number].variant
        if variant is None or not merges(self.plan):
            return None
        if self.merges is None:
            self.merges = Merges(*numbers_of(self._generator, pictures), guided(self.plan))
        row = self.rows.numbers[number]
        samples = tuple(MergeSample(self.merges, picture, row) for picture in range(pictures))
        return Merging(variant.model, merge_row(variant), samples)

    def _note(self, merging: Merging | None, branches: Sequence[str], result: Any, args: Any, kwargs: Any) -> None:
        """Keep the importance of tokens when an evaluation has both branches, which may come one after the other."""
        if merging is None or self.merges is None or not self.merges.wants:
            return
        out, like = output_of(result), latent_of(args, kwargs)
        out = out[:, : like.shape[1]] if out.dim() > 3 else out  # without learned variances
        if "cond" in branches:
            self._outs.clear()
        self._outs |= dict(zip(branches, out.chunk(len(branches)), strict=True))
        merging.note(self._outs)

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
        binding = self.rows.bound.binding
        of = (1, 0) if binding is None else (binding.tokens, binding.layers)
        share = share_of(variant, row.otherwise if fired else row.uses, blocks, (), *of)
        some = int(variant.keep) if focused(variant) else None
        return Given(share, *self._counts.get(number, (0, 0)), some)

    def _of(self, network: Any) -> Cached:
        if id(network) not in self._networks:
            self._networks[id(network)] = Cached(network)
        return self._networks[id(network)]

    def _count(self, number: int, uses: Sequence[RowUse], branches: Sequence[str]) -> None:
        reused, forecast = self._counts.get(number, (0, 0))
        for item in uses:
            if item.use.site in KEYS:
                continue
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
    cached: Cached,
    turns: Sequence[Turn],
    rows: Sequence[tuple[str, int]],
    look: Look | None,
    args: Any,
    kwargs: Any,
    merging: Merging | None,
    pairs: Sequence[tuple[str, int]],
    focus: Focus | None,
) -> Any:
    """The network's forward as its turns say, from where a look ended. pairs: rows as merges tell branches apart;
    focus: the image tokens that are computed, None: all."""
    active = None if focus is None else Active(focus, [picture for _, picture in pairs])
    keeper = Keeper(cached.parts, cached.wiring, turns, rows, active)
    if merging is not None and merging.row is not None:
        keeper.merger = Merger(cached.parts, merging, pairs)
    if look is not None and look.block and all(turn.use.blocks[0] >= look.block for turn in turns):
        keeper.give_range(look.held, 0, look.block)
    return cached.run(keeper, *args, **kwargs)


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
