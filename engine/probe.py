"""What a model does at compile time: whether a sample keeps its bits in a bigger batch, and what a forward takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from vivace.engine.denoiser import Denoiser
from vivace.engine.plan import Variant


@dataclass(frozen=True, slots=True)
class Probe:
    """`one_by_one`: why samples may not share a forward, or None. `ms`: branches -> (ms of 1 sample, ms of 3)."""

    one_by_one: str | None
    ms: dict[tuple[str, ...], tuple[float, float]]

    def predict_ms(self, branches: tuple[str, ...], n: int) -> float:
        """Milliseconds of one forward of `n` samples, on the line through the two measured sizes."""
        one, three = self.ms[branches]
        return n * one if self.one_by_one else max(one + (three - one) / 2 * (n - 1), one)


@torch.inference_mode()
def probe(denoiser: Denoiser, variants: tuple[Variant, ...], shape: tuple[int, ...]) -> Probe:
    """Run 1 and 3 samples of every set of branches; compare the first sample's bits, time the second call of each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, *shape), generator=generator, dtype=torch.float32).to(denoiser.device, denoiser.dtype)
    condition = denoiser.encode(None)
    why = None
    ms: dict[tuple[str, ...], tuple[float, float]] = {}
    for variant in dict.fromkeys(Variant(branches=variant.branches) for variant in variants):
        times = []
        firsts = []
        for n in (1, 3):
            for _ in range(2):
                start = time.perf_counter()
                outs = denoiser.evaluate(x[:n], (1.0, 7.0, 3.0)[:n], [condition] * n, variant)
                if denoiser.device.type == "cuda":
                    torch.cuda.synchronize()
                spent = (time.perf_counter() - start) * 1e3
            times.append(spent)
            firsts.append([out[0].clone() for out in outs])
        if not all(torch.equal(a, b) for a, b in zip(*firsts, strict=True)):
            why = f"the model's bits differ between 1 and 3 samples on {denoiser.device.type} in {denoiser.dtype}"
        ms[variant.branches] = (times[0], times[1])
    return Probe(why, ms)
