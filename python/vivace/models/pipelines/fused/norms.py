"""Norms, norms with modulation, and activations: own forwards of foreign submodules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vivace.models.pipelines.fused.ops import DTYPES, Ops, norm_problem
from vivace.models.pipelines.fused.pattern import Pattern, children, places

LINEAR = "torch.nn.modules.linear.Linear"


def plain_norm(ops: Ops, norm: Any, hidden: Tensor) -> Any:
    """norm(hidden)."""
    if hidden.dtype not in DTYPES or norm_problem(norm, hidden.dtype) is not None:
        return NotImplemented
    return ops.norm(norm, hidden)


def _modulation(norm: Any, emb: Tensor, like: Tensor, parts: int) -> Any:
    """The conditioning as `parts` vectors [B, D]; None when they have another dtype than the hidden states."""
    emb = norm.linear(norm.silu(emb))
    return None if emb.dtype is not like.dtype else emb.chunk(parts, dim=1)


def ada_zero(
    ops: Ops,
    norm: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> Any:
    """AdaLayerNormZero: the modulated norm, then gate, shift, scale and gate for the rest of the block."""
    if norm.emb is not None:
        emb = norm.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    vectors = _modulation(norm, emb, x, 6) if emb is not None else None
    if vectors is None:
        return NotImplemented
    shift, scale, *rest = vectors
    return ops.norm(norm.norm, x, scale, shift), *rest


def ada_zero_twice(ops: Ops, norm: Any, hidden_states: Tensor, emb: Tensor) -> Any:
    """SD35AdaLayerNormZeroX: the norm modulated for two attentions."""
    if (vectors := _modulation(norm, emb, hidden_states, 9)) is None:
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = vectors
    first, second = (ops.norm(norm.norm, hidden_states, *pair) for pair in ((scale, shift), (scale2, shift2)))
    return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


def ada_single(ops: Ops, norm: Any, x: Tensor, emb: Tensor) -> Any:
    """AdaLayerNormZeroSingle: the modulated norm and a gate."""
    if (vectors := _modulation(norm, emb, x, 3)) is None:
        return NotImplemented
    shift, scale, gate = vectors
    return ops.norm(norm.norm, x, scale, shift), gate


def ada_shift(ops: Ops, norm: Any, x: Tensor, emb: Tensor) -> Any:
    """AdaLayerNormShift (HunyuanDiT): the shifted norm."""
    shift = norm.linear(norm.silu(emb.float()).to(emb.dtype))
    return NotImplemented if shift.dtype is not x.dtype else ops.norm(norm.norm, x, None, shift)


def ada_continuous(ops: Ops, norm: Any, x: Tensor, conditioning_embedding: Tensor) -> Any:
    """AdaLayerNormContinuous: the modulated norm."""
    emb = norm.linear(norm.silu(conditioning_embedding).to(x.dtype))
    if emb.dtype is not x.dtype or emb.dim() != 2:
        return NotImplemented
    scale, shift = emb.chunk(2, dim=1)
    return ops.norm(norm.norm, x, scale, shift)


def ada_two_streams(ops: Ops, norm: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Any:
    """CogVideoXLayerNormZero: one norm, each stream with its own modulation."""
    if (vectors := _modulation(norm, temb, hidden_states, 6)) is None:
        return NotImplemented
    shift, scale, gate, text_shift, text_scale, text_gate = vectors
    hidden = ops.norm(norm.norm, hidden_states, scale, shift)
    text = ops.norm(norm.norm, encoder_hidden_states, text_scale, text_shift)
    return hidden, text, gate[:, None], text_gate[:, None]


def ada_rms(ops: Ops, norm: Any, x: Tensor, emb: Tensor) -> Any:
    """LuminaRMSNormZero: the scaled norm, then gate, scale and gate for the rest of the block."""
    if (vectors := _modulation(norm, emb, x, 4)) is None:
        return NotImplemented
    scale, *rest = vectors
    return ops.norm(norm.norm, x, scale), *rest


def ada_scale(ops: Ops, norm: Any, x: Tensor, conditioning_embedding: Tensor) -> Any:
    """LuminaLayerNormContinuous: the scaled norm and a projection."""
    scale = norm.linear_1(norm.silu(conditioning_embedding).to(x.dtype))
    if scale.dtype is not x.dtype or scale.dim() != 2:
        return NotImplemented
    hidden = ops.norm(norm.norm, x, scale)
    return hidden if norm.linear_2 is None else norm.linear_2(hidden)


def ada_table(ops: Ops, norm: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Any:
    """SanaModulatedNorm: the norm modulated by a table plus the conditioning."""
    vectors = scale_shift_table[None] + temb[:, None]
    if vectors.dtype is not hidden_states.dtype:
        return NotImplemented
    shift, scale = vectors.unbind(1)
    return ops.norm(norm.norm, hidden_states, scale, shift)


def activation(ops: Ops, module: Any, hidden_states: Tensor) -> Any:
    """torch.nn.GELU."""
    return ops.gelu(hidden_states, approximate=module.approximate)


def projected(ops: Ops, module: Any, hidden_states: Tensor) -> Any:
    """GELU of diffusers: a projection and its activation, in the memory of the projection."""
    return ops.gelu(module.proj(hidden_states), approximate=module.approximate, inside=fresh(module.proj))


def gated(ops: Ops, module: Any, hidden_states: Tensor) -> Any:
    """GEGLU of diffusers: value * GELU(gate) of one projection."""
    return ops.gelu(module.proj(hidden_states), gated=True)


def fresh(linear: Any) -> bool:
    """What the module returns is new memory that nobody else sees: a plain Linear that no hook watches."""
    return f"{type(linear).__module__}.{type(linear).__name__}" == LINEAR and not linear._forward_hooks


_NORMS, _ACTIVATIONS = "diffusers.models.normalization", "diffusers.models.activations"
_ONCE = places(norm_modulate=1)
PATTERNS = {
    "torch.nn.modules.normalization.LayerNorm": Pattern(plain_norm, _ONCE, mixed=True),
    "torch.nn.modules.normalization.RMSNorm": Pattern(plain_norm, _ONCE, mixed=True),
    f"{_NORMS}.FP32LayerNorm": Pattern(plain_norm, _ONCE, mixed=True),
    f"{_NORMS}.RMSNorm": Pattern(plain_norm, _ONCE, mixed=True),
    f"{_NORMS}.AdaLayerNormZero": Pattern(ada_zero, _ONCE, children("norm")),
    f"{_NORMS}.SD35AdaLayerNormZeroX": Pattern(ada_zero_twice, places(norm_modulate=2), children("norm")),
    f"{_NORMS}.AdaLayerNormZeroSingle": Pattern(ada_single, _ONCE, children("norm")),
    f"{_NORMS}.AdaLayerNormContinuous": Pattern(ada_continuous, _ONCE, children("norm")),
    f"{_NORMS}.CogVideoXLayerNormZero": Pattern(ada_two_streams, places(norm_modulate=2), children("norm")),
    f"{_NORMS}.LuminaRMSNormZero": Pattern(ada_rms, _ONCE, children("norm")),
    f"{_NORMS}.LuminaLayerNormContinuous": Pattern(ada_scale, _ONCE, children("norm")),
    "diffusers.models.transformers.hunyuan_transformer_2d.AdaLayerNormShift": Pattern(
        ada_shift, _ONCE, children("norm")
    ),
    "diffusers.models.transformers.sana_transformer.SanaModulatedNorm": Pattern(ada_table, _ONCE, children("norm")),
    "torch.nn.modules.activation.GELU": Pattern(activation, places(gelu=1)),
    f"{_ACTIVATIONS}.GELU": Pattern(projected, places(gelu=1)),
    f"{_ACTIVATIONS}.GEGLU": Pattern(gated, places(gelu=1)),
}
UNKNOWN = {f"{_ACTIVATIONS}.ApproximateGELU": "x * sigmoid(1.702 x) is not among our ops"}
