"""The oracle executor: the network as the framework runs it, then the fused solver step. Every other one must agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.executors import Group
from vivace.engine.plan import Action, Plan, Variant
from vivace.engine.pool import Pool
from vivace.engine.receipt import KernelUse, Timeline
from vivace.errors import ShapeError, UnsupportedError
from vivace.kernels.sample_adjust import SPEC as ADJUST
from vivace.kernels.sample_adjust import sample_adjust
from vivace.kernels.solver_step import SPEC as STEP
from vivace.kernels.solver_step import solver_step
from vivace.kernels.spec import choose


class EagerExecutor:
    """Network by torch, then the fused steps of the group."""

    name = "eager"

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.one_by_one: str | None = None

    def check(self, plan: Plan) -> None:
        """Everything except reuse of blocks, dropped tokens, per-row precision and guards."""
        check_whole(plan, "the eager executor", models=len(self.denoiser.models) > 1)

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        outs: tuple[Tensor, ...] = ()
        if group.variant is not None:
            with timeline.span(group.records, "network", group.row, len(group.lanes)):
                outs = self._network(group, pool, group.variant)
        with timeline.span(group.records, "solver_step", group.row, len(group.lanes)):
            lanes = torch.tensor(group.lanes)
            seeds, pictures = torch.tensor(group.seeds), torch.tensor(group.pictures)
            adjust = pool.state.new_empty(len(lanes), 3)  # of each sample, from its reduction row to the next rows
            for launch in group.kernel_rows:
                part = slice(None) if len(launch.positions) == len(lanes) else torch.tensor(launch.positions)
                call = (pool.state, [out[part] for out in outs], pool.table, torch.tensor(launch.rows), lanes[part])
                inputs: Any = {"tensors": pool.tensors, "seeds": seeds[part], "pictures": pictures[part]}
                if launch.reduces:
                    adjust[part] = sample_adjust(*call, **inputs)
                else:
                    solver_step(*call, **inputs, net=pool.net, adjust=adjust[part])

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        where = pool.device.type, str(pool.dtype).removeprefix("torch.")
        choices = [(spec.name, choose(spec, *where)) for spec in (STEP, ADJUST)]
        fused = (KernelUse(name, choice.backend, choice.reason) for name, choice in choices)
        return *fused, KernelUse("network", "torch", "eager executor")

    @torch.inference_mode()
    def _network(self, group: Group, pool: Pool, variant: Variant) -> tuple[Tensor, ...]:
        lanes = group.lanes
        first = lanes[0]
        adjacent = lanes == tuple(range(first, first + len(lanes)))
        x = pool.net[first : first + len(lanes)] if adjacent else pool.net[torch.tensor(lanes, device=pool.device)]
        if self.one_by_one is None:
            outs = self.denoiser.evaluate(x, group.timesteps, group.conditions, variant)
        else:
            single = [
                self.denoiser.evaluate(x[n : n + 1], group.timesteps[n : n + 1], group.conditions[n : n + 1], variant)
                for n in range(len(lanes))
            ]
            outs = tuple(torch.cat(branch) for branch in zip(*single, strict=True))
        for branch, out in zip(variant.branches, outs, strict=True):
            if out.shape != x.shape:
                raise ShapeError(
                    f"denoiser: prediction of branch {branch!r} has shape {tuple(out.shape)}, needs {tuple(x.shape)}"
                )
        return outs


def check_whole(plan: Plan, who: str, *, models: bool) -> None:
    """Raise UnsupportedError naming the first row that needs more than plain forwards; models: several are there."""
    full = 1.0 if plan.binding is None else float(plan.binding.tokens)
    for i, step in enumerate(plan.steps):
        why = "a run-time guard" if step.guard is not None else ""
        why = why or ("further network inputs" if step.net_inputs else "")
        if step.variant is not None:
            why = why or _beyond(step.variant, full, models)
        if why:
            raise UnsupportedError(f"step {i}: {who} does not run {why}; drop it from the plan")


def _beyond(variant: Variant, full: float, models: bool) -> str:
    """What of a variant needs more than plain forwards; empty when nothing does."""
    if variant.keep != full:
        return "a row that recomputes only some tokens"
    if variant.model != "main" and not models:
        return f"a second model ({variant.model!r})"
    for rule in variant.rules:
        if rule.action not in (None, Action.COMPUTE):
            return f"{Action(rule.action).name} of blocks {rule.blocks}"
        if rule.precision is not None or rule.site == "merge":
            return f"a rule on {'precision' if rule.precision else 'merged tokens'} of blocks {rule.blocks}"
    return ""
