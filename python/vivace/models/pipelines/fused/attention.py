"""Own attention processors: norm and rotation of queries and keys in one pass; the attention itself stays as it was.

`Attention.forward` of diffusers passes on the arguments that a processor's signature names, so each processor here has
the signature of the one it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivace.models.pipelines.fused.ops import class_of, norm_problem
from vivace.models.pipelines.fused.processor import (
    Processor,
    Table,
    added_stream,
    head_width,
    key_mask,
    own_stream,
    project_out,
    scaled_attention,
)


class Flux(Processor):
    """FluxAttnProcessor, Flux2AttnProcessor: [text, image] in one sequence, all of it rotated."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text, alone, table = encoder_hidden_states, encoder_hidden_states is None, image_rotary_emb
        known = alone == (attn.added_kv_proj_dim is None) and alone != hasattr(attn, "to_out")
        if attn.fused_projections or not known or not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, text, attention_mask, table)
        if text is None:
            return self.attend(*self.project(attn.head_dim, own_stream(attn, hidden_states, table)), attention_mask)
        tokens, early, late = text.shape[1], None, None
        if table is not None:
            halves = slice(tokens), slice(tokens, None)
            early, late = ((table[0][..., part, :], table[1][..., part, :]) for part in halves)
        streams = added_stream(attn, text, early), own_stream(attn, hidden_states, late)
        hidden = self.attend(*self.project(attn.head_dim, *streams), attention_mask)
        return project_out(attn, hidden[:, tokens:].contiguous()), attn.to_add_out(hidden[:, :tokens].contiguous())


class Flux2Parallel(Processor):
    """Flux2ParallelSelfAttnProcessor: one projection makes query, key, value and the feed-forward's input."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, attention_mask, image_rotary_emb)
        projected = attn.to_qkv_mlp_proj(hidden_states)
        wide, heads = 3 * attn.inner_dim, (-1, attn.head_dim)
        query, key, value = (part.unflatten(-1, heads) for part in projected[..., :wide].chunk(3, dim=-1))
        query, key = self.ops.heads(query, key, (attn.norm_q, attn.norm_k), image_rotary_emb)
        hidden = self.attend(query, key, value, attention_mask)
        return attn.to_out(torch.cat([hidden, attn.mlp_act_fn(projected[..., wide:])], dim=-1))


class Joint(Processor):
    """JointAttnProcessor2_0 (SD3): [image, text], normed, not rotated."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        text, tokens = encoder_hidden_states, hidden_states.shape[1]
        if not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, text, attention_mask, *args, **kwargs)
        streams = (
            (own_stream(attn, hidden_states),)
            if text is None
            else (own_stream(attn, hidden_states), added_stream(attn, text))
        )
        hidden = scaled_attention(self.project(head_width(attn), *streams))
        if text is None:
            return project_out(attn, hidden)
        written = hidden[:, tokens:] if attn.context_pre_only else attn.to_add_out(hidden[:, tokens:])
        return project_out(attn, hidden[:, :tokens]), written


