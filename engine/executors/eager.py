"""The oracle executor: the network as the framework runs it, then the fused solver step. Every other one must agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vivace.engine.compiled import Compiler, Evaluation
from vivace.engine.denoiser import Denoiser, Replayable
from vivace.engine.executors import Group
from vivace.engine.executors.steps import by_branches, evaluation, run_rows, step_kernels
from vivace.engine.fed import why_not_fed
from vivace.engine.kept import KeptMemory, Seen
from vivace.engine.looking import HEARD
from vivace.engine.merge_rows import SITE, merge_row
from vivace.engine.perturbed import SITE as IDENTITY
from vivace.engine.perturbed import perturbs, why_not_perturbed
from vivace.engine.plan import Action, Binding, Plan, Rule, Variant
from vivace.engine.pool import Pool
from vivace.engine.precision import QUANTIZED, named, precisions_of
from vivace.engine.receipt import KernelUse, Timeline
from vivace.engine.token_rows import focused
from vivace.errors import ShapeError, UnsupportedError


class EagerExecutor:
    """Network by torch, then the fused steps of the group. `reason`: why this one, where a faster one was wanted."""

    name = "eager"
    compiles = 0

    def __init__(self, denoiser: Denoiser, reason: str = "") -> None:
        self.denoiser, self.reason = denoiser, reason
        self.one_by_one: str | None = None

    def check(self, plan: Plan) -> None:
        """Everything except dropped tokens, and sites, metrics and precisions that the model has not."""
        check_whole(plan, "the eager executor", self.denoiser)

    def prepare(self, plan: Plan, shape: tuple[int, ...], samples: int, memory: KeptMemory) -> None:
        """Nothing is compiled."""

    def hoist(self, plan: Plan, condition: Any) -> None:
        """Nothing leaves the loop."""

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        run_rows(group, pool, timeline, self.predict)

    def predict(self, group: Group, pool: Pool) -> tuple[Tensor, ...]:
        return by_branches(group, self._group(group, pool), self._evaluate)

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        lanes = tuple(range(len(x)))
        return self._evaluate(
            Evaluation(x, lanes, lanes, tuple(timesteps), tuple(conditions), (None,) * len(x)), variant
        )

    def look(self, group: Group, pool: Pool, metric: str, params: Sequence[float]) -> Seen:
        call = self._group(group, pool)
        with torch.inference_mode():
            return looked(self.denoiser, call.x, group, self.one_by_one is not None, metric, params)

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        return *step_kernels(pool), KernelUse("network", "torch", "; ".join(filter(None, ("eager", self.reason))))

    def report(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def _group(group: Group, pool: Pool) -> Evaluation:
        """The evaluation of a group, x holding its samples alone."""
        lanes, plane = group.lanes, pool.net
        adjacent = lanes == tuple(range(lanes[0], lanes[0] + len(lanes)))
        x = plane[lanes[0] : lanes[0] + len(lanes)] if adjacent else plane[torch.tensor(lanes, device=pool.device)]
        return evaluation(group, x, tuple(range(len(lanes))))

    @torch.inference_mode()
    def _evaluate(self, call: Evaluation, variant: Variant) -> tuple[Tensor, ...]:
        """Predictions; `call.x` has the samples in order."""
        if self.one_by_one is None:
            outs = self._network(call, variant)
        else:
            single = [self._network(replace(call.sample(n), lanes=(n,)), variant) for n in range(len(call.lanes))]
            outs = tuple(torch.cat(branch) for branch in zip(*single, strict=True))
        for branch, out in zip(variant.branches, outs, strict=True):
            if out.shape != call.x.shape:
                raise ShapeError(
                    f"denoiser: prediction of branch {branch!r} has shape {tuple(out.shape)}, needs "
                    f"{tuple(call.x.shape)}"
                )
        return outs

    def _network(self, call: Evaluation, variant: Variant) -> tuple[Tensor, ...]:
        x = call.x if len(call.x) == len(call.lanes) else call.x[list(call.lanes)]
        if call.merging is not None:
            args = (x, call.timesteps, call.conditions, variant, call.turns, call.resume)
            return self.denoiser.evaluate(*args, merging=call.merging)
        if call.focus is not None:
            return self.denoiser.evaluate(
                x, call.timesteps, call.conditions, variant, call.turns, call.resume, call.focus
            )
        if not call.turns and call.resume is None:
            return self.denoiser.evaluate(x, call.timesteps, call.conditions, variant)
        return self.denoiser.evaluate(x, call.timesteps, call.conditions, variant, call.turns, call.resume)


def looked(denoiser: Denoiser, x: Tensor, group: Group, apart: bool, metric: str, params: Sequence[float]) -> Seen:
    """The denoiser's look at samples x [n, ...] of a group. apart: one by one."""
    variant = group.variant
    assert variant is not None

    def look(part: slice) -> Seen:
        return denoiser.look(x[part], group.timesteps[part], group.conditions[part], variant, metric, params)

    return Seen.of_each([look(slice(n, n + 1)) for n in range(len(x))]) if apart else look(slice(None))


