"""What the manifest of a pack says of a model: itself, its prompts, the bytes of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from vivace.engine.denoiser import Denoiser
from vivace.errors import UnsupportedError
from vivace.export.text import prompts_of
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.pipelines.network import NetworkDenoiser
from vivace.models.quantized.weights import QuantizedWeights


@dataclass(frozen=True, slots=True)
class Told:
    """model, prompts: as of `Manifest`; files: of tokenizers, by name."""

    model: Mapping[str, Any]
    prompts: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def example(self) -> Any:
        """A prompt to try the pack with."""
        return self.prompts.get("example")


def told_of(pipe: Any, denoiser: Denoiser, licence: str | None) -> Told:
    """What is told of a loaded model. licence: None for the one on its card, "unknown" without."""
    spec = denoiser.spec
    card: Mapping[str, Any] = getattr(pipe, "card", {})
    layout = spec.layout(spec.latent_shape)
    model = {
        "name": spec.name,
        "licence": licence or card.get("licence") or "unknown",
        "fingerprint": spec.fingerprint,
        "prediction": spec.prediction,
        "latent_shape": list(spec.latent_shape),
        "blocks": spec.blocks,
        "patch": list(spec.patch),
        "token_group": spec.token_group,
        "width": spec.width,
        "conditioning": spec.conditioning,
        "guidance": card.get("guidance_scale"),
        "schedule": None if spec.schedule is None else spec.schedule.describe(),
        "layout": {"edges": list(layout.edges), "channels": layout.channels, "places": layout.places},
        "pixels": isinstance(denoiser, ClassDenoiser) and denoiser.model.pixels,
    }
    if isinstance(denoiser, ClassDenoiser):
        return Told(model, _of_classes(denoiser, card))
    if not isinstance(denoiser, NetworkDenoiser):
        raise UnsupportedError(f"export: {type(denoiser).__name__} has no graphs; use a model of vivace.load")
    return Told(model, *prompts_of(denoiser))


def _of_classes(denoiser: ClassDenoiser, card: Mapping[str, Any]) -> dict[str, Any]:
    names = [list(asdict(each).values()) for each in denoiser.model.names]
    example = card.get("example", denoiser.model.names[0].name if names else 0)
    return {"kind": "class", "classes": denoiser.model.classes, "names": names, "example": example}


def weight_bytes(
    modules: Mapping[str, nn.Module],
    dtype: str,
    quantized: QuantizedWeights | None,
    both: bool,
) -> dict[str, int]:
    """Bytes of a pack's weights by precision, each tensor once: parameters of `modules`, stored in `dtype`.

    quantized: of the network, None for none; both: its layers are stored in `dtype` too, for rows that run them so.
    """
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    found = {id(each): each.numel() for module in modules.values() for each in module.parameters()}
    total = size * sum(found.values())
    if quantized is None:
        return {dtype: total}
    layers = quantized.layers.values()
    spared = 0 if both else size * sum(layer.weight.numel() for layer in layers)
    return {dtype: total - spared, quantized.format: sum(layer.nbytes for layer in layers)}
