"""What the engine asks of a model: a spec, conditions from prompts, predictions per branch, pictures from latents.

A model whose blocks can be reached is also `Parts`: a stem (everything before the first block), blocks that read and
write one or two streams of tokens, and a head. Guidance branches are rows of the batch, in every part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.engine.plan import Variant


class Denoiser(Protocol):
    """A network the executors can run. It holds weights only; everything of a request is an argument.

    models: names of its networks as plans call them, "main" first.
    """

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    models: tuple[str, ...]

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

    def reports(self) -> dict[str, Any]:
        """What text encoding and decoding did, for the receipt; plain data."""
        ...


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block of a model, counted in the order of execution.

    name: its path, "transformer_blocks.3"; kind: "transformer", or "down" | "mid" | "up" of a UNet; text: it also
    writes the stream of text tokens; joint: hidden states hold text tokens and image tokens in one sequence.
    """

    index: int
    name: str
    kind: str = "transformer"
    text: bool = False
    joint: bool = False


@dataclass(frozen=True, slots=True)
class BlockOut:
    """What a block writes: hidden [R, N, D] (UNet: [R, C, H, W]), context [R, M, D] or None, skips of a down block."""

    hidden: Tensor
    context: Tensor | None = None
    skips: tuple[Tensor, ...] = ()


@dataclass(slots=True)
class BlockCall:
    """A block's turn in a forward.

    hidden: image tokens (or feature map) it reads; context: text tokens it reads, None without; skips: what an up
    block takes from the down path; image: slice of `hidden` along its tokens that are image tokens; options: whatever
    else the model hands to the block, by argument name.
    """

    info: BlockInfo
    hidden: Tensor
    context: Tensor | None
    compute: Callable[[], BlockOut]  # runs the block as the model would
    skips: tuple[Tensor, ...] = ()
    image: slice = field(default_factory=lambda: slice(None))
    options: dict[str, Any] = field(default_factory=dict)


Interceptor = Callable[[BlockCall], BlockOut]


class Parts(Protocol):
    """A model whose blocks can be observed and replaced, in one forward, for one caller."""

    blocks: tuple[BlockInfo, ...]

    def forward(self, interceptor: Interceptor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, every block's turn handed to `interceptor`; with `call.compute()` the same bits."""
        ...


class CallableDenoiser:
    """A plain function denoiser(x, t) or denoiser(x, t, branch=...) as a `Denoiser` for `vivace.sample`."""

    models: tuple[str, ...] = ("main",)

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

    def reports(self) -> dict[str, Any]:
        return {}
