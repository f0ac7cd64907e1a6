"""Self-attention whose map is the identity: what perturbed-attention guidance is guided away from.

Attention of map I gives its values: no query, key or softmax is looked at, the output projection is as ever. Inside of
`IdentityAttention` torch's attention does that; nothing of a network is changed, and other threads see nothing of it.
Source: Ahn et al. 2024 (Perturbed-Attention Guidance), section 4.1.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vivace.errors import UnsupportedError

if TYPE_CHECKING:
    from vivace.engine.denoiser import BlockCall, BlockOut
    from vivace.models.caching.foreign import Cached
    from vivace.models.dit import DiT


class IdentityAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` returns its values; `count`: how often it did."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        query, value = named["query"], named["value"]
        if query.shape[-2] != value.shape[-2]:
            raise UnsupportedError(
                f"perturbed attention: {query.shape[-2]} queries and {value.shape[-2]} values; the identity maps "
                "each query to its own value, so leave such blocks out"
            )
        self.count += 1
        heads = query.shape[-3] // value.shape[-3]
        return value if heads == 1 else value.repeat_interleave(heads, dim=-3)  # grouped keys and values


@torch.no_grad()
def perturbed_dit(model: DiT, x: Tensor, t: Tensor, labels: Tensor, blocks: Collection[int]) -> tuple[Tensor, ...]:
    """`DiT.forward` with the identity in the attention of `blocks`; arguments and result as there."""
    modulation = model.condition(t, labels)
    hidden = model.embed(x).repeat(modulation.branches, 1, 1)
    for i in range(len(model.blocks)):
        with IdentityAttention() if i in blocks else nullcontext():
            hidden = model.block(i, hidden, modulation)
    return model.head(hidden, modulation, (x.shape[2], x.shape[3]))


def perturbed_network(cached: Cached, blocks: Collection[int]) -> Any:
    """A forward of a foreign network with the identity in the self-attention of `blocks`."""
    from vivace.models.caching.inside import children_of, inside
    from vivace.models.pipelines.views import view

    def attended(path: str, child: Any, *args: Any, **kwargs: Any) -> Any:
        with IdentityAttention() as mode:
            result = child(*args, **kwargs)
        if not mode.count:
            raise UnsupportedError(f"perturbed attention: {path} does not call torch's attention; its map is not known")
        return result

    def intercept(call: BlockCall) -> BlockOut:
        if call.info.index not in blocks:
            return call.compute()
        half = self_attention(cached, call.info.index)
        assert half is not None, "checked with the plan"

        def stand_in(block: Any) -> Any:
            def wrap(path: str) -> Any:
                return lambda child: view(child, __call__=partial(attended, path, child))

            return inside({path: wrap(path) for path, _ in children_of(block, half.children)}, block)

        return call.compute(inside=stand_in)

    return partial(cached.parts.forward, intercept)


def self_attention(cached: Cached, block: int) -> Any:
    """The record of a block's self-attention of image tokens alone; None where it has none."""
    from vivace.models.caching.wiring import half_of

    half = half_of(cached.parts.entries[block], "attn")
    alone = half is not None and half.sites == ("attn",) and all(child.streams == 1 for child in half.children)
    return half if alone and not cached.parts.blocks[block].joint else None


def why_not(cached: Cached, blocks: Collection[int]) -> str | None:
    """Why the attention maps of these blocks cannot be replaced; None when they can."""
    for block in blocks:
        if not 0 <= block < len(cached.parts.blocks) or self_attention(cached, block) is None:
            name = cached.parts.blocks[block].name if 0 <= block < len(cached.parts.blocks) else str(block)
            return f"block {name} has no attention among image tokens alone, whose map could be the identity"
    return None
