"""Rows of some tokens of networks of diffusers, and the same densely: all tokens run, stale keys and values by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from tests.models.caching.keeping import Run, keep, reuse
from torch.overrides import TorchFunctionMode

from vivace.engine.tokens import Focus

if TYPE_CHECKING:
    from tests.models.pipelines.checks import Network

BEHIND = ("SD3Transformer2DModel", "HunyuanVideoTransformer3DModel")  # text tokens behind the image's in attentions


@dataclass
class Attentions(TorchFunctionMode):
    """Self-attentions of image tokens in the order they run. kept: what they read earlier; stale: bool [R, N] of tokens
    whose keys and values are those of `kept`; None: they are recorded."""

    tokens: int
    behind: bool
    stale: torch.Tensor | None = None
    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    at: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :]))[:3]
        length = query.shape[2]
        if length != key.shape[2] or length < self.tokens:
            return func(query, key, value, *args[3:], **kwargs)
        if self.stale is None:
            self.kept.append((key.clone(), value.clone()))
            return func(query, key, value, *args[3:], **kwargs)
        words = self.stale.new_zeros((len(query), length - self.tokens))
        stale = torch.cat((self.stale, words) if self.behind else (words, self.stale), dim=1)[:, None, :, None]
        old, self.at = self.kept[self.at], self.at + 1
        mixed = (torch.where(stale, before, now) for before, now in zip(old, (key, value), strict=True))
        return func(query, *mixed, *args[3:], **kwargs)


def densely(early: Network, late: Network, ids: torch.Tensor, module: Any = None) -> torch.Tensor:
    """What `late` says of the tokens `ids` [R, M] when others keep the keys and values they had in `early`."""
    behind, tokens = type(early.module).__name__ in BEHIND, count(early)
    with Attentions(tokens, behind) as recorded:
        early.run(module)
    stale = torch.ones((len(ids), tokens), dtype=torch.bool).scatter(1, ids.long(), False)
    with Attentions(tokens, behind, stale, recorded.kept) as mixing:
        answer = late.run(module)
    assert mixing.at == len(recorded.kept) > 0
    return answer


def count(network: Network) -> int:
    """Image tokens."""
    return int(by_token(network, network.answer).shape[1])


def by_token(network: Network, answer: torch.Tensor) -> torch.Tensor:
    """A prediction as [R, N, elements of a token]."""
    family, config = network.parts.family, network.module.config
    if family.layout == "tokens":
        return answer
    patch = family.patch(config)
    answer = answer.transpose(1, 2) if family.layout == "frames" else answer
    spatial = answer.shape[2:]
    split = [part for size, edge in zip(spatial, patch, strict=True) for part in (size // edge, edge)]
    apart = answer.reshape(*answer.shape[:2], *split)
    grid = range(2, 2 + len(split), 2)
    return apart.permute(0, *grid, 1, *(axis + 1 for axis in grid)).reshape(len(answer), prod(split[::2]), -1)


def active(network: Network, answer: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The active tokens of a prediction, [R, M, elements]."""
    whole = by_token(network, answer)
    return torch.stack([row[which.long()] for row, which in zip(whole, ids, strict=True)])


def twice(network: Network) -> Network:
    """The same call for two pictures that differ."""
    noise = torch.Generator().manual_seed(11)

    def doubled(name: str | None, value: Any) -> Any:
        shared = name in ("img_ids", "txt_ids", "img_shapes", "timestep_shape")
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != 1 or shared:
            return [*value, *value] if name == "img_shapes" else value
        other = value + 0.3 * torch.randn(value.shape, generator=noise) if value.dim() > 1 and _real(value) else value
        return torch.cat([value, other])

    args = tuple(doubled(None, value) for value in network.args)
    made = replace(network, args=args, kwargs={name: doubled(name, value) for name, value in network.kwargs.items()})
    return replace(made, answer=made.run().clone())


def _real(value: torch.Tensor) -> bool:
    return value.is_floating_point()


def picked(network: Network, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    """int32 [R, M], ascending: other tokens for every row."""
    tokens = count(network)
    order = torch.rand((len(network.answer), tokens), generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order[:, : max(1, round(share * tokens))].sort(dim=1).values.int()


def kv(network: Network) -> Run:
    """A request of a row with all tokens and one with some."""
    blocks = range(len(network.parts.blocks))
    return Run.of(network, *(tuple(rule((i, i + 1), "kv") for i in blocks) for rule in (keep, reuse)))


def sparsely(early: Network, late: Network, ids: torch.Tensor, module: Any = None) -> torch.Tensor:
    """What `late` says in a row of the tokens `ids`, after a row of `early` with all."""
    run = kv(early)
    assert torch.equal(run.row(0, module=module), early.run(module))
    answer = run.row(1, late, module, Focus(ids, count(early)))
    run.kept.release()
    return answer
