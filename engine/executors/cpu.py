"""The compiled executor of CPUs: one network per variant and bucket, fed what left the loop; then the solver step.

What a network is compiled to is the model's business (`engine.compiled`): for the native DiT one call into C++ a row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vivace.engine.compiled import Bucket, Compiler, Evaluation, Hoisted, Network, bucket_of
from vivace.engine.denoiser import Denoiser, samples_of
from vivace.engine.executors import Group
from vivace.engine.executors.eager import check_compiled
from vivace.engine.executors.hoists import Kept
from vivace.engine.executors.steps import by_branches, evaluation, run_rows, step_kernels
from vivace.engine.kept import KeptMemory, Seen
from vivace.engine.perturbed import APART, parted, perturbs, run_parted
from vivace.engine.plan import Plan, Variant
from vivace.engine.pool import Pool
from vivace.engine.receipt import KernelUse, Timeline
from vivace.engine.token_rows import focused


class CpuExecutor:
    """Compiled networks by (variant, bucket). `compiles` counts them; numbers of a plan never make one."""

    name = "cpu"

    def __init__(self, denoiser: Denoiser, compiler: Compiler, *, hoist: bool = True) -> None:
        self.denoiser, self.compiler = denoiser, compiler
        self.one_by_one: str | None = None
        self.networks: dict[tuple[Hashable, Bucket], Network] = {}
        self._eager = ""  # why rows were not compiled
        self._hoists = Kept(compiler, hoist)
        self._bucket = lru_cache(256)(lambda shape, samples: bucket_of(denoiser.spec.tokens(shape), samples))

    @property
    def compiles(self) -> int:
        """Artefacts compiled so far."""
        return len(self.networks)

    def check(self, plan: Plan) -> None:
        """Everything that `EagerExecutor.check` refuses, and variants that the model's compiler cannot take."""
        check_compiled(plan, self.name, self.denoiser, self.compiler)

    def prepare(self, plan: Plan, shape: tuple[int, ...], samples: int, memory: KeptMemory) -> None:
        for variant in plan.variants:
            for part in [part for part, blocks in parted(variant) if not blocks]:
                self._network(part, shape, samples)

    def hoist(self, plan: Plan, condition: Any) -> Hoisted | None:
        return self._hoists.of_plan(plan, condition)

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        run_rows(group, pool, timeline, self.predict)

    def predict(self, group: Group, pool: Pool) -> tuple[Tensor, ...]:
        call = evaluation(group, pool.net, group.lanes)
        return by_branches(group, call, lambda part, variant: self._run(part, variant, pool.shape))

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        lanes, times = tuple(range(len(x))), tuple(timesteps)
        hoisted = tuple(self._hoists.of_rows(times, variant.branches, condition) for condition in conditions)
        call = Evaluation(x.contiguous(), lanes, lanes, times, tuple(conditions), hoisted)
        return self._run(call, variant, tuple(x.shape[1:]))

    def look(self, group: Group, pool: Pool, metric: str, params: Sequence[float]) -> Seen:
        assert group.variant is not None
        network = self._network(group.variant, pool.shape, len(group.lanes))
        call = evaluation(group, pool.net, group.lanes)
        if self.one_by_one is None:
            return network.look(call, metric, params)
        return Seen.of_each([network.look(call.sample(n), metric, params) for n in range(len(call.lanes))])

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        ways = dict.fromkeys(network.how for network in self.networks.values())
        uses = [KernelUse("network", self.name, how) for how in ways]
        return *step_kernels(pool), *uses, *([KernelUse("network", "torch", self._eager)] if self._eager else [])

    def report(self) -> dict[str, Any]:
        buckets = sorted({bucket for _, bucket in self.networks})
        return {**self.compiler.report(), "buckets": [f"{b.tokens} tokens x {b.samples}" for b in buckets]}

    def _run(self, call: Evaluation, variant: Variant, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        if perturbs(variant):
            self._eager = APART
            return run_parted(call, variant, lambda mine, part: self._run(mine, part, shape), self._eagerly)
        network = self._network(variant, shape, len(call.lanes))
        run = network.run if not any(turn.use.site == "received" for turn in call.turns) else self._listening(variant)
        if self.one_by_one is None:
            return run(call)
        single = [[out.clone() for out in run(call.sample(n))] for n in range(len(call.lanes))]
        return tuple(torch.cat(branch) for branch in zip(*single, strict=True))

    @torch.inference_mode()
    def _eagerly(self, call: Evaluation, variant: Variant) -> tuple[Tensor, ...]:
        """By the denoiser, as the framework runs it."""
        if self.one_by_one is not None and len(call.lanes) > 1:
            single = [self._eagerly(call.sample(n), variant) for n in range(len(call.lanes))]
            return tuple(torch.cat(branch) for branch in zip(*single, strict=True))
        x = torch.cat(samples_of(call.x, call.lanes))
        return self.denoiser.evaluate(x, call.timesteps, call.conditions, variant)

    def _listening(self, variant: Variant) -> Callable[[Evaluation], tuple[Tensor, ...]]:
        """Rows that tell what attention tokens receive are the denoiser's: compiled ones make no weights to sum."""
        self._eager = "eager: rows that tell what attention tokens received are not compiled"

        @torch.inference_mode()
        def run(call: Evaluation) -> tuple[Tensor, ...]:
            x = torch.cat(samples_of(call.x, call.lanes))
            return self.denoiser.evaluate(x, call.timesteps, call.conditions, variant, call.turns, call.resume)

        return run

    def _network(self, variant: Variant, shape: tuple[int, ...], samples: int) -> Network:
        bucket = self._bucket(shape, samples)
        kept = variant.keep if focused(variant) else None  # all: how many, the bucket says
        key = (variant.model, variant.branches, variant.rules, kept), bucket
        network = self.networks.get(key)
        if network is None:
            network = self.networks[key] = self.compiler.compile(variant, bucket, shape)
        return network