def check_whole(plan: Plan, who: str, denoiser: Denoiser, compiler: Compiler | Replayable | None = None) -> None:
    """Raise UnsupportedError naming the first row that the model cannot run in this executor.

    compiler: whose precisions count, None: the model's.
    """
    full = 1.0 if plan.binding is None else float(plan.binding.tokens)
    precisions = denoiser.precisions if compiler is None else compiler.precisions
    for i, step in enumerate(plan.steps):
        why = why_not_fed(denoiser, plan, i)
        guard = step.guard
        if guard is not None and guard.metric not in (*denoiser.metrics, *HEARD):
            there = ", ".join(sorted(denoiser.metrics)) or "none"
            why = why or f"a guard on {guard.metric!r} (this model's metrics: {there})"
        for variant in (step.variant, None if guard is None else guard.otherwise):
            if variant is None:
                continue
            if guard is not None and guard.metric not in HEARD and perturbs(variant):
                why = why or f"a guard on {guard.metric!r} beside IDENTITY of attention"
            why = why or _beyond(variant, full, denoiser)
            if why:
                raise UnsupportedError(f"step {i}: {who} does not run {why}; drop it from the plan")
            _check_precision(f"step {i}: {who} does not run it", variant, plan.binding, precisions)


def _check_precision(what: str, variant: Variant, binding: Binding | None, precisions: frozenset[str]) -> None:
    """Raise UnsupportedError when a row names precisions that are not among these, or in a way nobody runs."""
    for name in sorted(named(variant) - precisions):
        weights = f"make {name} weights with `vivace quantize`, and load the model with quantized=..."
        cure = weights if name in QUANTIZED else "drop it from the plan"
        there = ", ".join(["the model's own", *sorted(precisions)])
        raise UnsupportedError(f"{what} in precision {name}, only in {there}; {cure}")
    try:
        precisions_of(variant, 0 if binding is None else binding.blocks)
    except UnsupportedError as error:
        raise UnsupportedError(f"{what}: {error}") from None


def check_compiled(plan: Plan, name: str, denoiser: Denoiser, compiler: Compiler | Replayable) -> None:
    """`check_whole`, and UnsupportedError naming the first row whose variant the model cannot compile."""
    check_whole(plan, f"the {name} executor", denoiser, compiler)
    for i, step in enumerate(plan.steps):
        why = None if step.variant is None else compiler.why_not(step.variant)
        if why is not None:
            raise UnsupportedError(f"step {i}: the {name} executor cannot run it: {why}; use backend='eager'")


def _not_merged(variant: Variant, rule: Rule, denoiser: Denoiser) -> str | None:
    """Why the model cannot merge what a rule says; None when it can."""
    row = merge_row(variant)
    if SITE not in denoiser.sites or row is None:
        if (why := denoiser.why_not_kept(SITE, rule.blocks)) is not None:
            return why
        return f"this model's sites: {', '.join(sorted(denoiser.sites)) or 'none'}"
    names = ("merge" if site == "attn" else f"merge_{site}" for site in row.sites)
    return next((why for name in names if (why := denoiser.why_not_kept(name, rule.blocks)) is not None), None)


def _beyond(variant: Variant, full: float, denoiser: Denoiser) -> str:
    """What of a variant the model cannot run; empty when there is nothing."""
    if variant.keep != full and not focused(variant):
        return "a row that computes some tokens and has no selector"
    if focused(variant) and "kv" not in denoiser.sites:
        return "a row that computes some tokens (this model keeps no keys and values)"
    if variant.model not in denoiser.models:
        return f"a second model ({variant.model!r})"
    if why_not := why_not_perturbed(variant):
        return why_not
    for rule in variant.rules:
        if rule.site == SITE:
            if (why := _not_merged(variant, rule, denoiser)) is not None:
                return f"merged tokens of blocks {rule.blocks}: {why}"
            continue
        if rule.action in (None, Action.COMPUTE):  # what nobody reads is not kept
            continue
        what = f"{Action(rule.action).name} of site {rule.site!r}, blocks {rule.blocks}"
        if rule.action == Action.IDENTITY:
            can = getattr(denoiser, "identity", False)
            lacks = denoiser.why_not_kept(IDENTITY, rule.blocks) if can else "the model cannot"
            if lacks is not None:
                return f"{what}: {lacks}"
            continue
        if rule.site not in denoiser.sites:
            return f"{what} (this model's sites: {', '.join(sorted(denoiser.sites)) or 'none'})"
        if (why := denoiser.why_not_kept(rule.site, rule.blocks)) is not None:
            return f"{what}: {why}"
    return ""
