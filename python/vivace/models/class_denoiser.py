"""The native DiT as the engine sees it: prompts are classes, branches are labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from vivace.engine.merge_rows import SITE as MERGE
from vivace.engine.perturbed import parted, perturbs
from vivace.engine.plan import Variant
from vivace.engine.precision import named
from vivace.models import pictures
from vivace.models.caching.events import LISTENS, SITES
from vivace.models.caching.looks import METRICS, going_on, states_of
from vivace.models.load import LoadedModel
from vivace.models.prompts import Match
from vivace.models.quantized import honoured

if TYPE_CHECKING:
    from torch import Tensor

    from vivace.engine.compiled import Compiler
    from vivace.engine.denoiser import Replayable
    from vivace.engine.kept import Seen, Turn
    from vivace.engine.merging import Merging
    from vivace.engine.tokens import Focus
    from vivace.models.quantized.stand_in import StandIns
    from vivace.models.quantized.weights import QuantizedWeights


class ClassDenoiser:
    """The native DiT as the engine's `Denoiser`: conditions are classes found by prompt, uncond is the null label."""

    models: tuple[str, ...] = ("main",)
    sites, metrics = SITES | {MERGE, LISTENS}, METRICS
    identity = True

    def __init__(self, model: LoadedModel, quantized: QuantizedWeights | None = None) -> None:
        self.model, self.spec, self.quantized = model, model.spec, quantized
        self.device, self.dtype = model.module.device, model.module.dtype

    @cached_property
    def stand_ins(self) -> StandIns:
        """What runs a row that names precisions."""
        from vivace.models.quantized.stand_in import StandIns

        return StandIns(self.quantized)

    @property
    def precisions(self) -> frozenset[str]:
        """In which `evaluate` runs blocks, where a variant names them."""
        return honoured(self.quantized)

    @property
    def digest(self) -> str:
        """Of the quantized weights, "" without."""
        return self.stand_ins.digest

    def encode(self, prompt: str | int | None) -> Match:
        """The class of a prompt; None or "" is the null label. Raises PromptError with suggestions."""
        return self.model.prompts.find(prompt)

    def evaluate(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Match],
        variant: Variant,
        turns: Sequence[Turn] = (),
        resume: Seen | None = None,
        focus: Focus | None = None,
        merging: Merging | None = None,
    ) -> tuple[Tensor, ...]:
        """One prediction [n, C, H, W] per branch of the variant."""
        if perturbs(variant):
            return self._perturbed(x, timesteps, conditions, variant)
        row = x, timesteps, conditions, variant
        if not turns and resume is None and focus is None and merging is None:
            return self.run_with(*row, variant.branches, lambda network, *inputs: network(*inputs))
        from vivace.engine.kept import split
        from vivace.models.caching.native import predict

        seen, made = going_on(resume, turns), {}
        for names, mine in split(variant.branches, turns):
            forward = partial(predict, branches=names, turns=mine, focus=focus, merging=merging)
            if seen is not None:
                forward = partial(forward, hidden=states_of(seen, names), block=seen.block)
            made.update(zip(names, self.run_with(*row, names, forward), strict=True))
        return tuple(made[branch] for branch in variant.branches)

    def _perturbed(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Match], variant: Variant
    ) -> tuple[Tensor, ...]:
        """Predictions of a row with the identity for attention maps of some blocks in some branches."""
        from vivace.models.perturbed import perturbed_dit

        made: dict[str, Tensor] = {}
        for part, blocks in parted(variant):
            forward = partial(perturbed_dit, blocks=blocks)
            made |= zip(
                part.branches, self.run_with(x, timesteps, conditions, part, part.branches, forward), strict=True
            )
        return tuple(made[branch] for branch in variant.branches)

    def why_not_kept(self, site: str, blocks: tuple[int, int]) -> None:
        """Nothing stands in the way of these sites: all blocks are alike."""

    def look(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Match],
        variant: Variant,
        metric: str,
        params: Sequence[float],
    ) -> Seen:
        """The first blocks of a row, and what a guard measures there: see `caching.native.look`."""
        from vivace.models.caching.native import look

        forward = partial(look, branches=variant.branches, metric=metric, params=params)
        seen: Seen = self.run_with(x, timesteps, conditions, variant, variant.branches, forward)
        return seen

    def run_with(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Match],
        variant: Variant,
        branches: Sequence[str],
        forward: Callable[..., Any],
    ) -> Any:
        """forward(network, x, timesteps, labels) for some branches, in the precisions of the variant."""
        import torch

        ids = [condition.id for condition in conditions]
        null = [self.model.classes] * len(ids)
        labels = torch.tensor([null if branch == "uncond" else ids for branch in branches], device=x.device)
        t = torch.tensor(timesteps, dtype=torch.float64, device=x.device)
        if not named(variant):
            return forward(self.model.module, x, t, labels)
        from vivace.models.quantized.layers import forward_at

        module, group_of = self.stand_ins.of(self.model.module, variant), self.stand_ins.group_of(variant)
        groups = None if group_of is None else [group_of(time) for time in timesteps] * len(branches)
        with forward_at(timesteps, None if groups is None else torch.tensor(groups, device=x.device)):
            return forward(module, x, t, labels)

    def compiler(self) -> Compiler | Replayable:
        """The native DiT's, for the device it is on. Raises UnsupportedError with the reason."""
        from vivace.models.compiled.native import native_compiler
        from vivace.models.compiled.replay import DitReplay

        module, null, quantized = self.model.module, self.model.classes, self.quantized
        given = {} if quantized is None else {"quantized": quantized}

        def label(match: Match, branch: str) -> int:
            return null if branch == "uncond" else match.id

        if self.device.type == "cuda":
            return DitReplay(module, label, **given)
        return native_compiler(module, self.spec, label, **given)

    def to_latent(self, image: Any) -> Tensor:
        """A PIL picture or path at model size, or a tensor as it is, as a latent [C, H, W]."""
        import torch

        return image if isinstance(image, torch.Tensor) else pictures.to_latent(image, self.model.shape)

    def to_images(self, latents: Tensor) -> list[Any]:
        """PIL pictures of latents; none for a model whose latents are not pixels."""
        return pictures.to_images(latents) if self.model.pixels else []

    def reports(self) -> dict[str, Any]:
        """Nothing: prompts are class names, pictures are latents."""
        return {}
