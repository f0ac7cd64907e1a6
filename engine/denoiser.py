"""What the engine asks of a model: a spec, conditions from prompts, predictions per branch, pictures from latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.engine.plan import Variant


class Denoiser(Protocol):
    """A network the executors can run. It holds weights only; everything of a request is an argument."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype

    def encode(self, prompt: Any) -> Any:
        """The condition of a prompt, opaque to the engine. Raises PromptError before any work starts."""
        ...

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        """Predictions of `variant.branches`: each [n, ...] for x [n, ...], one timestep and one condition a sample."""
        ...

    def to_latent(self, image: Any) -> Tensor:
        """A picture or latent as a tensor of the latent's shape."""
        ...

    def to_images(self, latents: Tensor) -> list[Any]:
        """Latents [n, ...] as PIL pictures."""
        ...


class CallableDenoiser:
    """A plain function denoiser(x, t) or denoiser(x, t, branch=...) as a `Denoiser` for `vivace.sample`."""

    def __init__(self, call: Callable[..., Tensor], prediction: str, shape: tuple[int, ...], like: Tensor) -> None:
        self.call = call
        self.device, self.dtype = like.device, like.dtype
        self.spec = ModelSpec("callable", "callable", prediction, shape, 0, (1,) * (len(shape) - 1))

    def encode(self, prompt: Any) -> None:
        return None

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        t = torch.tensor(timesteps, dtype=x.dtype, device=x.device)
        if variant.branches == ("cond",):
            return (self.call(x, t),)
        return tuple(self.call(x, t, branch=branch) for branch in variant.branches)

    def to_latent(self, image: Any) -> Tensor:
        return torch.as_tensor(image, dtype=self.dtype, device=self.device)

    def to_images(self, latents: Tensor) -> list[Any]:
        return []
