"""Rows of some image tokens in networks of diffusers: hidden states hold active tokens alone from block to block.

They are gathered before the first block and put back behind the last one; where a network takes its hidden states apart
in between (Lumina 2), behind that list of blocks too. Whatever goes by token, rotary tables above all, follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from vivace.engine.denoiser import BlockCall, BlockOut
from vivace.errors import UnsupportedError
from vivace.models.pipelines.blocks import ModuleParts
from vivace.models.pipelines.families import plain
from vivace.models.tokens.active import Active


class Compact:
    """The blocks of one forward with the tokens of `active`."""

    def __init__(self, parts: ModuleParts, active: Active) -> None:
        if (reason := why_whole(parts)) is not None:
            raise UnsupportedError(reason)
        self.entries, self.active = parts.entries, active

    def entered(self, call: BlockCall) -> BlockCall:
        """A block's turn as it reads active tokens."""
        block = call.info.index
        record = self.entries[block].tokens
        assert record is not None, "whoever runs some tokens has a record of it"
        options = self.active.options(record, call.options)
        first = block == 0 or self._closed(block - 1)
        hidden = self.active.gather(call.hidden, record.behind) if first else call.hidden
        compute = partial(call.compute, hidden=hidden, options=options)
        return replace(call, hidden=hidden, compute=compute, options={**call.options, **options})

    def left(self, call: BlockCall, out: BlockOut) -> BlockOut:
        """What a block wrote, with all tokens where the network needs them."""
        block = call.info.index
        record = self.entries[block].tokens
        last = block == len(self.entries) - 1 or self._closed(block)
        if not last or record is None:
            return out
        return BlockOut(self.active.scatter(out.hidden, record.behind), out.context, out.skips)

    def _closed(self, block: int) -> bool:
        """Hidden states leave a block with all tokens although others follow."""
        record = self.entries[block].tokens
        return record is not None and record.closed and self.entries[block + 1] is not self.entries[block]


def why_whole(parts: ModuleParts) -> str | None:
    """Why no row of a network can compute some image tokens only; None when it can."""
    name, whole = type(parts.module).__name__, parts.family.whole
    if whole:
        return f"{name} computes all image tokens in every row: {whole}"
    for info, entry in zip(parts.blocks, parts.entries, strict=True):
        block = plain(parts.module.get_submodule(info.name))
        kind = type(block).__name__
        if entry.tokens is None:
            return f"the record of {name} does not say how {entry.path} run on some tokens: Blocks(tokens=Tokens(...))"
        if kind in entry.tokens.unfit:
            return f"block {info.index} ({info.name}, {kind}) reads places of tokens, so it computes all of them"
    return None


def check_inputs(kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for arguments of a network that rows of some tokens cannot follow."""
    for name, value in kwargs.items():
        if value is not None and "controlnet" in name:
            raise UnsupportedError(
                f"{name}: it is added to all image tokens between blocks; rows of some cannot run it"
            )
        if value is not None and name == "skip_layers":
            raise UnsupportedError(f"{name}: a further branch, of which a plan with rows of some tokens knows nothing")
