"""What a model does at compile time: whether a sample keeps its bits in a bigger batch, and what a forward takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.plan import Plan, Variant

if TYPE_CHECKING:
    from vivace.engine.executors import Executor

_TIMESTEPS = (1.0, 7.0, 3.0)  # any: neither bits nor time depend on the values


class Probe:
    """The start-up self-test of one model in one executor at one latent shape, run once per set of branches.

    one_by_one: why samples may not share a forward, or None; ms: branches -> (ms of 1 sample, ms of 3).
    """

    def __init__(self, denoiser: Denoiser, executor: Executor, shape: tuple[int, ...]) -> None:
        self.denoiser, self.executor, self.shape = denoiser, executor, shape
        self.one_by_one: str | None = None
        self.ms: dict[tuple[str, ...], tuple[float, float]] = {}

    def cover(self, plan: Plan) -> None:
        """Probe the sets of branches of `plan` that were not probed yet."""
        for branches in {variant.branches for variant in plan.variants} - self.ms.keys():
            self._run(branches)

    def predict_ms(self, plan: Plan, branches: tuple[str, ...], n: int) -> float | None:
        """Milliseconds of one forward of `n` samples, on the line through the two measured sizes; None: not timed.

        Other latent shapes take their share by the number of tokens.
        """
        one, three = self.ms[branches]
        ms = n * one if self.one_by_one else max(one + (three - one) / 2 * (n - 1), one)
        tokens = self.denoiser.spec.tokens(self.shape)
        return ms if plan.binding is None or not tokens else ms * plan.binding.tokens / tokens

    def _run(self, branches: tuple[str, ...]) -> None:
        """1 and 3 samples: compare the first sample's bits, time the second call of each."""
        denoiser, variant, condition = self.denoiser, Variant(branches=branches), self.denoiser.encode(None)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((3, *self.shape), generator=generator).to(denoiser.device, denoiser.dtype)
        firsts: list[list[Tensor]] = []
        spent = [0.0, 0.0]
        for i, n in enumerate((1, 3)):
            for _ in range(2):
                start = time.perf_counter()
                outs = self.executor.evaluate(x[:n], _TIMESTEPS[:n], [condition] * n, variant)
                if denoiser.device.type == "cuda":
                    torch.cuda.synchronize()
                spent[i] = (time.perf_counter() - start) * 1e3
            firsts.append([out[0].clone() for out in outs])
        if not all(torch.equal(a, b) for a, b in zip(*firsts, strict=True)):
            kind = str(denoiser.dtype).removeprefix("torch.")
            self.one_by_one = f"the model's bits differ between 1 and 3 samples ({denoiser.device.type}, {kind})"
        self.ms[branches] = (spent[0], spent[1])
