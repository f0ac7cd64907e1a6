"""Planners for U-Nets, whose blocks are a row of down blocks, one in the middle, and as many up blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vivace.engine.plan import Plan
from vivace.engine.planners.base import (
    STEP,
    Planner,
    Schedule,
    Track,
    require_count,
    require_share,
    required,
    spaced,
    times_of,
)
from vivace.errors import ArgumentError

KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # of 50 evaluations
KEYS_OF = 50


@dataclass(frozen=True, slots=True)
class DeepCache(Planner):
    """DeepCache: only the rim of a U-Net runs; what enters the outer up block from within is given again.

    interval: evaluations from a full one to the next. branch: pairs of blocks besides the outermost pair that run, so
        blocks [1 + branch, L - 1 - branch) are given again. layer: the depth by single layers in place of blocks, as
        published: the first `layer` layers and the last 1 + layer run, layers [layer, L - 1 - layer) are given again.
        A layer is a resnet with its attention, a sampler that widens or narrows on the way down, or the middle block.
    centre: evaluation around which full ones are densest, None: evenly spaced. power: how much denser, above 1.
    Source: Ma et al. 2023, arXiv 2312.00858, section 3.3 and 3.4 (non-uniform 1:N).
    """

    interval: int = 3
    branch: int = 0
    centre: int | None = None
    power: float = 1.4
    layer: int | None = None

    def schedule(self, plan: Plan) -> Schedule:
        """One track: the output of the inner blocks or layers."""
        interval = require_count("DeepCache", "interval", self.interval, 1)
        branch, count = require_count("DeepCache", "branch", self.branch), plan.nfe
        track = "block", (1 + branch, -1 - branch)
        if self.layer is not None:
            if branch:
                raise ArgumentError(f"DeepCache: branch={branch} and layer={self.layer}; say the depth in one way")
            layer = require_count("DeepCache", "layer", self.layer)
            track = "layer", (layer, -1 - layer)
        if self.centre is None or interval == 1:
            computed = spaced(count, interval, required(plan))
        else:
            dense = self._around(require_count("DeepCache", "centre", self.centre), math.ceil(count / interval), count)
            computed = tuple(i in dense | required(plan) for i in range(count))
        orders = tuple(None if full else 0 for full in computed)
        return Schedule((Track(*track, orders),), times_of(plan, STEP))

    def _around(self, centre: int, wanted: int, count: int) -> set[int]:
        """`wanted` evaluations evenly spaced in s |i - centre|^(1/power), s the side of the centre."""
        power = require_share("DeepCache", "power", self.power)
        if power < 1.0 or centre >= count:
            raise ArgumentError(
                f"DeepCache: power={self.power}, centre={centre}; need a power of 1 or more, a centre below {count}"
            )
        low, high = -(centre ** (1.0 / power)), (count - centre) ** (1.0 / power)
        places = [low + (high - low) * k / wanted for k in range(wanted)]
        return {0, *(int(centre + math.copysign(abs(place) ** power, place)) for place in places)}


@dataclass(frozen=True, slots=True)
class FasterDiffusion(Planner):
    """Faster Diffusion: the encoder runs at key evaluations; between them the decoder runs on what it gave.

    Down and middle blocks are given again, with every skip they feed; up blocks run at their own timestep. In the
    second half of the run x <- x + `noise` z, z the noise that the run began with, before the network is run.

    keys: evaluations at which the encoder runs; None: the published 0, 1, 2, 3, 5, 10, 15, 25, 35 of 50, in proportion.
    noise: factor on the prior noise, 0: none. encoder: number of blocks that are the encoder; None: of a bound plan of
        L blocks (L + 1) / 2, the down blocks and the middle one.
    Source: Li et al. 2023, arXiv 2312.09608, sections 3.2 to 3.4.
    """

    keys: Sequence[int] | None = None
    noise: float = 0.003
    encoder: int | None = None

    def schedule(self, plan: Plan) -> Schedule:
        """One track: the output of the encoder; the noise as ops."""
        count = plan.nfe
        keys = {i * count // KEYS_OF for i in KEYS} if self.keys is None else set(self.keys)
        if any(type(key) is not int or not 0 <= key < count for key in keys):
            raise ArgumentError(f"FasterDiffusion: keys {self.keys!r:.60}; numbers of the {count} evaluations needed")
        full = keys | required(plan)
        orders = tuple(None if i in full else 0 for i in range(count))
        track = Track("block", (0, self._encoder(plan)), orders)
        noise = require_share("FasterDiffusion", "noise", self.noise)
        late = range(max(1, (count + 1) // 2), count) if noise and any(o == 0 for o in orders) else ()
        return Schedule((track,), times_of(plan, STEP), noise=dict.fromkeys(late, noise * self._scale(plan)))

    def _encoder(self, plan: Plan) -> int:
        if self.encoder is not None:
            return require_count("FasterDiffusion", "encoder", self.encoder, 1)
        if plan.binding is None or plan.binding.blocks % 2 == 0:
            found = "it is not bound" if plan.binding is None else f"its model has {plan.binding.blocks} blocks"
            raise ArgumentError(
                f"FasterDiffusion: the plan does not tell which blocks are the encoder ({found}); bind it to a U-Net, "
                "or say how many with encoder="
            )
        return (plan.binding.blocks + 1) // 2

    @staticmethod
    def _scale(plan: Plan) -> float:
        """Of the first state: x_T = scale * noise:0 (besides the start latent of a tail)."""
        for op in plan.init:
            for slot, coef in op.terms:
                if op.dst == "x" and slot == "noise:0" and isinstance(coef, float):
                    return coef
        raise ArgumentError("FasterDiffusion: the plan does not start from noise; use noise=0")
