"""Rows of some image tokens in a traced forward: token ids, keys and values are inputs and outputs of its graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vivace.models.caching.inside import Wrap
from vivace.models.pipelines.records import Tokens
from vivace.models.tokens import keys
from vivace.models.tokens.active import Active


class TracedActive(Active):
    """The active tokens of a forward whose rows each have ids of their own, int64 [R, M], of `tokens` image tokens."""

    def __init__(self, ids: Tensor, tokens: int) -> None:
        self.tokens, self.count, self._ids = tokens, ids.shape[1], ids
        self.same, self.tables = False, []
        self.row = torch.arange(ids.shape[0], device=ids.device)[:, None]
        self._places, self._made = {}, {}
        self._sides: dict[int, bool] = {}

    def _both(self, text: int, behind: bool) -> tuple[Tensor, Tensor]:
        key = int(text), behind
        if key not in self._places:
            made = self._ids
            if key[0]:
                words = torch.arange(key[0], device=made.device).expand(made.shape[0], -1)
                made = torch.cat((made, words + self.tokens) if behind else (words, made + key[0]), dim=1)
            self._places[key] = made, made
        return self._places[key]

    def gather(self, full: Tensor, behind: bool, what: str = "hidden states") -> Tensor:
        """[R, text + M, ...] of full [R, text + N, ...]."""
        at = self.places(self.text_of(full.shape[1], what), behind)
        return full.expand(at.shape[0], *full.shape[1:])[self.row, at]

    def scatter(self, fresh: Tensor, behind: bool) -> Tensor:
        """[R, text + N, ...] of fresh [R, text + M, ...], zeros where no token is active."""
        text = int(fresh.shape[1] - self.count)
        return self.put(fresh.new_zeros((fresh.shape[0], text + self.tokens, *fresh.shape[2:])), fresh, behind)

    def put(self, full: Tensor, fresh: Tensor, behind: bool) -> Tensor:
        """A copy of full [R, text + N, ...] with fresh [R, text + M, ...] in its places."""
        at = self.places(self.text_of(full.shape[1], "what is kept"), behind)
        return full.index_put((self.row.expand(at.shape[0], at.shape[1]), at), fresh)


class Whole(Protocol):
    """Memory of keys and values of all tokens."""

    def whole(self, part: int, like: Tensor) -> Tensor:
        """What is kept, [R, T, W]."""
        ...

    def replace(self, part: int, plane: Tensor) -> None:
        """What is kept from now on."""
        ...


class TracedKeys(keys.Keys):
    """Keys and values of one attention. active: None in a row with all tokens, which keeps them."""

    memory: Any
    active: TracedActive | None

    def _keep(self, key: Tensor, value: Tensor) -> None:
        self.memory.replace(self.part, torch.cat((key, value), dim=2))

    def _join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self.active is not None, "a row of some tokens"
        wide, kept = key.shape[2], self.memory.whole(self.part, key)
        fresh = torch.cat((key, value), dim=2).to(kept.dtype)
        made = self.active.put(kept, fresh, self.tokens.behind)
        self.memory.replace(self.part, made)
        return made[..., :wide], made[..., wide:]


class TracedReceived(keys.Received):
    """What attention the image tokens of a row receive, of all rows at once."""

    memory: Any

    def attend(self, product: Callable[..., Tensor], width: int | None, *args: Any, **kwargs: Any) -> Tensor:
        """The attention as it is; r_t = mean_h sum_q softmax_t(scale q . k_t) [R, N] is kept, in float32."""
        query, key, value, options = keys.named(*args, **kwargs)
        count, length = self.count(), key.shape[2]
        image = slice(0, count) if self.tokens.behind else slice(length - count, length)
        scale = options.get("scale") or query.shape[-1] ** -0.5
        scores = query[:, :, image].float() @ key.float().transpose(-2, -1) * scale
        mask = options["attn_mask"]
        if mask is not None:
            shown = mask if mask.shape[-2] == 1 else mask[..., image, :]
            scores = scores.masked_fill(~shown, -torch.inf) if shown.dtype is torch.bool else scores + shown
        received = torch.softmax(scores, dim=-1)[..., image].sum(dim=2).mean(dim=1)
        self.memory.replace(0, received)
        return product(query, key, value, **options)


def attending(names: list[str], memory: Whole, tokens: Tokens, active: TracedActive | None) -> dict[str, Wrap]:
    """Stand-ins of the self-attentions of a block, by path, that keep keys and values; with `active` they read them."""
    return {
        path: partial(keys.stand_in, path, TracedKeys(memory, part, tokens, active))  # type: ignore[arg-type]
        for part, path in enumerate(names)
    }


def listening(path: str, memory: Whole, tokens: Tokens, count: Callable[[], int]) -> dict[str, Wrap]:
    """A stand-in of a self-attention that keeps what its image tokens receive."""
    return {path: partial(keys.stand_in, path, TracedReceived(memory, tokens, count))}  # type: ignore[arg-type]
