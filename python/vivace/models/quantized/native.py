"""The native DiT under the precision rules of a row: what every compiled form of it is compared with.

Hidden states between the blocks are float32 (of a wider model: its own). Half a block, attention or MLP, runs in the
model's own way where nothing is said, else in its precision: activations are bfloat16 in an int8, fp8 or bf16 half, and
float32 in an fp32 half; products with 8-bit weights read the float32 norm directly, and what joins the hidden states
(bias, gate, residual) is float32 arithmetic. Linears that the weights do not hold run in the dtype of the half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vivace.engine.precision import BlockPrecision
from vivace.kernels.gated_residual import gated_residual
from vivace.models.dit import NORM_EPS, Block, DiT, Held, Modulation
from vivace.models.dit_config import DiTConfig
from vivace.models.dit_files import layout
from vivace.models.quantized.layers import FLOATS, CastLinear, QuantizedLinear
from vivace.models.quantized.weights import QuantizedLayer, QuantizedWeights
from vivace.models.rowwise import gelu
from vivace.models.tokens.merge import Merged

HALVES = (("qkv", "out"), ("up", "down"))  # linears of the attention and of the MLP
ACTIVATIONS = {"tanh": "gelu_tanh", "none": "gelu"}  # `approximate` of a GELU -> name in the kernels


def layer_names(blocks: int) -> tuple[str, ...]:
    """Names of all linears in the blocks of a native DiT, in order."""
    return tuple(f"blocks.{i}.{name}" for i in range(blocks) for half in HALVES for name in half)


def as_native(weights: QuantizedWeights, config: DiTConfig) -> QuantizedWeights | None:
    """Weights by the names of diffusers as those of the native layers; None where these cannot hold them.

    Query, key and value are one layer there: all three are quantized, with the same factors and activation scales.
    """
    found: dict[str, dict[int, QuantizedLayer]] = {}
    for name, place in layout(config).items():
        layer = weights.layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            found.setdefault(place.parameter.removesuffix(".weight"), {})[place.third or 0] = layer
    layers = {}
    for name, parts in found.items():
        one = parts.get(0)
        if one is None or (name.endswith(".qkv") and len(parts) < 3):
            return None
        if any(part.weight.shape != one.weight.shape or not one.reads_as(part) for part in parts.values()):
            return None
        both = {part: torch.cat([parts[i].tensors[part] for i in sorted(parts)]) for part in ("weight", "weight_scale")}
        layers[name] = one if len(parts) == 1 else replace(one, **both)
    return replace(weights, layers=layers, kept={}) if len(found) else None


class PreciseDiT(DiT):
    """A DiT whose blocks run in precisions of their own. It shares everything with the model it stands for."""

    precise: list[PreciseBlock]

    @classmethod
    def standing_for(
        cls, model: DiT, precisions: Sequence[BlockPrecision], layers: Mapping[str, QuantizedLayer]
    ) -> PreciseDiT:
        """The stand-in of a model.

        precisions: of each block; layers: quantized ones by name, those that are missing run in the dtype of the half.
        """
        made = object.__new__(cls)
        made.__dict__.update(model.__dict__)
        made.__dict__["precise"] = [
            PreciseBlock(f"blocks.{i}", block, own_precisions(pair, model.dtype), layers)
            for i, (block, pair) in enumerate(zip(model.layers(), precisions, strict=True))
        ]
        return made

    def embed(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """As `DiT.embed`, float32 where the model is narrower."""
        return super().embed(x, ids).to(torch.promote_types(self.dtype, torch.float32))

    def block(self, i: int, hidden: Tensor, modulation: Modulation) -> Tensor:
        """Block i on hidden states [R, N, D], in its precisions."""
        return self.precise[i](hidden, modulation.of_block(i))

    def fresh(
        self,
        i: int,
        half: int,
        hidden: Tensor,
        modulation: Modulation,
        held: Held | None = None,
        merged: Merged | None = None,
    ) -> Tensor:
        """As `DiT.fresh`: float32 of a half in a precision of its own."""
        return self.precise[i].fresh(half, hidden, *modulation.of_half(i, half)[:2], held, merged)

    def joined(self, i: int, half: int, hidden: Tensor, modulation: Modulation, fresh: Tensor) -> Tensor:
        """hidden + gate * fresh, to the bits of `block`."""
        return self.precise[i].joined(half, hidden, modulation.of_half(i, half)[2], fresh)

    def head(
        self,
        hidden: Tensor,
        modulation: Modulation,
        size: tuple[int, int] | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """As `DiT.head`, in the model's dtype."""
        return super().head(hidden.to(self.dtype), modulation, size, ids)


def own_precisions(pair: BlockPrecision, dtype: torch.dtype) -> BlockPrecision:
    """The same with None for what the model computes in anyway."""
    attn, mlp = (None if FLOATS.get(name or "") == dtype else name for name in pair)
    return attn, mlp


