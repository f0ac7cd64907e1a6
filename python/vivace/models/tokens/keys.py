"""Keys and values of all image tokens in the self-attentions of foreign blocks: kept by rows with all tokens, read by
rows that compute some, whose own are written into what is kept first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vivace.errors import UnsupportedError
from vivace.kernels.scatter_tokens import scatter_tokens
from vivace.models.pipelines.records import Tokens
from vivace.models.pipelines.views import view
from vivace.models.tokens.active import Active

STORES = (None, "fp32", "bf16", "fp16")  # an attention reads keys as they lie


class Places(Protocol):
    """Where one block's keys and values of the rows of a forward are kept."""

    def lanes(self, part: int, shape: tuple[int, ...] | None, like: Tensor) -> tuple[Any, tuple[int, ...] | Tensor]:
        """The slab, and the lane of every row, perhaps as `index` gives it; shape None: of whatever was kept."""
        ...

    def index(self, lanes: Any, device: torch.device) -> Tensor:
        """Lanes as a tensor."""
        ...


def attending(
    names: Iterable[str], memory: Places, tokens: Tokens, active: Active | None
) -> dict[str, Callable[[Any], Any]]:
    """Stand-ins of the self-attentions of a block, by path, that keep keys and values; with `active` they read them.

    Part k of the memory is the k-th attention: [text + N, width of the key heads + width of the value heads].
    """
    return {path: partial(stand_in, path, Keys(memory, k, tokens, active)) for k, path in enumerate(names)}


def listening(path: str, memory: Places, tokens: Tokens, count: Callable[[], int]) -> dict[str, Callable[[Any], Any]]:
    """A stand-in of a self-attention that keeps what its image tokens, `count` when it runs, receive."""
    return {path: partial(stand_in, path, Received(memory, tokens, count))}


