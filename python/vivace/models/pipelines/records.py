"""What a record says of a family of foreign networks: blocks, streams, sites inside, how they run on some tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import nn

from vivace.engine.token_layout import Layout
from vivace.errors import ModelError
from vivace.models.pipelines.unet_layers import layers_of


@dataclass(frozen=True, slots=True)
class Shape:
    """How a block takes and returns its streams.

    hidden, context, skips: names of the arguments that are image tokens (or the feature map), text tokens, and what an
    up block takes from the down path; None: it has none. returns: the parts of its result in order, of "hidden",
    "context" and "skips"; ("hidden",) is a bare tensor.
    """

    hidden: str = "hidden_states"
    context: str | None = "encoder_hidden_states"
    skips: str | None = None
    returns: tuple[str, ...] = ("hidden",)


ALONE = Shape(context=None)  # reads and writes one stream
CROSS = Shape()  # reads text tokens, writes image tokens
LONG_SKIP = Shape(skips="skip")
DOWN = Shape(returns=("hidden", "skips"))
UP = Shape(skips="res_hidden_states_tuple")


@dataclass(frozen=True, slots=True)
class Child:
    """Modules inside a block. path: of one, from the block; "*" is every item of a list. streams: tensors it returns,
    of the shape of its first argument, and 2 of its `encoder_hidden_states`; text: its first argument is text."""

    path: str
    streams: int = 1
    text: bool = False


@dataclass(frozen=True, slots=True)
class Half:
    """What gives a site of a block ("attn", "cross_attn", "mlp"): its outputs before the gate.

    sites: several where one projection gives them together; children: those that a block lacks are left out; idle:
    what need not run either when the site is given.
    """

    sites: tuple[str, ...]
    children: tuple[Child, ...]
    idle: tuple[Child, ...] = ()


def halves(attention: str = "attn1", mlp: str = "ff", streams: int = 1) -> tuple[Half, ...]:
    """Attention, cross-attention `attn2` and MLP at these paths."""
    cross = Half(("cross_attn",), (Child("attn2"),))
    return Half(("attn",), (Child(attention, streams),)), cross, Half(("mlp",), (Child(mlp),))


def beside(attention: Child) -> tuple[Half, ...]:
    """An attention beside its MLP, which one projection joins."""
    return (Half(("attn", "mlp"), (Child("proj_out"),), (attention, Child("proj_mlp"))),)


JOINT = (  # one attention of two streams, and perhaps one more of the image alone
    Half(("attn",), (Child("attn", 2), Child("attn2"))),
    Half(("mlp",), (Child("ff"), Child("ff_context", text=True))),
)
NESTED = tuple(  # transformers within the block of a UNet
    Half((site,), (Child(f"attentions.*.transformer_blocks.*.{name}"),))
    for site, name in (("attn", "attn1"), ("cross_attn", "attn2"), ("mlp", "ff"))
)


class Rows(NamedTuple):
    """An argument of a block with a row for each token.

    axis: along which these lie, 0 where pictures share them; dims: of a tensor that has them, 0: of any; first: of a
    tuple of tensors only the first has them.
    """

    name: str
    axis: int
    dims: int = 0
    first: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """How blocks run on some of the image tokens.

    attention: children that are a self-attention of one product of queries and keys; behind: text tokens lie behind the
    image's in it, else ahead; options: arguments with a row for each token; closed: the network takes hidden states
    apart behind the last of these blocks, so that they leave it with all tokens; unfit: classes of blocks that cannot.
    """

    attention: tuple[str, ...] = ("attn1",)
    behind: bool = False
    options: tuple[Rows, ...] = ()
    closed: bool = False
    unfit: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """A list of blocks of a network, or a single block.

    path: the attribute that holds it; shape: None for what `diffusers` registers for the class of the blocks; text: for
    blocks with text tokens and image tokens in one sequence, the count of text tokens that lead it, from the arguments
    of the network's forward; kind: "transformer", or "down" | "mid" | "up" of a UNet; inside: its sites that caches can
    keep, () for those of whole blocks alone; mirrored: the last block reads again what the first one gave, and so on;
    tokens: how they run on some of the image tokens, None: they do not; merged: ("attn" | "mlp", path) of the modules
    that tokens of an image can be merged before, () where none can.
    """

    path: str
    shape: Shape | None = None
    text: Callable[[Mapping[str, Any]], int] | None = None
    kind: str = "transformer"
    inside: tuple[Half, ...] = ()
    mirrored: bool = False
    tokens: Tokens | None = None
    merged: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """A family of networks, known by the class name of the network.

    latent: configuration -> (C, spatial...) of one sample by default; patch: configuration -> edges of a token in
    latent elements, one per spatial axis; layout: how the network takes a latent, "channels" [B, C, ...], "tokens"
    [B, N, C of a whole patch] or "frames" [B, F, C, H, W]; prediction: "eps" | "v" | "flow", unless the scheduler says
    otherwise; sign: its output times this is that prediction; float32: what its blocks compute in float32 even when the
    network is float64; whole: why no row can compute some image tokens only; refused: what else does not work and why,
    for the documentation.
    """

    denoiser: str
    blocks: tuple[Blocks, ...]
    latent: Callable[[Any], tuple[int, ...]]
    patch: Callable[[Any], tuple[int, ...]]
    prediction: str = "flow"
    layout: str = "channels"
    sign: float = 1.0
    float32: str = ""
    whole: str = ""
    refused: tuple[str, ...] = ()

    def spec_fields(self, module: Any) -> dict[str, Any]:
        """What the network decides of a `ModelSpec`: latent_shape, blocks, layers, patch, token_group, prediction."""
        config = plain(module).config
        return {
            "latent_shape": tuple(self.latent(config)),
            "blocks": len(self.names(module)),
            "layers": len(layers_of(module, self.names(module))),
            "patch": tuple(self.patch(config)),
            "token_group": 1,
            "prediction": self.prediction,
        }

    def latents(self, module: Any, shape: tuple[int, ...]) -> Layout:
        """Where the image tokens of latents of that shape lie, as the network takes them."""
        patch = tuple(self.patch(plain(module).config))
        if self.layout == "tokens" and len(shape) == 2:
            return Layout(shape, (1, shape[1]), 1, prod(patch))
        if self.layout == "frames":
            return Layout(shape, (patch[0], shape[1], *patch[1:]), 1)
        return Layout(shape, (shape[0], *patch))

    def names(self, module: Any) -> tuple[tuple[str, Blocks], ...]:
        """Every block's path and the list it belongs to, in the order they run."""
        found: list[tuple[str, Blocks]] = []
        for entry in self.blocks:
            part = getattr(plain(module), entry.path, None)
            if isinstance(part, nn.ModuleList):
                found += [(f"{entry.path}.{index}", entry) for index in range(len(part))]
            elif part is not None:
                found.append((entry.path, entry))
        if not found:
            paths = ", ".join(entry.path for entry in self.blocks)
            raise ModelError(f"{self.denoiser}: no block under {paths}; the record needs the lists this network has")
        return tuple(found)


def plain(module: Any) -> Any:
    """The network itself, when `module` is what `torch.compile` made of it."""
    return getattr(module, "_orig_mod", module)
