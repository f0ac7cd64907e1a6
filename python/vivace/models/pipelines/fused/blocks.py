"""Own forwards of the blocks of image models: DiT, PixArt and UNets, SD3, Flux, Flux 2, Qwen-Image, Sana, Lumina 2.

Attentions, linears and whatever else computes stay the block's own modules; between them our ops take over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivace.models.pipelines.fused.norms import fresh
from vivace.models.pipelines.fused.ops import Ops
from vivace.models.pipelines.fused.pattern import Pattern, children, places

BASIC = ("ada_norm_zero", "ada_norm_single", "layer_norm")


def basic(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Any] | None = None,
) -> Any:
    """BasicTransformerBlock with ada_norm_zero (DiT), ada_norm_single (PixArt) or layer_norm (UNets)."""
    options = cross_attention_kwargs or {}
    if "gligen" in options or "scale" in options or block._chunk_size is not None or hidden_states.dim() != 3:
        return NotImplemented
    single, gate = block.norm_type == "ada_norm_single", None
    modulation: tuple[Tensor | None, ...] = (None, None, None)
    if single:
        vectors = _table(block.scale_shift_table, timestep, hidden_states)
        if vectors is None:
            return NotImplemented
        shift, scale, gate, *rest = vectors
        inner, modulation = ops.norm(block.norm1, hidden_states, scale, shift), (rest[1], rest[0], rest[2])
    elif block.norm_type == "ada_norm_zero":
        dtype = hidden_states.dtype
        inner, gate, *rest = block.norm1(hidden_states, timestep, class_labels, hidden_dtype=dtype)
        modulation = rest[1], rest[0], rest[2]
    else:
        inner = block.norm1(hidden_states)
    context = encoder_hidden_states if block.only_cross_attention else None
    update = block.attn1(inner, encoder_hidden_states=context, attention_mask=attention_mask, **options)
    if block.attn2 is not None:
        if single:  # reads the hidden states as they are
            inner = hidden_states = ops.residual(hidden_states, update, gate)
        else:
            hidden_states, inner = ops.step(hidden_states, update, gate, block.norm2)
        masked = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        update, gate = block.attn2(inner, **masked, **options), None
    norm = block.norm2 if single else block.norm3
    return ops.half(hidden_states, update, gate, norm, modulation, block.ff)


def _basic_problem(block: Any) -> str | None:
    if block.norm_type not in BASIC:
        return f"norm_type {block.norm_type!r}"
    if block.pos_embed is not None:
        return "a positional embedding inside the block"
    return "chunked feed-forward" if block._chunk_size is not None else None


def _basic_places(block: Any) -> dict[str, int]:
    single, cross = block.norm_type == "ada_norm_single", block.attn2 is not None
    residuals = 1 + (single and cross)
    steps = 1 + (cross and not single)
    return {"gated_residual": residuals, "adaln_modulate": steps} | ({"norm_modulate": 1} if single else {})


def _basic_norms(block: Any) -> tuple[str, ...]:
    return ("norm1", "norm2", "norm3") if block.norm_type == "ada_norm_single" else ("norm2", "norm3")


def _table(table: Tensor, emb: Tensor | None, hidden: Tensor) -> tuple[Tensor, ...] | None:
    """table [6, D] + conditioning [B, 6 D] as six [B, D]; None when they have another dtype than the hidden states."""
    if emb is None or table.dtype is not hidden.dtype or emb.dtype is not hidden.dtype:
        return None
    return (table[None] + emb.reshape(hidden.shape[0], 6, -1)).unbind(1)


def joint(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """JointTransformerBlock (SD3)."""
    if block._chunk_size is not None or not ops.ready(encoder_hidden_states):
        return NotImplemented
    options = joint_attention_kwargs or {}
    inner, gate, shift, scale, gate_mlp, *dual = block.norm1(hidden_states, emb=temb)
    if block.context_pre_only:
        text, rest = block.norm1_context(encoder_hidden_states, temb), []
    else:
        text, *rest = block.norm1_context(encoder_hidden_states, emb=temb)
    update, text_update = block.attn(hidden_states=inner, encoder_hidden_states=text, **options)
    if block.use_dual_attention:
        hidden_states = ops.residual(hidden_states, update, gate)
        update, gate = block.attn2(hidden_states=dual[0], **options), dual[1]
    hidden = ops.half(hidden_states, update, gate, block.norm2, (scale, shift, gate_mlp), block.ff)
    if block.context_pre_only:
        return None, hidden
    return text_half(ops, block, encoder_hidden_states, text_update, rest), hidden


def text_half(ops: Ops, block: Any, text: Tensor, update: Tensor, rest: Any) -> Tensor:
    """The second half of a block for its text stream; rest: gate, shift, scale, gate."""
    gate, shift, scale, gate_mlp = rest
    return ops.half(text, update, gate, block.norm2_context, (scale, shift, gate_mlp), block.ff_context)


def _joint_problem(block: Any) -> str | None:
    return "chunked feed-forward" if block._chunk_size is not None else None


def _joint_places(block: Any) -> dict[str, int]:
    streams = 1 if block.context_pre_only else 2
    return {"gated_residual": streams + int(block.use_dual_attention), "adaln_modulate": streams}


def flux(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """FluxTransformerBlock: two streams, one attention."""
    if not ops.ready(encoder_hidden_states):
        return NotImplemented
    inner, gate, shift, scale, gate_mlp = block.norm1(hidden_states, emb=temb)
    text, *rest = block.norm1_context(encoder_hidden_states, emb=temb)
    update, text_update, *adapter = block.attn(
        hidden_states=inner,
        encoder_hidden_states=text,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden = ops.half(hidden_states, update, gate, block.norm2, (scale, shift, gate_mlp), block.ff)
    for extra in adapter:
        hidden = ops.residual(hidden, extra)
    return text_half(ops, block, encoder_hidden_states, text_update, rest), hidden


def flux_single(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """FluxSingleTransformerBlock: one stream [text, image], attention beside the feed-forward."""
    tokens = encoder_hidden_states.shape[1]
    hidden = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    inner, gate = block.norm(hidden, emb=temb)
    options = joint_attention_kwargs or {}
    update = block.attn(hidden_states=inner, image_rotary_emb=image_rotary_emb, **options)
    hidden = beside(ops, block, hidden, inner, update, gate)
    return hidden[:, :tokens], hidden[:, tokens:]


def beside(ops: Ops, block: Any, hidden: Tensor, inner: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """hidden + gate * projection of [update, GELU(feed-forward)]."""
    approximate = block.act_mlp.approximate
    wide = ops.gelu(block.proj_mlp(inner), approximate=approximate, inside=fresh(block.proj_mlp))
    return ops.residual(hidden, block.proj_out(torch.cat([update, wide], dim=2)), gate)


def single_problem(block: Any) -> str | None:
    """Why a block with attention beside its feed-forward keeps its own forward."""
    name = type(block.act_mlp).__name__
    return None if name == "GELU" else f"activation {name}"


def flux2(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Flux2TransformerBlock: modulation vectors come from the model."""
    mods = temb_mod_img, temb_mod_txt
    if not ops.ready(encoder_hidden_states) or not all(ops.ready(mod) for mod in mods):
        return NotImplemented
    image, text = ((mod[:, None] if mod.dim() == 2 else mod).chunk(6, dim=-1) for mod in mods)
    update, text_update = block.attn(
        hidden_states=ops.norm(block.norm1, hidden_states, image[1], image[0]),
        encoder_hidden_states=ops.norm(block.norm1_context, encoder_hidden_states, text[1], text[0]),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    hidden = ops.half(hidden_states, update, image[2], block.norm2, (image[4], image[3], image[5]), block.ff)
    return text_half(ops, block, encoder_hidden_states, text_update, text[2:]), hidden


def flux2_single(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    """Flux2SingleTransformerBlock: attention and feed-forward are one module."""
    if not ops.ready(temb_mod):
        return NotImplemented
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = (temb_mod[:, None] if temb_mod.dim() == 2 else temb_mod).chunk(3, dim=-1)
    inner = ops.norm(block.norm, hidden_states, scale, shift)
    options = joint_attention_kwargs or {}
    update = block.attn(hidden_states=inner, image_rotary_emb=image_rotary_emb, **options)
    hidden = ops.residual(hidden_states, update, gate)
    return (hidden[:, :text_seq_len], hidden[:, text_seq_len:]) if split_hidden_states else hidden


def qwen(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> Any:
    """QwenImageTransformerBlock; `modulate_index` [B, N] picks one of two conditionings per token."""
    if not ops.ready(encoder_hidden_states) or not ops.ready(temb):
        return NotImplemented
    vectors = block.img_mod(temb)
    if modulate_index is not None:
        first, second = vectors.chunk(2, dim=0)
        vectors = torch.where(modulate_index[..., None] == 0, first[:, None], second[:, None])
    image = vectors.chunk(6, dim=-1)
    text = block.txt_mod(temb.chunk(2, dim=0)[0] if block.zero_cond_t else temb).chunk(6, dim=-1)
    update, text_update = block.attn(
        hidden_states=ops.norm(block.img_norm1, hidden_states, image[1], image[0]),
        encoder_hidden_states=ops.norm(block.txt_norm1, encoder_hidden_states, text[1], text[0]),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    modulation = image[4], image[3], image[5]
    hidden = ops.half(hidden_states, update, image[2], block.img_norm2, modulation, block.img_mlp)
    modulation = text[4], text[3], text[5]
    context = ops.half(encoder_hidden_states, text_update, text[2], block.txt_norm2, modulation, block.txt_mlp)
    return context, hidden


def sana(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    height: int = 0,
    width: int = 0,
) -> Any:
    """SanaTransformerBlock: the feed-forward is a convolution."""
    if (vectors := _table(block.scale_shift_table, timestep, hidden_states)) is None:
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
    update = block.attn1(ops.norm(block.norm1, hidden_states, scale, shift))
    hidden = ops.residual(hidden_states, update, gate)
    masked = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
    update = block.attn2(hidden, **masked)

    def convolve(inner: Tensor) -> Tensor:
        picture = inner.permute(0, 2, 1).reshape(inner.shape[0], inner.shape[2], height, width)
        written: Tensor = block.ff(picture).flatten(2, 3).permute(0, 2, 1)
        return written

    return ops.half(hidden, update, None, block.norm2, (scale_mlp, shift_mlp, gate_mlp), convolve)


def _sana_problem(block: Any) -> str | None:
    return None if getattr(block, "attn2", None) is not None else "no cross-attention"


def lumina2(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: Any,
    temb: Tensor | None = None,
) -> Any:
    """Lumina2TransformerBlock: a norm before and after each part, gates through tanh."""
    scale = gate = gate_mlp = None
    if block.modulation:
        inner, gate, scale, gate_mlp = block.norm1(hidden_states, temb)
        gate, gate_mlp = gate.tanh(), gate_mlp.tanh()
    else:
        inner = block.norm1(hidden_states)
    masked = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
    update = block.norm2(block.attn(hidden_states=inner, encoder_hidden_states=inner, **masked))
    hidden, inner = ops.step(hidden_states, update, gate, block.ffn_norm1, scale)
    return ops.residual(hidden, block.ffn_norm2(block.feed_forward(inner)), gate_mlp)


_HOME, _MODELS = "diffusers.models.attention", "diffusers.models.transformers"
_TWO = places(gated_residual=2, adaln_modulate=2)
_TWO_WITH_NORMS = places(gated_residual=2, adaln_modulate=2, norm_modulate=2)
_NORM2 = children("norm2", "norm2_context")
PATTERNS = {
    f"{_HOME}.BasicTransformerBlock": Pattern(basic, _basic_places, _basic_norms, _basic_problem),
    f"{_HOME}.JointTransformerBlock": Pattern(joint, _joint_places, _NORM2, _joint_problem),
    f"{_MODELS}.transformer_flux.FluxTransformerBlock": Pattern(flux, _TWO, _NORM2),
    f"{_MODELS}.transformer_flux.FluxSingleTransformerBlock": Pattern(
        flux_single, places(gated_residual=1, gelu=1), children("act_mlp"), single_problem
    ),
    f"{_MODELS}.transformer_flux2.Flux2TransformerBlock": Pattern(
        flux2, _TWO_WITH_NORMS, children("norm1", "norm1_context", "norm2", "norm2_context")
    ),
    f"{_MODELS}.transformer_flux2.Flux2SingleTransformerBlock": Pattern(
        flux2_single, places(gated_residual=1, norm_modulate=1), children("norm")
    ),
    f"{_MODELS}.transformer_qwenimage.QwenImageTransformerBlock": Pattern(
        qwen, _TWO_WITH_NORMS, children("img_norm1", "txt_norm1", "img_norm2", "txt_norm2")
    ),
    f"{_MODELS}.sana_transformer.SanaTransformerBlock": Pattern(
        sana, places(gated_residual=2, adaln_modulate=1, norm_modulate=1), children("norm1", "norm2"), _sana_problem
    ),
    f"{_MODELS}.transformer_lumina2.Lumina2TransformerBlock": Pattern(
        lumina2, places(gated_residual=1, adaln_modulate=1), children("ffn_norm1")
    ),
}
