"""What Vivace knows of each family of foreign networks: one record a family, in one table.

A record names the lists of blocks in the order they run, how a block takes and returns its streams of tokens, and the
latent the network denoises. Everything else (block access, specs, the table of docs/models.md) is made from it.
A network of your own: `register_family(Family(...))`; the error for an unknown one shows the record to start from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from vivace.errors import ArgumentError, ModelError, UnsupportedError


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
    of the shape of its first argument, and 2 of its `encoder_hidden_states`."""

    path: str
    streams: int = 1


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
    Half(("mlp",), (Child("ff"), Child("ff_context"))),
)
NESTED = tuple(  # transformers within the block of a UNet
    Half((site,), (Child(f"attentions.*.transformer_blocks.*.{name}"),))
    for site, name in (("attn", "attn1"), ("cross_attn", "attn2"), ("mlp", "ff"))
)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A list of blocks of a network, or a single block.

    path: the attribute that holds it; shape: None for what `diffusers` registers for the class of the blocks; text: for
    blocks with text tokens and image tokens in one sequence, the count of text tokens that lead it, from the arguments
    of the network's forward; kind: "transformer", or "down" | "mid" | "up" of a UNet; inside: its sites that caches can
    keep, () for those of whole blocks alone; mirrored: the last block reads again what the first one gave, and so on.
    """

    path: str
    shape: Shape | None = None
    text: Callable[[Mapping[str, Any]], int] | None = None
    kind: str = "transformer"
    inside: tuple[Half, ...] = ()
    mirrored: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """A family of networks, known by the class name of the network.

    latent: configuration -> (C, spatial...) of one sample by default; patch: configuration -> edges of a token in
    latent elements, one per spatial axis; layout: how the network takes a latent, "channels" [B, C, ...], "tokens"
    [B, N, C of a whole patch] or "frames" [B, F, C, H, W]; prediction: "eps" | "v" | "flow", unless the scheduler says
    otherwise; sign: its output times this is that prediction; float32: what its blocks compute in float32 even when the
    network is float64; refused: what does not work and why, for the documentation.
    """

    denoiser: str
    blocks: tuple[Blocks, ...]
    latent: Callable[[Any], tuple[int, ...]]
    patch: Callable[[Any], tuple[int, ...]]
    prediction: str = "flow"
    layout: str = "channels"
    sign: float = 1.0
    float32: str = ""
    refused: tuple[str, ...] = ()

    def spec_fields(self, module: Any) -> dict[str, Any]:
        """What the network decides of a `ModelSpec`: latent_shape, blocks, patch, token_group, prediction."""
        config = plain(module).config
        return {
            "latent_shape": tuple(self.latent(config)),
            "blocks": len(self.names(module)),
            "patch": tuple(self.patch(config)),
            "token_group": 1,
            "prediction": self.prediction,
        }

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


def family_of(module: Any) -> Family:
    """The record of a network's class or of a class it inherits from. Raises UnsupportedError with the lines to add."""
    for cls in type(plain(module)).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise UnsupportedError(
        f"{type(module).__name__} is of no known family; known: {', '.join(sorted(FAMILIES))}. If it is a network of "
        f"transformer blocks, check these lines and run them before loading:\n\n{_draft(plain(module))}"
    )


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Makes a family known to `load` and `accelerate`. Raises ArgumentError for a name that is taken."""
    if family.denoiser in FAMILIES and not replace:
        raise ArgumentError(f"register_family: {family.denoiser} is known already; pass replace=True to replace it")
    FAMILIES[family.denoiser] = family
    return family


def registered_shape(cls: Any) -> Shape | None:
    """What `diffusers` keeps for its own caches about a class of blocks, or None."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(cls)
    except ValueError:
        return None
    places = {"hidden": known.return_hidden_states_index, "context": known.return_encoder_hidden_states_index}
    returns = sorted((part for part in places if places[part] is not None), key=lambda part: places[part])
    context = known.encoder_hidden_states_argument_name
    taken = context if context in arguments_of(cls) else None
    return Shape(known.hidden_states_argument_name, taken, returns=tuple(returns))