def stand_in(path: str, keys: Keys | Received, attention: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        heads = getattr(getattr(attention, "to_k", None), "out_features", None)
        with Product(keys, heads) as product:
            result = attention(*args, **kwargs)
        if product.count != 1:
            processor = type(getattr(attention, "processor", attention)).__name__
            raise UnsupportedError(
                f"{path}: {processor} ran scaled_dot_product_attention of torch {product.count} times; rows of some "
                "tokens need it once. Use the default processor and the attention backend 'native'"
            )
        return result

    return view(attention, __call__=run)


class Keys:
    """Keys and values of one attention in the rows of a forward. active: None in a row with all tokens."""

    def __init__(self, memory: Places, part: int, tokens: Tokens, active: Active | None) -> None:
        self.memory, self.part, self.tokens, self.active = memory, part, tokens, active

    def attend(self, product: Callable[..., Tensor], width: int | None, *args: Any, **kwargs: Any) -> Tensor:
        """The attention of query [R, H, L, K] over keys and values; width: of all key heads, None: as many as H."""
        query, key, value, options = named(*args, **kwargs)
        heads = query.shape[1] if width is None else width // key.shape[-1]
        repeats = key.shape[1] // heads
        fresh = [each[:, ::repeats].transpose(1, 2).flatten(2) for each in (key, value)]
        if self.active is None:
            self._keep(*fresh)
            return product(query, key, value, **options)
        options["attn_mask"] = self._mask(options["attn_mask"], key.shape[2])
        kept = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in self._join(*fresh)]
        if repeats > 1:
            kept = [each.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for each in kept]
        return product(query, *(each.to(query.dtype) for each in kept), **options)

    def _keep(self, key: Tensor, value: Tensor) -> None:
        """All keys and values [R, text + N, W] into what is kept."""
        wide = key.shape[2]
        slab, lanes = self.memory.lanes(self.part, (key.shape[1], wide + value.shape[2]), key)
        first = _run(lanes)
        at: Any = self.memory.index(lanes, key.device) if first is None else slice(first, first + len(lanes))
        slab.values[at, 0, :, :wide] = key.to(slab.dtype)
        slab.values[at, 0, :, wide:] = value.to(slab.dtype)

    def _join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of active tokens and of text into what is kept; all of it, [R, text + N, W] each."""
        assert self.active is not None, "a row of some tokens"
        wide, text = key.shape[2], key.shape[1] - self.active.count
        slab, lanes = self.memory.lanes(self.part, None, key)
        if slab.shape[0] != text + self.active.tokens:
            raise UnsupportedError(
                f"keys of {slab.shape[0]} tokens were kept, the row has {text} tokens of text and "
                f"{self.active.tokens} of the image; a prompt must keep its length within a run"
            )
        kept, first, rows = slab.values[:, 0], _run(lanes), None
        if first is None:
            rows = self.memory.index(lanes, key.device)
        else:
            kept = kept[first : first + len(lanes)]
        scatter_tokens(kept, self.active.ids(text, self.tokens.behind), key, second=value, lanes=rows)
        kept = kept if rows is None else kept.index_select(0, rows)
        return kept[..., :wide], kept[..., wide:]

    def _mask(self, mask: Tensor | None, length: int) -> Tensor | None:
        """A mask of keys for all of them; one that was made for active tokens hides no image token."""
        if mask is None:
            return None
        assert self.active is not None, "a row of some tokens"
        text = length - self.active.count
        full = text + self.active.tokens
        if mask.shape[-1] not in (length, full) or (mask.dim() > 1 and mask.shape[-2] != 1):
            raise UnsupportedError(
                f"an attention mask {tuple(mask.shape)}: rows of some tokens take masks of keys alone, for {full}"
            )
        if mask.shape[-1] == full:
            return mask
        image = mask.new_ones if mask.dtype is torch.bool else mask.new_zeros
        shown, behind = image((*mask.shape[:-1], self.active.tokens)), self.tokens.behind
        words = mask[..., self.active.count :] if behind else mask[..., :text]
        return torch.cat((shown, words) if behind else (words, shown), dim=-1)


class Received:
    """What attention the image tokens of a row with all of them receive: r_t = mean_h sum_q softmax_t(scale q . k_t).

    q: image tokens; the softmax is over text too. Each row of the forward by itself, in float32: [H, N, text + N].
    """

    active: Active | None = None

    def __init__(self, memory: Places, tokens: Tokens, count: Callable[[], int]) -> None:
        self.memory, self.tokens, self.count = memory, tokens, count

    def attend(self, product: Callable[..., Tensor], width: int | None, *args: Any, **kwargs: Any) -> Tensor:
        """The attention as it is; what tokens receive is kept."""
        query, key, value, options = named(*args, **kwargs)
        count, length = self.count(), key.shape[2]
        image = slice(0, count) if self.tokens.behind else slice(length - count, length)
        scale = options.get("scale") or query.shape[-1] ** -0.5
        mask = options["attn_mask"]
        shown = None if mask is None else mask.expand(len(query), *mask.shape[1:])
        found = []
        for row, (one, other) in enumerate(zip(query.float(), key.float(), strict=True)):
            scores = one[:, image] @ other.transpose(1, 2) * scale
            if shown is not None:
                hidden = shown[row] if shown.shape[-2] == 1 else shown[row][..., image, :]
                scores = scores.masked_fill(~hidden, -torch.inf) if hidden.dtype is torch.bool else scores + hidden
            found.append(torch.softmax(scores, dim=2)[..., image].sum(dim=1).mean(dim=0))
        slab, lanes = self.memory.lanes(0, (count,), found[0])
        for lane, received in zip(lanes, found, strict=True):
            slab.values[lane, 0].copy_(received)
        return product(query, key, value, **options)


class Product(TorchFunctionMode):
    """While an attention runs: its product goes through `keys`, and tables with a row for each picture are indexed as
    the network indexes the table it made for all."""

    def __init__(self, keys: Keys | Received, width: int | None) -> None:
        super().__init__()
        self.keys, self.width, self.count = keys, width, 0
        self.tables = {id(table) for table in keys.active.tables} if keys.active is not None else set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.count += 1
            return self.keys.attend(func, self.width, *args, **(kwargs or {}))
        if self.tables and args and id(args[0]) in self.tables:
            if func is Tensor.__getitem__ and isinstance(args[1], tuple) and args[1][0] is None:
                return func(args[0], (slice(None), *args[1][1:]))  # [1, ...] for all becomes [R, ...]
            if func is Tensor.unsqueeze and not kwargs:
                return func(args[0], args[1] + 1)
        return func(*args, **(kwargs or {}))


def named(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The arguments of `scaled_dot_product_attention` however they were passed."""
    named = dict(zip(("dropout_p", "is_causal"), rest, strict=False))
    return query, key, value, {"attn_mask": attn_mask, **named, **options}


def _run(lanes: tuple[int, ...] | Tensor) -> int | None:
    """The first of lanes that lie side by side; None for others, and for those that are data."""
    if isinstance(lanes, Tensor):
        return None
    return lanes[0] if lanes == tuple(range(lanes[0], lanes[0] + len(lanes))) else None
