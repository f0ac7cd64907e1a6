"""What Vivace knows of each family of foreign networks: one record a family, in one table.

A record names the lists of blocks in the order they run, how a block takes and returns its streams of tokens, and the
latent the network denoises. Everything else (block access, specs, the table of docs/models.md) is made from it.
A network of your own: `register_family(Family(...))`; the error for an unknown one shows the record to start from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from vivace.errors import ArgumentError, UnsupportedError
from vivace.models.pipelines.records import (
    ALONE,
    CROSS,
    DOWN,
    JOINT,
    LONG_SKIP,
    NESTED,
    UP,
    Blocks,
    Child,
    Family,
    Half,
    Rows,
    Shape,
    Tokens,
    beside,
    halves,
    plain,
)


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


_MERGED = (("attn", "attn1"), ("mlp", "ff"))
_MERGED_JOINT = (("attn", "attn"), ("attn", "attn2"), ("mlp", "ff"))
_STREAM = (Blocks("transformer_blocks", inside=halves(), tokens=Tokens(), merged=_MERGED),)
_ROTARY = Rows("image_rotary_emb", 0)
_ROTATED = Tokens(("attn",), options=(_ROTARY,))  # text ahead, one table for text and image or for the image
_DOUBLE = Blocks("transformer_blocks", inside=JOINT, tokens=_ROTATED)
_PARALLEL = (Half(("attn", "mlp"), (Child("attn"),)),)  # one module is both
_QWEN = (Half(("attn",), (Child("attn", 2),)), Half(("mlp",), (Child("img_mlp"), Child("txt_mlp", text=True))))
_PAIRED = Tokens(("attn",), options=(Rows("image_rotary_emb", 0, first=True), Rows("modulate_index", 1)))
_LUMINA = (Half(("attn",), (Child("attn"),)), Half(("mlp",), (Child("feed_forward"),)))
_REFINED = Tokens(("attn",), options=(Rows("image_rotary_emb", 1),), closed=True)
_WAN = Tokens(options=(Rows("rotary_emb", 1), Rows("temb", 1, dims=4)))
_LTX = Tokens(options=(Rows("image_rotary_emb", 1), Rows("temb", 1)))
_VIDEO = Tokens(
    ("attn",),
    True,
    (_ROTARY, Rows("freqs_cis", 0)),
    unfit=("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
)
_MERGED_NESTED = tuple((site, f"attentions.*.transformer_blocks.*.{path}") for site, path in _MERGED)
_UNET = (
    Blocks("down_blocks", DOWN, kind="down", inside=NESTED, merged=_MERGED_NESTED),
    Blocks("mid_block", CROSS, kind="mid", inside=NESTED, merged=_MERGED_NESTED),
    Blocks("up_blocks", UP, kind="up", inside=NESTED, merged=_MERGED_NESTED),
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
        Family(
            denoiser="SD3Transformer2DModel",
            blocks=(
                Blocks(
                    "transformer_blocks",
                    inside=JOINT,
                    tokens=Tokens(("attn", "attn2"), behind=True),
                    merged=_MERGED_JOINT,
                ),
            ),
            latent=_square,
            patch=_patches,
            float32="variances of RMS norms",
        ),
        Family(
            denoiser="FluxTransformer2DModel",
            blocks=(
                replace(_DOUBLE, merged=_MERGED_JOINT),
                Blocks(
                    "single_transformer_blocks",
                    inside=beside(Child("attn")),
                    tokens=_ROTATED,
                    merged=(("attn", "attn"),),
                ),
            ),
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
            whole="its blocks are convolutions, which read the neighbours of every place",
        ),
        Family(
            denoiser="Flux2Transformer2DModel",
            blocks=(
                _DOUBLE,
                Blocks("single_transformer_blocks", text=_text_ahead, inside=_PARALLEL, tokens=_ROTATED),
            ),
            latent=lambda config: (config.out_channels or config.in_channels, 64, 64),
            patch=lambda config: (1, 1),
            layout="tokens",
            float32="rotary embeddings",
        ),
        Family(
            denoiser="QwenImageTransformer2DModel",
            blocks=(Blocks("transformer_blocks", inside=_QWEN, tokens=_PAIRED),),
            latent=lambda config: (config.in_channels // 4, 128, 128),
            patch=lambda config: (2, 2),
            layout="tokens",
            float32="variances of RMS norms, rotary embeddings",
        ),
        Family(
            denoiser="Lumina2Transformer2DModel",
            blocks=(
                Blocks("noise_refiner", ALONE, inside=_LUMINA, tokens=_REFINED),
                Blocks("layers", ALONE, text=_caption_ahead, inside=_LUMINA, tokens=_REFINED),
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
            whole="its attention keeps a sum over all tokens instead of keys, and its MLPs are convolutions",
        ),
        Family(
            denoiser="HunyuanDiT2DModel",
            blocks=(Blocks("blocks", LONG_SKIP, inside=halves(), mirrored=True, tokens=Tokens(options=(_ROTARY,))),),
            latent=_square,
            patch=_patches,
            prediction="v",
            float32="layer norms",
        ),
        Family(
            denoiser="CogVideoXTransformer3DModel",
            blocks=(Blocks("transformer_blocks", inside=halves(streams=2), tokens=Tokens(options=(_ROTARY,))),),
            latent=_clip,
            patch=_cubes,
            prediction="v",
            layout="frames",
        ),
        Family(
            denoiser="WanTransformer3DModel",
            blocks=(Blocks("blocks", inside=halves(mlp="ffn"), tokens=_WAN),),
            latent=_frames(21, 60, 104),
            patch=lambda config: tuple(config.patch_size),
            float32="norms, modulation, residuals",
        ),
        Family(
            denoiser="LTXVideoTransformer3DModel",
            blocks=(Blocks("transformer_blocks", inside=halves(), tokens=_LTX),),
            latent=_frames(21, 16, 22),
            patch=_cubes,
            layout="tokens",
            float32="variances of RMS norms, rotary embeddings",
        ),
        Family(
            denoiser="HunyuanVideoTransformer3DModel",
            blocks=(
                Blocks("transformer_blocks", inside=JOINT, tokens=_VIDEO),
                Blocks("single_transformer_blocks", inside=beside(Child("attn", 2)), tokens=_VIDEO),
            ),
            latent=_frames(33, 90, 160),
            patch=_cubes,
            float32="variances of RMS norms, rotary embeddings",
        ),
    )
}
