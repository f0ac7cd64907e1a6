"""Own forwards of the blocks of video models, Wan, LTX, HunyuanVideo, CogVideoX, and of HunyuanDiT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivace.models.pipelines.fused.blocks import beside, single_problem, text_half
from vivace.models.pipelines.fused.ops import Ops, class_of
from vivace.models.pipelines.fused.pattern import Pattern, children, places


def wan(
    ops: Ops, block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Any:
    """WanTransformerBlock; temb [B, 6, D], or [B, N, 6, D] with a time per token. Modulation stays float32."""
    table = block.scale_shift_table
    vectors = (table + temb.float()).unbind(1) if temb.dim() == 3 else (table[None] + temb.float()).unbind(2)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
    update = block.attn1(ops.norm(block.norm1, hidden_states, scale, shift), None, None, rotary_emb)
    if _normless(block):
        inner = hidden = ops.residual(hidden_states, update, gate)
    else:
        hidden, inner = ops.step(hidden_states, update, gate, block.norm2)
    update = block.attn2(inner, encoder_hidden_states, None, None)
    return ops.half(hidden, update, None, block.norm3, (scale_mlp, shift_mlp, gate_mlp), block.ffn)


def _normless(block: Any) -> bool:
    """No norm before the cross-attention."""
    return class_of(block.norm2) == "torch.nn.modules.linear.Identity"


def _wan_norms(block: Any) -> tuple[str, ...]:
    return ("norm1", "norm3") if _normless(block) else ("norm1", "norm2", "norm3")


def _wan_places(block: Any) -> dict[str, int]:
    plain = int(_normless(block))
    return {"norm_modulate": 1, "gated_residual": 1 + plain, "adaln_modulate": 2 - plain}


def ltx(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Tensor | None = None,
) -> Any:
    """LTXVideoTransformerBlock; temb [B, N or 1, 6 D]."""
    table = block.scale_shift_table
    if table.dtype is not hidden_states.dtype or not ops.ready(temb):
        return NotImplemented
    vectors = (table[None, None] + temb.reshape(*temb.shape[:2], table.shape[0], -1)).unbind(2)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
    update = block.attn1(
        hidden_states=ops.norm(block.norm1, hidden_states, scale, shift),
        encoder_hidden_states=None,
        image_rotary_emb=image_rotary_emb,
    )
    hidden = ops.residual(hidden_states, update, gate)
    masked = {"image_rotary_emb": None, "attention_mask": encoder_attention_mask}
    update = block.attn2(hidden, encoder_hidden_states=encoder_hidden_states, **masked)
    return ops.half(hidden, update, None, block.norm2, (scale_mlp, shift_mlp, gate_mlp), block.ff)


def hunyuan(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """HunyuanVideoTransformerBlock: two streams, one attention."""
    if not ops.ready(encoder_hidden_states):
        return NotImplemented
    inner, gate, shift, scale, gate_mlp = block.norm1(hidden_states, emb=temb)
    text, *rest = block.norm1_context(encoder_hidden_states, emb=temb)
    update, text_update = block.attn(
        hidden_states=inner,
        encoder_hidden_states=text,
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    hidden = ops.half(hidden_states, update, gate, block.norm2, (scale, shift, gate_mlp), block.ff)
    return hidden, text_half(ops, block, encoder_hidden_states, text_update, rest)


def hunyuan_single(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """HunyuanVideoSingleTransformerBlock: one stream [image, text], attention beside the feed-forward."""
    tokens = hidden_states.shape[1]
    hidden = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    inner, gate = block.norm(hidden, emb=temb)
    updates = block.attn(
        hidden_states=inner[:, :tokens],
        encoder_hidden_states=inner[:, tokens:],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    hidden = beside(ops, block, hidden, inner, torch.cat(updates, dim=1), gate)
    return hidden[:, :tokens], hidden[:, tokens:]


def cogvideox(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """CogVideoXBlock: one module modulates both streams, the feed-forward takes them together."""
    tokens = encoder_hidden_states.shape[1]
    inner, text, gate, text_gate = block.norm1(hidden_states, encoder_hidden_states, temb)
    updates = block.attn1(
        hidden_states=inner,
        encoder_hidden_states=text,
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    hidden = ops.residual(hidden_states, updates[0], gate)
    context = ops.residual(encoder_hidden_states, updates[1], text_gate)
    inner, text, gate, text_gate = block.norm2(hidden, context, temb)
    update = block.ff(torch.cat([text, inner], dim=1))
    hidden = ops.residual(hidden, update[:, tokens:], gate)
    return hidden, ops.residual(context, update[:, :tokens], text_gate)


def hunyuan_refiner(
    ops: Ops, block: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None
) -> Any:
    """HunyuanVideoIndividualTokenRefinerBlock: text tokens alone."""
    inner = block.norm1(hidden_states)
    update = block.attn(hidden_states=inner, encoder_hidden_states=None, attention_mask=attention_mask)
    gate, gate_mlp = block.norm_out(temb)
    return ops.half(hidden_states, update, gate, block.norm2, (None, None, gate_mlp), block.ff)


def hunyuan_dit(
    ops: Ops,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    skip: Tensor | None = None,
) -> Any:
    """HunyuanDiTBlock: the second half of the blocks reads what the first half wrote."""
    if block.skip_linear is not None and skip is not None:
        hidden_states = block.skip_linear(block.skip_norm(torch.cat([hidden_states, skip], dim=-1)))
    rotation = {"image_rotary_emb": image_rotary_emb}
    update = block.attn1(block.norm1(hidden_states, temb), **rotation)
    hidden, inner = ops.step(hidden_states, update, None, block.norm2)
    update = block.attn2(inner, encoder_hidden_states=encoder_hidden_states, **rotation)
    return ops.half(hidden, update, None, block.norm3, (None, None, None), block.ff)


_MODELS = "diffusers.models.transformers"
_VIDEO = f"{_MODELS}.transformer_hunyuan_video"
PATTERNS = {
    f"{_MODELS}.transformer_wan.WanTransformerBlock": Pattern(wan, _wan_places, _wan_norms),
    f"{_MODELS}.transformer_ltx.LTXVideoTransformerBlock": Pattern(
        ltx, places(norm_modulate=1, gated_residual=2, adaln_modulate=1), children("norm1", "norm2")
    ),
    f"{_VIDEO}.HunyuanVideoTransformerBlock": Pattern(
        hunyuan, places(gated_residual=2, adaln_modulate=2), children("norm2", "norm2_context")
    ),
    f"{_VIDEO}.HunyuanVideoSingleTransformerBlock": Pattern(
        hunyuan_single, places(gated_residual=1, gelu=1), children("act_mlp"), single_problem
    ),
    f"{_VIDEO}.HunyuanVideoIndividualTokenRefinerBlock": Pattern(
        hunyuan_refiner, places(gated_residual=1, adaln_modulate=1), children("norm2")
    ),
    f"{_MODELS}.hunyuan_transformer_2d.HunyuanDiTBlock": Pattern(
        hunyuan_dit, places(gated_residual=1, adaln_modulate=2), children("norm2", "norm3")
    ),
    f"{_MODELS}.cogvideox_transformer_3d.CogVideoXBlock": Pattern(cogvideox, places(gated_residual=4)),
}