class Qwen(Processor):
    """QwenDoubleStreamAttnProcessor2_0: [text, image], each rotated by its own complex table [N, K / 2]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text, mask = encoder_hidden_states, encoder_hidden_states_mask
        if text is None or attention_mask is not None or not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, text, mask, attention_mask, image_rotary_emb)
        if mask is not None:
            images = mask.new_ones((mask.shape[0], hidden_states.shape[1]), dtype=torch.bool)
            attention_mask = torch.cat([mask, images], dim=1)[:, None, None]
        late, early = (self._turning(table) for table in image_rotary_emb or (None, None))
        streams, tokens = (added_stream(attn, text, early), own_stream(attn, hidden_states, late)), text.shape[1]
        hidden = self.attend(*self.project(head_width(attn), *streams), attention_mask)
        return project_out(attn, hidden[:, tokens:].contiguous()), attn.to_add_out(hidden[:, :tokens].contiguous())

    def _turning(self, table: Tensor | None) -> Table | None:
        return None if table is None else self.tables.of(table, lambda: _complex(table))


def _complex(table: Tensor) -> Table:
    """A complex table [..., K / 2] as cosines and sines [..., K]."""
    return table.real.repeat_interleave(2, dim=-1), table.imag.repeat_interleave(2, dim=-1)


class Wan(Processor):
    """WanAttnProcessor: norm across heads; self-attention rotated, cross-attention not."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Any:
        context = encoder_hidden_states
        if attn.fused_projections or attn.add_k_proj is not None or not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, context, attention_mask, rotary_emb)
        source, table = hidden_states if context is None else context, None
        if rotary_emb is not None:
            cos, sin = rotary_emb  # [1 or B, N, 1, K]
            table = self.tables.of(cos, lambda: (_doubled(cos[:, :, 0], 0), _doubled(sin[:, :, 0], 1)))
        heads = (attn.heads, -1)
        query, key, value = (
            to(of).unflatten(2, heads)
            for to, of in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        query, key = self.ops.heads(query, key, (attn.norm_q, attn.norm_k), table)
        return project_out(attn, self.attend(query, key, value, attention_mask))


def _doubled(table: Tensor, first: int) -> Tensor:
    """Every second column from `first` on, twice."""
    return table[..., first::2].repeat_interleave(2, dim=-1)


class Ltx(Processor):
    """LTXVideoAttnProcessor: norm and rotation across all heads, a table [B, N, H K] per picture."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        context = encoder_hidden_states
        if not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, context, attention_mask, image_rotary_emb)
        source, heads = hidden_states if context is None else context, (attn.heads, -1)
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        wide = query[:, :, None], key[:, :, None]
        query, key = self.ops.heads(*wide, (attn.norm_q, attn.norm_k), image_rotary_emb)
        query, key, value = (part.flatten(2).unflatten(2, heads) for part in (query, key, value))
        return project_out(attn, self.attend(query, key, value, key_mask(attn, attention_mask, source)))


class Hunyuan(Processor):
    """HunyuanVideoAttnProcessor2_0: [image, text], the image rotated; text with projections of its own or without."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text, tokens = encoder_hidden_states, hidden_states.shape[1]
        if text is None or not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, text, attention_mask, image_rotary_emb)
        if attn.add_q_proj is None:
            streams = [own_stream(attn, torch.cat([hidden_states, text], dim=1), image_rotary_emb)]
        else:
            streams = [own_stream(attn, hidden_states, image_rotary_emb), added_stream(attn, text)]
        hidden = self.attend(*self.project(head_width(attn), *streams), attention_mask)
        image, text = hidden[:, :tokens], hidden[:, tokens:]
        if getattr(attn, "to_out", None) is not None:
            image = project_out(attn, image)
        return image, attn.to_add_out(text) if getattr(attn, "to_add_out", None) is not None else text


class CogVideoX(Processor):
    """CogVideoXAttnProcessor2_0: [text, image] by the same projections, the image rotated."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text = encoder_hidden_states
        if attn.is_cross_attention or not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, text, attention_mask, image_rotary_emb)
        hidden, tokens, heads = torch.cat([text, hidden_states], dim=1), text.shape[1], (attn.heads, -1)
        mask = key_mask(attn, attention_mask, hidden)
        query, key, value = (to(hidden).unflatten(2, heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        norms = attn.norm_q, attn.norm_k
        query, key = self.ops.heads(query, key, norms, image_rotary_emb, rotate_from=tokens)
        hidden = project_out(attn, scaled_attention((query, key, value), mask))
        return hidden[:, tokens:], hidden[:, :tokens]


class Lumina2(Processor):
    """Lumina2AttnProcessor2_0: fewer key heads than query heads, rotated by a complex table [B, N, K / 2]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        base_sequence_length: int | None = None,
    ) -> Any:
        context, table = encoder_hidden_states, image_rotary_emb
        if base_sequence_length is not None or not self.ops.ready(hidden_states):
            return self.plain(attn, hidden_states, context, attention_mask, table, base_sequence_length)
        if table is not None:
            table = self.tables.of(table, lambda: _complex(image_rotary_emb))
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        width = query.shape[-1] // attn.heads
        query, key, value = (part.unflatten(-1, (-1, width)) for part in (query, key, value))
        query, key = self.ops.heads(query, key, (attn.norm_q, attn.norm_k), table)
        repeats = attn.heads // key.shape[2]
        key, value = (part.repeat_interleave(repeats, dim=2) for part in (key, value))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        return project_out(attn, scaled_attention((query, key, value), mask, attn.scale))


