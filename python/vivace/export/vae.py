"""The decoder of a pipeline of diffusers as a graph: latents as plans have them to pictures, uint8.

Between the last latents and its VAE a pipeline scales, shifts and perhaps unpacks: that is measured on a run of the
pipeline's own call, not looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vivace.export.pack import MadeGraph
from vivace.export.tidy import tidied
from vivace.export.traced_ops import constants_of, exported, found_free, layers_of
from vivace.export.weights import WeightStore
from vivace.models.pipelines.capture import Stop, hear
from vivace.models.pipelines.denoiser import PipelineDenoiser
from vivace.models.pipelines.views import view
from vivace.runtime.manifest import Port

ROWS = 2
PREFIX = "vae."


@dataclass(frozen=True)
class Handed:
    """What a VAE is handed for latents x: scale x + shift, numbers or [1, C, 1, 1], of its elements at `places`
    ([C, H, W] into the flat latent, None: as they lie), in that dtype."""

    scale: Tensor
    shift: Tensor
    places: Tensor | None
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[n, C, H, W] of latents float32 [n, ...]."""
        z = x if self.places is None else x.flatten(1)[:, self.places]
        return (z * self.scale + self.shift).to(self.dtype)


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, vae: Any, handed: Handed) -> None:
        super().__init__()
        self.vae, self._handed = vae, handed

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """uint8 [n, height, width, 3] of latents float32 [n, ...]."""
        picture = self.vae.decode(self._handed(tensors[0]), return_dict=False)[0].float()
        shown = (picture * 0.5 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1)
        return [(shown * 255.0).round().to(torch.uint8)]


def decode_graph(denoiser: Any, opset: int, store: WeightStore) -> MadeGraph | None:
    """The graph of role "decode"; None for a network without a decoder, and for one of videos, or whose pictures the
    graph would not give as the pipeline does.

    Raises: UnsupportedError where the VAE cannot be traced.
    """
    vae = getattr(getattr(denoiser, "pipeline", None), "vae", None)
    if not isinstance(denoiser, PipelineDenoiser) or vae is None:
        return None
    latent = tuple(denoiser.spec.latent_shape)
    handed = _handed(denoiser, latent)
    if handed is None:
        return None
    decoder = Decoder(vae, handed)
    with torch.no_grad():
        x = torch.randn(ROWS, *latent, generator=torch.Generator().manual_seed(1)).to(denoiser.device)
        picture = decoder([x])[0]
        wanted = denoiser.to_images(x[:1].to(denoiser.dtype))
    if not _alike(picture[0], wanted[0]):
        return None
    dims = {0: Dim.DYNAMIC} | ({2: Dim.AUTO, 3: Dim.AUTO} if handed.places is None else {})
    program, model = exported(decoder, [x], [dims], opset, type(vae).__name__)
    free: tuple[int | str, ...] = (latent[0], "height", "width") if handed.places is None else latent
    inputs = [found_free(Port("latents", "float32", ("rows", *free), "latent"), model.graph.input[0])]
    fixed = inputs[0].shape[1:] == latent
    shape = tuple(picture.shape[1:3]) if fixed else ("picture_height", "picture_width")
    outputs = [Port("picture", "uint8", ("rows", *shape, 3), "picture")]
    made, used = tidied(model, inputs, outputs, layers_of(program), store, PREFIX, known=constants_of(program))
    return MadeGraph("decode", "decode", made, used, tuple(outputs))


def decoder_modules(denoiser: Any) -> dict[str, nn.Module]:
    """Modules of the pipeline's VAE that decode."""
    vae = getattr(getattr(denoiser, "pipeline", None), "vae", None)
    names = ("decoder", "post_quant_conv")
    return {f"vae.{name}": part for name in names if isinstance(part := getattr(vae, name, None), nn.Module)}


def _handed(denoiser: PipelineDenoiser, latent: tuple[int, ...]) -> Handed | None:
    """What the pipeline hands its VAE, from three runs; None where that is no affine function of each element, or no
    picture is decoded in the end."""
    count = int(torch.Size(latent).numel())
    zero = torch.zeros(latent)
    base = _heard(denoiser, zero)
    if base is None or base.dim() != 4 or base.shape[1:].numel() != count:
        return None
    marks = torch.arange(count, dtype=torch.float32).reshape(latent)
    one, other = _heard(denoiser, zero + 1.0), _heard(denoiser, marks)
    assert one is not None and other is not None, "the same run as before"
    shift, scale = base[:1].float(), one[:1].float() - base[:1].float()
    places = ((other[:1].float() - shift) / scale).round().long()[0]
    if not torch.equal(places.flatten().sort().values, torch.arange(count)):
        return None
    moved = None if torch.equal(places.flatten(), torch.arange(count)) and places.shape == latent else places
    return Handed(_short(scale), _short(shift), moved, base.dtype)


def _short(values: Tensor) -> Tensor:
    """[1, C, H, W] as one number, or one a channel, where it is no more."""
    channel = values[:, :, :1, :1]
    if bool((values == values.flatten()[0]).all()):
        return values.flatten()[0]
    near = (values - channel).abs().max() <= 4 * torch.finfo(torch.float32).eps * values.abs().max()
    return channel if bool(near) else values


def _heard(denoiser: PipelineDenoiser, latent: Tensor) -> Tensor | None:
    """What the VAE is handed when the run ends at a latent; None: nothing."""
    found: list[Tensor] = []

    def decode(z: Tensor, *_: Any, **__: Any) -> Any:
        found.append(z.detach())
        raise Stop

    prompting = denoiser.prompting
    arguments = prompting.arguments(None)
    with torch.no_grad():
        stand_in = view(denoiser.pipeline.vae, decode=decode)
        hear(denoiser.pipeline, prompting.networks, arguments, result=latent[None], vae=stand_in, cache=prompting.cache)
    return found[0] if found else None


def _alike(picture: Tensor, wanted: Any) -> bool:
    """A picture is the pipeline's, but for a level where a half was rounded."""
    import numpy as np

    theirs = torch.from_numpy(np.array(wanted)).short() if hasattr(wanted, "size") else None
    if theirs is None or theirs.shape != picture.shape:
        return False
    return int((theirs - picture.cpu().short()).abs().max()) <= 1