@cache
def arguments_of(cls: Any) -> tuple[str, ...]:
    """Names of the arguments of a module class's forward, in order."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(cls.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind not in kinds)[1:]


def _draft(module: Any) -> str:
    """A record as far as the network's own lists of modules tell."""
    lines = []
    for path, part in module.named_children() if isinstance(module, nn.Module) else ():
        if isinstance(part, nn.ModuleList) and len(part) > 0:
            cls = type(plain(part[0]))
            names, shape = arguments_of(cls), ""
            if registered_shape(cls) is None:
                context = next((name for name in names if "encoder" in name and "mask" not in name), None)
                shape = f", Shape(hidden={(names or ('?',))[0]!r}, context={context!r}, returns=('hidden',))"
            lines.append(f"            Blocks({path!r}{shape}),  # {len(part)} x {cls.__name__}({', '.join(names)})")
    listed = "\n".join(lines) or "            Blocks('transformer_blocks', Shape()),  # no list of modules found"
    return f"""from vivace.models.pipelines.families import Blocks, Family, Shape, register_family

register_family(
    Family(
        denoiser={type(module).__name__!r},
        blocks=(
            # in the order they run; returns=('hidden', 'context') for blocks that write text tokens too
{listed}
        ),
        latent=lambda config: (config.in_channels, config.sample_size, config.sample_size),
        patch=lambda config: (config.patch_size, config.patch_size),
        prediction="flow",
    )
)"""


def _square(config: Any, channels: str = "in_channels", default: int = 128) -> tuple[int, ...]:
    """(C, H, W) of a network that knows its size."""
    size = config.get("sample_size") or default
    return (config[channels], *(size if isinstance(size, (list, tuple)) else (size, size)))


def _patches(config: Any) -> tuple[int, int]:
    return (config.patch_size, config.patch_size)


def _cubes(config: Any) -> tuple[int, int, int]:
    return (config.get("patch_size_t") or 1, config.patch_size, config.patch_size)


