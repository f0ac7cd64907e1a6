"""What a model does at compile time: whether a sample keeps its bits in a bigger batch, and what a forward takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vivace.engine.denoiser import Denoiser
from vivace.engine.machine import machine
from vivace.engine.plan import Action, Plan, Rule, Variant
from vivace.kernels import store

if TYPE_CHECKING:
    from vivace.engine.executors import Executor

Found = tuple[str | None, tuple[float, float]]  # why samples may not share a forward; ms of 1 sample, ms of 3
_TIMESTEPS: tuple[float, ...] = (977.0, 5.0, 503.0)  # any would do for time; bits are worth a look at several


class Probe:
    """The start-up self-test of one model in one executor at one latent shape, run once for what `_probed` tells apart.

    What it found for a compiled model is kept on disk and holds as long as weights, machine and versions are the same.
    one_by_one: why samples may not share a forward, or None; ms: variant, see `_probed` -> (ms of 1 sample, ms of 3).
    """

    def __init__(self, denoiser: Denoiser, executor: Executor, shape: tuple[int, ...]) -> None:
        self.denoiser, self.executor, self.shape = denoiser, executor, shape
        self.one_by_one: str | None = None
        self.ms: dict[Variant, tuple[float, float]] = {}

    def cover(self, plan: Plan) -> None:
        """Probe the variants of `plan` that were not probed yet."""
        for variant in {_probed(variant) for variant in plan.variants} - self.ms.keys():
            found = self._kept(variant) or self._together(variant)
            self.one_by_one, self.ms[variant] = self.one_by_one or found[0], found[1]

    def predict_ms(self, plan: Plan, variant: Variant, n: int) -> float | None:
        """Milliseconds of one forward of `n` samples, on the line through the two measured sizes; None: not timed.

        Other latent shapes take their share by the number of tokens.
        """
        one, three = self.ms[_probed(variant)]
        ms = n * one if self.one_by_one else max(one + (three - one) / 2 * (n - 1), one)
        tokens = self.denoiser.spec.tokens(self.shape)
        return ms if plan.binding is None or not tokens else ms * plan.binding.tokens / tokens

    def _key(self, variant: Variant) -> dict[str, Any] | None:
        """What the outcome depends on; None: it is not kept."""
        if not self.executor.compiles:
            return None
        denoiser = self.denoiser
        key: dict[str, Any] = {
            "what": "probe of three samples",
            "executor": self.executor.name,
            "model": denoiser.spec.fingerprint,
        }
        key |= {"dtype": str(denoiser.dtype), "machine": machine(denoiser.device)}
        rules = [[*rule.blocks, rule.site, rule.precision, *_action(rule)] for rule in variant.rules]
        weights = self.denoiser.digest if rules else ""
        return {**key, "shape": self.shape, "branches": variant.branches, "precisions": rules, "weights": weights}

    def _kept(self, variant: Variant) -> Found | None:
        key = self._key(variant)
        match None if key is None else store.get(key).value:
            case {"one_by_one": (str() | None) as reason, "ms": [float() as one, float() as three]}:
                return reason, (one, three)
        return None

    def _together(self, variant: Variant) -> Found:
        """As `_run`, samples sharing a forward whatever earlier variants showed: the outcome is kept."""
        before, self.executor.one_by_one = self.executor.one_by_one, None
        try:
            return self._run(variant)
        finally:
            self.executor.one_by_one = before

    def _run(self, variant: Variant) -> Found:
        """Three samples alone and together: compare their bits, time the later call of each kind."""
        denoiser, condition = self.denoiser, self.denoiser.encode(None)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((3, *self.shape), generator=generator).to(denoiser.device, denoiser.dtype)
        spent, alone, together = [0.0, 0.0], list[tuple[Tensor, ...]](), tuple[Tensor, ...]()
        for part in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3), slice(0, 3)):
            times = tuple(_TIMESTEPS[part])
            start = time.perf_counter()
            outs = self.executor.evaluate(x[part], times, [condition] * len(x[part]), variant)
            if denoiser.device.type == "cuda":
                torch.cuda.synchronize()
            spent[len(x[part]) > 1] = (time.perf_counter() - start) * 1e3
            together = tuple(out.clone() for out in outs)
            alone += [together] if len(x[part]) == 1 else []
        reason = None
        if not all(torch.equal(torch.cat(parts), whole) for *parts, whole in zip(*alone, together, strict=True)):
            kind = str(denoiser.dtype).removeprefix("torch.")
            reason = f"the model's bits differ between 1 and 3 samples ({denoiser.device.type}, {kind})"
        if (key := self._key(variant)) is not None:
            store.put(key, {"one_by_one": reason, "ms": spent})
        return reason, (spent[0], spent[1])


def _probed(variant: Variant) -> Variant:
    """What of a variant decides time and bits here: branches, precisions, whose attention maps are the identity."""
    rules = [Rule(rule.blocks, rule.site, precision=rule.precision) for rule in variant.rules if rule.precision]
    rules += [rule for rule in variant.rules if rule.action == Action.IDENTITY]
    return Variant(branches=variant.branches, rules=tuple(rules))


def _action(rule: Rule) -> list[str]:
    """The action of a rule by name; nothing where it says none."""
    return [] if rule.action is None else [rule.action.name]
