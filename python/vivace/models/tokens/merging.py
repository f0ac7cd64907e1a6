"""Tokens merged in networks of diffusers: stand-ins around the attentions and MLPs of one forward's blocks.

A map is made of what a block reads, in rows of branch "cond"; all rows of the picture use it. Text tokens stay as they
are, and a merged token has the position of the one it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.engine.denoiser import BlockCall
from vivace.engine.merging import Merging
from vivace.errors import ShapeError, UnsupportedError
from vivace.models.caching.inside import Wrap, children_of
from vivace.models.pipelines.blocks import ModuleParts
from vivace.models.pipelines.families import arguments_of
from vivace.models.pipelines.records import Child, plain
from vivace.models.pipelines.views import view
from vivace.models.tokens.maps import Maps
from vivace.models.tokens.merge import Merged

LAYERS = "attentions.*.transformer_blocks.*"  # of a block of a UNet
ROTARY = "image_rotary_emb"


class Merger:
    """What one forward merges. rows: a branch and the position of a sample each; module arguments come by `see`."""

    def __init__(self, parts: ModuleParts, merging: Merging, rows: Sequence[tuple[str, int]]) -> None:
        assert merging.row is not None, "a row that merges nothing has no merger"
        self.parts, self.row, self.rows = parts, merging.row, tuple(rows)
        self._maps = Maps(merging, rows)
        self._levels = merging_blocks(parts, self.row.levels)
        self._arguments: Mapping[str, Any] = {}
        self._now: dict[str, Any] = {}  # of the UNet layer at work: its grid, its map

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The arguments of the network's forward, which tell the grid of its tokens."""
        self._arguments = {**dict(zip(arguments_of(type(plain(self.parts.module))), args, strict=False)), **kwargs}

    def wraps(self, call: BlockCall) -> dict[str, Wrap]:
        """Stand-ins of the modules of a block that merge, by path; none where it does not."""
        block = call.info.index
        said, entry = self.row.of(block), self.parts.entries[block]
        if said is None or block not in self._levels:
            return {}
        module = self.parts.module.get_submodule(call.info.name)
        places = [(site, path) for site, path in entry.merged if site in self.row.sites]
        found = [(site, path) for site, names in places for path, _ in children_of(module, (Child(names),))]
        if entry.kind == "transformer":
            tokens = int(call.hidden.shape[1])
            maps = self._maps.of(block, 0, call.hidden, self._grid(tokens), *said)
            return {} if maps is None else {path: _viewed(self._around, lambda: maps) for _, path in found}
        wraps: dict[str, Wrap] = {path: _viewed(self._around, lambda: self._now["maps"]) for _, path in found}
        for path, _ in children_of(module, (Child(LAYERS.rpartition(".transformer_blocks")[0]),)):
            wraps[path] = _viewed(self._sized)
        for layer, (path, _) in enumerate(children_of(module, (Child(LAYERS),))):
            wraps[path] = _viewed(self._mapped, block, layer, said)
        return wraps

    # --- the layers of a UNet's block --------------------------------------------------------------------------------
    def _sized(self, child: Any, *args: Any, **kwargs: Any) -> Any:
        """A transformer of a UNet, whose first argument is a feature map."""
        height, width = _first(args, kwargs).shape[-2:]
        self._now = {"grid": (int(height), int(width))}
        return child(*args, **kwargs)

    def _mapped(self, block: int, layer: int, said: tuple[float, bool], child: Any, *args: Any, **kwargs: Any) -> Any:
        self._now["maps"] = self._maps.of(block, layer, _first(args, kwargs), self._now["grid"], *said)
        return child(*args, **kwargs)

    # --- an attention or an MLP --------------------------------------------------------------------------------------
    def _around(self, maps_of: Callable[[], Merged | None], child: Any, *args: Any, **kwargs: Any) -> Any:
        """unmerge(child(merge(x))) of the image tokens of its first argument, behind those of text if it has any."""
        maps = maps_of()
        if maps is None:
            return child(*args, **kwargs)
        hidden = _first(args, kwargs)
        lead = int(hidden.shape[1]) - maps.tokens
        if kwargs.get("attention_mask") is not None or lead < 0:
            raise UnsupportedError(
                f"{type(plain(child)).__name__}: masked, or of other tokens than its block reads; it cannot merge them"
            )
        merged = _behind(hidden, lead, maps.merge)
        if kwargs.get(ROTARY) is None:
            result = _called(child, merged, args, kwargs)
        else:
            result = self._rotated(maps, child, merged, args, kwargs)
        if isinstance(result, tuple):
            return (_behind(result[0], lead, maps.unmerge), *result[1:])
        return _behind(result, lead, maps.unmerge)

    def _rotated(self, maps: Merged, child: Any, merged: Tensor, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The attention where positions are rotations [S, K], one table for all rows: pictures one after the other."""
        table, results = kwargs[ROTARY], {}
        pictures: dict[int, list[int]] = {}
        for row, (_, position) in enumerate(self.rows):
            pictures.setdefault(position, []).append(row)
        for mine in pictures.values():
            origin, rows = maps.origin[mine[0]], torch.tensor(mine, device=merged.device)
            lead = len(table[0]) - maps.tokens
            places = torch.cat((torch.arange(lead, device=origin.device), origin + lead))
            turned = tuple(part.index_select(0, places) for part in table)
            own = {name: _some(value, rows, len(self.rows)) for name, value in kwargs.items() if name != ROTARY}
            given = _called(child, merged[rows], args, {**own, ROTARY: turned})
            results |= dict(zip(mine, _rows_of(given), strict=True))
        ordered = [results[row] for row in range(len(self.rows))]
        stacked = tuple(torch.stack(parts) for parts in zip(*ordered, strict=True))
        return stacked if len(stacked) > 1 else stacked[0]

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Height and width of the image's tokens."""
        known = self._maps.grids
        if tokens not in known:
            found = _grid_of(self.parts, self._arguments)
            if found[0] * found[1] != tokens:
                raise ShapeError(f"merge: a block reads {tokens} tokens, the latent has {found[0]} x {found[1]}")
            known[tokens] = found
        return known[tokens]


def merging_blocks(parts: ModuleParts, levels: int = 1) -> frozenset[int]:
    """Blocks that can merge: with self-attentions of a known place; of a UNet at its `levels` highest resolutions."""
    height, heights = 0, {}
    for info, entry in zip(parts.blocks, parts.entries, strict=True):
        module = parts.module.get_submodule(info.name)
        if any(children_of(module, (Child(path),)) for _, path in entry.merged):
            heights[info.index] = height
        height += info.kind == "down" and getattr(module, "downsamplers", None) is not None
        height -= info.kind == "up" and getattr(module, "upsamplers", None) is not None
    highest = sorted(set(heights.values()))[:levels]
    return frozenset(index for index, level in heights.items() if level in highest)


def why_not_merged(parts: ModuleParts, site: str, blocks: tuple[int, int]) -> str | None:
    """Why tokens cannot be merged before "attn" or "mlp" in these blocks; None when they can."""
    name, there = type(plain(parts.module)).__name__, merging_blocks(parts, len(parts.blocks))
    if not there:
        return f"where {name} attends, and in which order its tokens lie, is not recorded for merging"
    for block in there & set(range(*blocks)):
        if all(known != site for known, _ in parts.entries[block].merged):
            return f"block {block} of {name} has its {site} in one projection with others; merge before 'attn' alone"
    return None


def joined(outer: Mapping[str, Wrap], inner: Mapping[str, Wrap]) -> dict[str, Wrap]:
    """Stand-ins of both by path; where both have one, `outer` goes around `inner`."""
    made = {**inner, **outer}
    return made | {path: _both(outer[path], inner[path]) for path in outer.keys() & inner.keys()}


def _both(outer: Wrap, inner: Wrap) -> Wrap:
    return lambda module: outer(inner(module))


def _viewed(turn: Callable[..., Any], *bound: Any) -> Wrap:
    """A stand-in of a module whose calls are turn(*bound, module, ...)."""
    return lambda module: view(module, __call__=partial(turn, *bound, module))


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tokens a module is handed: its first argument."""
    made: Tensor = args[0] if args else kwargs["hidden_states"]
    return made


def _called(child: Any, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A module with other tokens in the first place."""
    return child(hidden, *args[1:], **kwargs) if args else child(**{**kwargs, "hidden_states": hidden})


def _behind(x: Tensor, lead: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x [R, lead + N, D] with its last N tokens changed."""
    return change(x) if not lead else torch.cat((x[:, :lead], change(x[:, lead:].contiguous())), dim=1)


def _some(value: Any, rows: Tensor, count: int) -> Any:
    """An argument for some rows: tensors that have a row each, and others as they are."""
    return value[rows] if isinstance(value, Tensor) and value.dim() > 1 and len(value) == count else value


def _rows_of(result: Any) -> list[tuple[Tensor, ...]]:
    """What a module returned, row by row."""
    parts = result if isinstance(result, tuple) else (result,)
    return list(zip(*parts, strict=True))


def _grid_of(parts: ModuleParts, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in tokens, from a latent [B, C, H, W] or the positions of packed tokens [N, 3]."""
    ids = arguments.get("img_ids")
    if ids is not None:
        height, width = (int(edge) + 1 for edge in ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(dim=0))
        return height, width
    height, width = (
        size // edge
        for size, edge in zip(
            arguments["hidden_states"].shape[-2:], parts.family.patch(plain(parts.module).config), strict=True
        )
    )
    return height, width
