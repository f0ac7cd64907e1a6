"""How a foreign network's streams run through its blocks: what leaves a range of them, and what a later block reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vivace.engine.denoiser import BlockInfo
from vivace.errors import UnsupportedError
from vivace.models.pipelines.blocks import ModuleParts
from vivace.models.pipelines.families import Blocks, Half

HIDDEN, TEXT, SKIPS = 0, 1, 2  # parts of a cell; skips are numbered from 2 on
STEM = -1


class Skip(NamedTuple):
    """A tensor that a block far ahead reads again.

    producer, consumer: blocks, the producer `STEM` for what is there before the first; place: among what the producer
    writes, `HIDDEN_OUT` for its hidden states; taken: its place among what the consumer takes.
    """

    producer: int
    place: int
    consumer: int
    taken: int


HIDDEN_OUT = -1


class Exit(NamedTuple):
    """A tensor that leaves a range of blocks: part of the cell, block that writes it, place among that block's skips.

    place None: its hidden states for `HIDDEN`, its text for `TEXT`.
    """

    part: int
    block: int
    place: int | None = None


@dataclass(frozen=True)
class Wiring:
    """The streams of one network. lists: a number for each block that changes where hidden states take another form;
    skips: in the order of their parts; written: how many skips each block writes."""

    blocks: tuple[BlockInfo, ...]
    lists: tuple[int, ...]
    skips: tuple[Skip, ...] = ()
    written: tuple[int, ...] = ()

    @property
    def resized(self) -> bool:
        """Blocks change the shape of the feature map."""
        return any(info.kind != "transformer" for info in self.blocks)

    def writer(self, first: int, last: int) -> int | None:
        """The block of a range that writes the text which leaves it; None: no text leaves it that it changed."""
        if last == len(self.blocks):
            return None
        apart = self.lists[last - 1]  # in other lists before it the text has joined the hidden states
        writers = (block for block in range(first, last) if self.blocks[block].text and self.lists[block] == apart)
        return max(writers, default=None)

    def exits(self, first: int, last: int) -> tuple[Exit, ...]:
        """What leaves blocks [first, last), and with the first block what the stem wrote for later blocks."""
        found = [Exit(HIDDEN, last - 1)]
        if (writer := self.writer(first, last)) is not None:
            found.append(Exit(TEXT, writer))
        begin = STEM if first == 0 else first
        for number, skip in enumerate(self.skips):
            if begin <= skip.producer < last <= skip.consumer:
                found.append(Exit(SKIPS + number, skip.producer, skip.place))
        return tuple(found)

    def segments(self, first: int, last: int) -> tuple[tuple[int, int], ...]:
        """Blocks [first, last) in stretches whose hidden states keep their form, each ending where one leaves."""
        ends = {last} | {block for block in range(first + 1, last) if self.lists[block] != self.lists[block - 1]}
        ends |= {skip.producer + 1 for skip in self.skips if first <= skip.producer < last <= skip.consumer}
        places = [first, *sorted(ends)]
        return tuple(zip(places, places[1:], strict=False))


def wiring_of(parts: ModuleParts) -> Wiring:
    """The wiring of a network. Raises UnsupportedError for a UNet whose skips do not add up."""
    forms = [(entry.text is not None, entry.kind) for entry in parts.entries]  # text joins the image's tokens, or not
    lists = [0]
    for before, form in zip(forms, forms[1:], strict=False):
        lists.append(lists[-1] + (before != form))
    if any(entry.mirrored for entry in parts.entries):
        skips = tuple(Skip(i, HIDDEN_OUT, j, 0) for i, j in _mirrored(len(parts.blocks)))
        return Wiring(parts.blocks, tuple(lists), skips, (0,) * len(lists))
    if any(entry.kind == "up" for entry in parts.entries):
        return _unet(parts, tuple(lists))
    return Wiring(parts.blocks, tuple(lists), (), (0,) * len(lists))


def _mirrored(count: int) -> list[tuple[int, int]]:
    """(block, the block that reads its output again): the first with the last, up to one short of the middle."""
    return [(block, count - 1 - block) for block in range(count // 2 - 1)]


def _unet(parts: ModuleParts, lists: tuple[int, ...]) -> Wiring:
    """Skips of a UNet: the stem's, then those of each down block; up blocks take them from the end."""
    written, taken = [], []
    for info in parts.blocks:
        block = parts.module.get_submodule(info.name)
        down = len(block.resnets) + (getattr(block, "downsamplers", None) is not None)
        written.append(down if info.kind == "down" else 0)
        taken.append(len(block.resnets) if info.kind == "up" else 0)
    made = [(STEM, 0), *((block, place) for block, count in enumerate(written) for place in range(count))]
    if len(made) != sum(taken):
        raise UnsupportedError(
            f"{type(parts.module).__name__}: its down blocks write {len(made)} skips by their resnets and samplers, "
            f"its up blocks take {sum(taken)}; caches cannot tell which is which"
        )
    read = [(block, index) for block in reversed(range(len(taken))) for index in range(taken[block])]
    pairs = zip(made, read, strict=True)
    return Wiring(parts.blocks, lists, tuple(Skip(*one, *two) for one, two in pairs), tuple(written))


def half_of(entry: Blocks, site: str) -> Half | None:
    """The record of a site inside the blocks of a list."""
    return next((half for half in entry.inside if site in half.sites), None)