class PreciseBlock:
    """One block: both halves in precisions of their own, None the model's."""

    def __init__(
        self, name: str, block: Block, precisions: BlockPrecision, layers: Mapping[str, QuantizedLayer]
    ) -> None:
        self.block, self.precisions = block, precisions
        self.linears: dict[str, CastLinear | QuantizedLinear] = {}
        for half, precision in zip(HALVES, precisions, strict=True):
            for part in half if precision is not None else ():
                linear = getattr(block, part)
                layer = None if precision in FLOATS else layers.get(f"{name}.{part}")
                cast = FLOATS.get(precision or "", torch.bfloat16)
                self.linears[part] = (
                    CastLinear(linear, cast) if layer is None else QuantizedLinear(f"{name}.{part}", layer, linear.bias)
                )

    def __call__(self, hidden: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Hidden states [R, N, D], by the six vectors [R, 1, D] of the model's modulation."""
        for half, precision in enumerate(self.precisions):
            shift, scale, gate = modulation[3 * half : 3 * half + 3]
            if precision is None:
                hidden = self.joined(half, hidden, gate, self.fresh(half, hidden, shift, scale))
            else:
                hidden = self._added(half, hidden, shift, scale, gate.float()).to(hidden.dtype)
        return hidden

    def fresh(
        self,
        half: int,
        hidden: Tensor,
        shift: Tensor,
        scale: Tensor,
        held: Held | None = None,
        merged: Merged | None = None,
    ) -> Tensor:
        """What a half gives before its gate."""
        if self.precisions[half] is not None:
            made = self._added(half, hidden, shift, scale, None, held, merged)
            return made if merged is None else merged.unmerge(made)
        own = hidden.to(shift.dtype), shift, scale
        return self.block.mlp(*own, merged) if half else self.block.attention(*own, held, merged)

    def joined(self, half: int, hidden: Tensor, gate: Tensor, fresh: Tensor) -> Tensor:
        """hidden + gate * fresh as the half itself does it."""
        if self.precisions[half] is None:
            return torch.addcmul(hidden.to(gate.dtype), gate, fresh).to(hidden.dtype)
        wide, own = hidden.float(), gate.float()
        if isinstance(self.linears[HALVES[half][1]], QuantizedLinear):
            return gated_residual(wide, fresh, own).to(hidden.dtype)
        return torch.addcmul(wide, own, fresh).to(hidden.dtype)

    def _added(
        self,
        half: int,
        hidden: Tensor,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor | None,
        held: Held | None = None,
        merged: Merged | None = None,
    ) -> Tensor:
        """A half in its precision, float32: hidden + gate * what it gives, or without a gate that alone."""
        dtype = FLOATS.get(self.precisions[half] or "", torch.bfloat16)
        own = hidden.float(), shift.float(), scale.float(), dtype
        x = self._mlp(*own, merged) if half else self._attention(*own, held, merged)
        return self._joined(HALVES[half][1], x, gate, hidden.float())

    def _attention(
        self,
        hidden: Tensor,
        shift: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        held: Held | None = None,
        merged: Merged | None = None,
    ) -> Tensor:
        """Heads side by side, as the last linear takes them."""
        x = _normed(hidden, shift, scale, NORM_EPS)
        x = x if merged is None else merged.merge(x)
        rows, tokens, width = x.shape
        qkv = self._product("qkv", x, dtype).view(rows, tokens, 3, self.block.heads, width // self.block.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if held is not None:
            key, value = held(query, key, value)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(rows, tokens, width)

    def _mlp(
        self, hidden: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype, merged: Merged | None = None
    ) -> Tensor:
        """The inside of the MLP, as its last linear takes it."""
        x = _normed(hidden, shift, scale, self.block.mlp_eps)
        x = x if merged is None else merged.merge(x)
        up, approximate = self.linears["up"], self.block.approximate
        if isinstance(up, QuantizedLinear):
            made: Tensor = up(x, activation=ACTIVATIONS[approximate], out_dtype=dtype)
            return made
        return gelu(up(x, dtype), approximate)

    def _product(self, part: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x W^T + bias in `dtype`."""
        made: Tensor = self.linears[part](x, out_dtype=dtype)
        return made

    def _joined(self, part: str, x: Tensor, gate: Tensor | None, hidden: Tensor) -> Tensor:
        """hidden + gate * (x W^T + bias), float32; without a gate x W^T + bias alone."""
        linear = self.linears[part]
        if gate is None:
            fresh: Tensor = linear(x, out_dtype=torch.float32)
            return fresh
        if isinstance(linear, QuantizedLinear):
            joined: Tensor = linear(x, gate=gate, residual=hidden, out_dtype=torch.float32)
            return joined
        return torch.addcmul(hidden, gate, linear(x, torch.float32))


def _normed(hidden: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """layer norm(hidden) scale + shift; `scale` is 1 + scale, as the model's modulation has it."""
    return torch.addcmul(shift, F.layer_norm(hidden, hidden.shape[-1:], eps=eps), scale)