class Plain(Processor):
    """AttnProcessor2_0 (DiT, PixArt, UNets): without the passes that divide by one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        context = encoder_hidden_states
        if args or kwargs or not self.fits(attn, hidden_states):
            return self.plain(attn, hidden_states, context, attention_mask, temb, *args, **kwargs)
        return self.single(attn, hidden_states, context, attention_mask)

    def fits(self, attn: Any, hidden: Tensor) -> bool:
        """The attention does no more than project, attend and project."""
        norms = attn.spatial_norm, attn.group_norm, attn.norm_cross
        unusual = any(norms) or attn.residual_connection or attn.rescale_output_factor != 1
        return not unusual and hidden.dim() == 3 and self.ops.ready(hidden)

    def single(
        self, attn: Any, hidden: Tensor, context: Tensor | None, mask: Tensor | None, rotation: Any = None
    ) -> Tensor:
        """Attention of one stream to itself or to `context`; keys of a context are not rotated."""
        source, heads = hidden if context is None else context, (attn.heads, -1)
        pairs = (attn.to_q, hidden), (attn.to_k, source), (attn.to_v, source)
        query, key, value = (to(of).unflatten(2, heads) for to, of in pairs)
        if attn.norm_q is not None or rotation is not None:
            norms, rotate_key = (attn.norm_q, attn.norm_k), not attn.is_cross_attention
            query, key = self.ops.heads(query, key, norms, rotation, rotate_key=rotate_key)
        return project_out(attn, scaled_attention((query, key, value), key_mask(attn, mask, source)))


class HunyuanDiT(Plain):
    """HunyuanAttnProcessor2_0: queries rotated, keys too unless they are of the text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if not self.fits(attn, hidden_states):
            rest = attention_mask, temb, image_rotary_emb
            return self.plain(attn, hidden_states, encoder_hidden_states, *rest)
        return self.single(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


_MODELS, _SHARED = "diffusers.models.transformers", "diffusers.models.attention_processor"
PLAIN = f"{_SHARED}.AttnProcessor2_0"
PROCESSORS: dict[str, type[Processor]] = {
    f"{_MODELS}.transformer_flux.FluxAttnProcessor": Flux,
    f"{_MODELS}.transformer_flux2.Flux2AttnProcessor": Flux,
    f"{_MODELS}.transformer_flux2.Flux2ParallelSelfAttnProcessor": Flux2Parallel,
    f"{_SHARED}.JointAttnProcessor2_0": Joint,
    f"{_MODELS}.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0": Qwen,
    f"{_MODELS}.transformer_wan.WanAttnProcessor": Wan,
    f"{_MODELS}.transformer_ltx.LTXVideoAttnProcessor": Ltx,
    f"{_MODELS}.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0": Hunyuan,
    f"{_SHARED}.CogVideoXAttnProcessor2_0": CogVideoX,
    f"{_MODELS}.transformer_lumina2.Lumina2AttnProcessor2_0": Lumina2,
    f"{_SHARED}.HunyuanAttnProcessor2_0": HunyuanDiT,
    PLAIN: Plain,
}
ABSORBED = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
UNROTATED = (
    *(f"{_SHARED}.{name}" for name in ("JointAttnProcessor2_0", "AttnProcessor2_0", "SanaLinearAttnProcessor2_0")),
    f"{_MODELS}.sana_transformer.SanaAttnProcessor2_0",
)


def bare(attn: Any) -> bool:
    """Queries and keys are neither normed nor rotated."""
    return class_of(attn.processor) in UNROTATED and getattr(attn, "norm_q", None) is None


def attention_problem(attn: Any, dtype: torch.dtype) -> str | None:
    """Why a processor of ours cannot stand for that of `attn`; None when it can."""
    if class_of(attn.processor) not in PROCESSORS:
        return f"attention processor {type(attn.processor).__name__}"
    if getattr(attn, "add_k_proj", None) is not None and getattr(attn, "add_q_proj", None) is None:
        return "keys of an image prompt"
    for names in (ABSORBED[:2], ABSORBED[2:]):
        norms: list[Any] = [getattr(attn, name, None) for name in names]
        if norms == [None, None]:
            continue
        problems = ["a norm of one of query and key" if n is None else norm_problem(n, dtype) for n in norms]
        if any(problems):
            return next(filter(None, problems))
        if class_of(norms[0]) != class_of(norms[1]) or norms[0].eps != norms[1].eps:
            return "different norms of query and key"
    return None
