"""The oracle executor: the network as the framework runs it, then the fused solver step. Every other one must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.executors import Group
from vivace.engine.executors.steps import finish_rows, step_kernels
from vivace.engine.plan import Action, Binding, Plan, Variant
from vivace.engine.pool import Pool
from vivace.engine.precision import QUANTIZED, named, precisions_of
from vivace.engine.receipt import KernelUse, Timeline
from vivace.errors import ShapeError, UnsupportedError


class EagerExecutor:
    """Network by torch, then the fused steps of the group. `reason`: why this one, where a faster one was wanted."""

    name = "eager"
    compiles = 0

    def __init__(self, denoiser: Denoiser, reason: str = "") -> None:
        self.denoiser, self.reason = denoiser, reason
        self.one_by_one: str | None = None

    def check(self, plan: Plan) -> None:
        """Everything except reuse of blocks, dropped tokens, guards, and precisions that the model has not."""
        check_whole(plan, "the eager executor", len(self.denoiser.models) > 1, self.denoiser.precisions)

    def prepare(self, plan: Plan, shape: tuple[int, ...], samples: int) -> None:
        """Nothing is compiled."""

    def hoist(self, plan: Plan, condition: Any) -> None:
        """Nothing leaves the loop."""

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        outs: tuple[Tensor, ...] = ()
        if group.variant is not None:
            with timeline.span(group.records, "network", group.row, len(group.lanes)):
                lanes = group.lanes
                first = lanes[0]
                adjacent = lanes == tuple(range(first, first + len(lanes)))
                plane = pool.net
                x = plane[first : first + len(lanes)] if adjacent else plane[torch.tensor(lanes, device=pool.device)]
                outs = self._network(x, group.timesteps, group.conditions, group.variant)
        with timeline.span(group.records, "solver_step", group.row, len(group.lanes)):
            finish_rows(group, pool, outs)

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        return self._network(x, timesteps, conditions, variant)

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        return *step_kernels(pool), KernelUse("network", "torch", "; ".join(filter(None, ("eager", self.reason))))

    def report(self) -> dict[str, Any]:
        return {}

    @torch.inference_mode()
    def _network(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        if self.one_by_one is None:
            outs = self.denoiser.evaluate(x, timesteps, conditions, variant)
        else:
            single = [
                self.denoiser.evaluate(x[n : n + 1], timesteps[n : n + 1], conditions[n : n + 1], variant)
                for n in range(len(x))
            ]
            outs = tuple(torch.cat(branch) for branch in zip(*single, strict=True))
        for branch, out in zip(variant.branches, outs, strict=True):
            if out.shape != x.shape:
                raise ShapeError(
                    f"denoiser: prediction of branch {branch!r} has shape {tuple(out.shape)}, needs {tuple(x.shape)}"
                )
        return outs


def check_whole(plan: Plan, who: str, models: bool, precisions: frozenset[str] = frozenset()) -> None:
    """Raise UnsupportedError naming the first row that needs more than plain forwards in the model's dtype.

    models: there are several; precisions: in which forwards run as well.
    """
    full = 1.0 if plan.binding is None else float(plan.binding.tokens)
    for i, step in enumerate(plan.steps):
        why = "a run-time guard" if step.guard is not None else ""
        why = why or ("further network inputs" if step.net_inputs else "")
        if step.variant is not None:
            why = why or _beyond(step.variant, full, models)
        if why:
            raise UnsupportedError(f"step {i}: {who} does not run {why}; drop it from the plan")
        if step.variant is not None:
            _check_precision(f"step {i}: {who} does not run it", step.variant, plan.binding, precisions)


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


def check_compiled(
    plan: Plan, name: str, denoiser: Denoiser, precisions: frozenset[str], why_not: Callable[[Variant], str | None]
) -> None:
    """`check_whole`, and UnsupportedError naming the first row whose variant the model cannot compile."""
    check_whole(plan, f"the {name} executor", len(denoiser.models) > 1, precisions)
    for i, step in enumerate(plan.steps):
        why = None if step.variant is None else why_not(step.variant)
        if why is not None:
            raise UnsupportedError(f"step {i}: the {name} executor cannot run it: {why}; use backend='eager'")


def _beyond(variant: Variant, full: float, models: bool) -> str:
    """What of a variant needs more than plain forwards; empty when nothing does."""
    if variant.keep != full:
        return "a row that recomputes only some tokens"
    if variant.model != "main" and not models:
        return f"a second model ({variant.model!r})"
    for rule in variant.rules:
        if rule.action not in (None, Action.COMPUTE):
            return f"{Action(rule.action).name} of blocks {rule.blocks}"
        if rule.site == "merge":
            return f"a rule on merged tokens of blocks {rule.blocks}"
    return ""