def _packed(config: Any) -> tuple[int, int, int]:
    """(C, H, W) of a network that is fed patches of 2 x 2."""
    return ((config.out_channels or config.in_channels) // 4, 128, 128)


def _frames(count: int, height: int, width: int) -> Callable[[Any], tuple[int, ...]]:
    """(C, F, H, W) of a video network that does not know its size."""
    return lambda config: (config.out_channels or config.in_channels, count, height, width)


def _clip(config: Any) -> tuple[int, ...]:
    """(C, F, H, W) of CogVideoX: the first frame alone, then as many in one latent frame as its VAE merges."""
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    step = config.get("patch_size_t") or 1
    return (config.out_channels, -(-frames // step) * step, config.sample_height, config.sample_width)


def _text_ahead(arguments: Mapping[str, Any]) -> int:
    """Text tokens ahead of the image's: as many as the prompt has."""
    return int(arguments["encoder_hidden_states"].shape[1])


def _caption_ahead(arguments: Mapping[str, Any]) -> int:
    """Text tokens ahead of the image's when each row keeps only the tokens of its mask."""
    lengths = {int(count) for count in arguments["encoder_attention_mask"].sum(dim=1)}
    if len(lengths) > 1:
        raise UnsupportedError(
            f"Lumina2: captions of {sorted(lengths)} tokens in one batch put the image tokens of each row elsewhere, "
            "and a block needs them in one place; pass prompts of one length, or one prompt a call"
        )
    return lengths.pop()


_STREAM = (Blocks("transformer_blocks", inside=halves()),)
_DOUBLE = Blocks("transformer_blocks", inside=JOINT)
_PARALLEL = (Half(("attn", "mlp"), (Child("attn"),)),)  # one module is both
_QWEN = (Half(("attn",), (Child("attn", 2),)), Half(("mlp",), (Child("img_mlp"), Child("txt_mlp"))))
_LUMINA = (Half(("attn",), (Child("attn"),)), Half(("mlp",), (Child("feed_forward"),)))
_UNET = (
    Blocks("down_blocks", DOWN, kind="down", inside=NESTED),
    Blocks("mid_block", CROSS, kind="mid", inside=NESTED),
    Blocks("up_blocks", UP, kind="up", inside=NESTED),
)

FAMILIES: dict[str, Family] = {
    family.denoiser: family
    for family in (
        Family(
            denoiser="DiTTransformer2DModel",
            blocks=_STREAM,
            latent=_square,
            patch=_patches,
            prediction="eps",
            float32="the embedding of the timestep",
        ),
        Family("PixArtTransformer2DModel", _STREAM, _square, _patches, "eps"),
        Family("SD3Transformer2DModel", (_DOUBLE,), _square, _patches, float32="variances of RMS norms"),
        Family(
            denoiser="FluxTransformer2DModel",
            blocks=(_DOUBLE, Blocks("single_transformer_blocks", inside=beside(Child("attn")))),
            latent=_packed,
            patch=lambda config: (2, 2),
            layout="tokens",
            float32="rotary embeddings",
        ),
        Family(
            denoiser="UNet2DConditionModel",
            blocks=_UNET,
            latent=lambda config: _square(config, "out_channels", 64),
            patch=lambda config: (1, 1),
            prediction="eps",
        ),
        Family(
            denoiser="Flux2Transformer2DModel",
            blocks=(_DOUBLE, Blocks("single_transformer_blocks", text=_text_ahead, inside=_PARALLEL)),
            latent=lambda config: (config.out_channels or config.in_channels, 64, 64),
            patch=lambda config: (1, 1),
            layout="tokens",
            float32="rotary embeddings",
        ),
        Family(
            denoiser="QwenImageTransformer2DModel",
            blocks=(Blocks("transformer_blocks", inside=_QWEN),),
            latent=lambda config: (config.in_channels // 4, 128, 128),
            patch=lambda config: (2, 2),
            layout="tokens",
            float32="variances of RMS norms, rotary embeddings",
        ),
        Family(
            denoiser="Lumina2Transformer2DModel",
            blocks=(
                Blocks("noise_refiner", ALONE, inside=_LUMINA),
                Blocks("layers", ALONE, text=_caption_ahead, inside=_LUMINA),
            ),
            latent=_square,
            patch=_patches,
            sign=-1.0,
            float32="variances of RMS norms, rotary embeddings, the gate of the MLP",
            refused=("captions of different lengths in one batch: image tokens lie elsewhere in each row",),
        ),
        Family(
            denoiser="SanaTransformer2DModel",
            blocks=(Blocks("transformer_blocks", CROSS, inside=halves()),),
            latent=_square,
            patch=_patches,
            float32="linear attention",
        ),
        Family(
            denoiser="HunyuanDiT2DModel",
            blocks=(Blocks("blocks", LONG_SKIP, inside=halves(), mirrored=True),),
            latent=_square,
            patch=_patches,
            prediction="v",
            float32="layer norms",
        ),
        Family(
            denoiser="CogVideoXTransformer3DModel",
            blocks=(Blocks("transformer_blocks", inside=halves(streams=2)),),
            latent=_clip,
            patch=_cubes,
            prediction="v",
            layout="frames",
        ),
        Family(
            denoiser="WanTransformer3DModel",
            blocks=(Blocks("blocks", inside=halves(mlp="ffn")),),
            latent=_frames(21, 60, 104),
            patch=lambda config: tuple(config.patch_size),
            float32="norms, modulation, residuals",
        ),
        Family(
            denoiser="LTXVideoTransformer3DModel",
            blocks=_STREAM,
            latent=_frames(21, 16, 22),
            patch=_cubes,
            layout="tokens",
            float32="variances of RMS norms, rotary embeddings",
        ),
        Family(
            denoiser="HunyuanVideoTransformer3DModel",
            blocks=(_DOUBLE, Blocks("single_transformer_blocks", inside=beside(Child("attn", 2)))),
            latent=_frames(33, 90, 160),
            patch=_cubes,
            float32="variances of RMS norms, rotary embeddings",
        ),
    )
}
