"""Ranges of the free dimensions of a pack's graphs, for builders that want to know them beforehand.

A bucket is a size of latents; rows and the lengths of texts have ranges of their own. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vivace.errors import ArgumentError
from vivace.runtime.manifest import Port

Range = tuple[int, int, int]  # least, usual, most
ROWS: Range = (1, 2, 8)
LENGTH: Range = (1, 77, 512)
SOURCES: Range = (1, 4, 16)  # slots that a row reads
OUTS: Range = (1, 2, 8)  # and writes


@dataclass(frozen=True, slots=True)
class Profile:
    """name: of the bucket; dims: range of every free dimension by its name; sizes: of the input "size", height and
    width of latents."""

    name: str
    dims: Mapping[str, Range]
    sizes: Sequence[tuple[int, int]] = field(default=())

    def shapes(self, port: Port) -> tuple[tuple[int, ...], ...]:
        """A port's least, usual and most shape. KeyError for a dimension without a range."""
        return tuple(
            tuple(size if isinstance(size, int) else self.dims[size][i] for size in port.shape) for i in range(3)
        )

    def values(self, port: Port) -> tuple[tuple[int, ...], ...] | None:
        """Least, usual and most numbers of an input that shapes follow from; None for one of tensors."""
        if port.source != "size":
            return None
        low, usual, high = (self.sizes[i] for i in (0, len(self.sizes) // 2, -1))
        return low, usual, high

    def to_dict(self, ports: Sequence[Port]) -> dict[str, Any]:
        """For a builder: of every input its three shapes, or three values."""
        told = {}
        for port in ports:
            values = self.values(port)
            shapes = self.shapes(port)
            if values is not None:
                told[port.name] = {"values": [list(value) for value in values]}
            elif any(isinstance(size, str) for size in port.shape):
                told[port.name] = {"shapes": [list(shape) for shape in shapes]}
        return {"name": self.name, "inputs": told}


def profiles_of(
    model: Mapping[str, Any],
    actives: Sequence[int],
    *,
    sizes: Sequence[tuple[int, int]] = (),
    rows: Range = ROWS,
    length: Range = LENGTH,
    ranges: Mapping[str, Range] | None = None,
) -> tuple[Profile, ...]:
    """One profile a size of latents.

    Args:
        model: of the manifest; actives: how many tokens the plan's token rows compute, at the model's own size.
        sizes: height and width of latents, none: the model's own alone.
        rows, length: least, usual and most rows of a batch (pictures times branches) and tokens of a text; ranges: of
            other free dimensions, by name.
    Raises: ArgumentError for a range that is none, and sizes that the patch does not divide.
    """
    own = (int(model["latent_shape"][-2]), int(model["latent_shape"][-1]))
    patch = [int(size) for size in model["patch"]][-2:]
    for name, value in (("rows", rows), ("length", length), *(ranges or {}).items()):
        if len(value) != 3 or not 1 <= value[0] <= value[1] <= value[2]:
            raise ArgumentError(f"export tensorrt: {name} {value}; need 1 <= least <= usual <= most")
    found = []
    for height, width in sizes or [own]:
        if height < 1 or width < 1 or height % patch[0] or width % patch[1]:
            raise ArgumentError(f"export tensorrt: latents of {height}x{width}; the patch is {patch[0]}x{patch[1]}")
        tokens = height // patch[0] * (width // patch[1])
        share = tokens / max(1, own[0] // patch[0] * (own[1] // patch[1]))
        counts = sorted(math.ceil(count * share) for count in actives) or [tokens]
        dims: dict[str, Range] = {name: _at(value) for name, value in (("height", height), ("width", width))}
        dims |= {"tokens": _at(tokens), "rows": rows, "length": length}
        dims["active"] = (counts[0], counts[len(counts) // 2], counts[-1])
        dims |= _of_step(rows, math.prod(model["latent_shape"][:-2]) * height * width) | dict(ranges or {})
        found.append(Profile(f"{height}x{width}", dims, ((height, width),)))
    return tuple(found)


def _of_step(rows: Range, elements: int) -> dict[str, Range]:
    """Of the step graph: its coefficients and fields have every axis as its slots have it, or 1."""
    found: dict[str, Range] = {"sources": SOURCES, "outs": OUTS, "elements": _at(elements)}
    found |= {"coefficient_rows": (1, 1, rows[2]), "field_rows": (1, 1, rows[2]), "field_sources": (1, 1, SOURCES[2])}
    return found | {"field_elements": (1, 1, elements)}


def _at(size: int) -> Range:
    return size, size, size


def shape_problems(ports: Sequence[Port], profile: Profile) -> list[tuple[str, str]]:
    """(dimension, what is wrong) of the free dimensions of inputs."""
    names = dict.fromkeys(size for port in ports for size in port.shape if isinstance(size, str))
    found = []
    for name in names:
        if name not in profile.dims:
            found.append((name, f"profile {profile.name} has no range for it"))
        elif not 1 <= profile.dims[name][0] <= profile.dims[name][1] <= profile.dims[name][2]:
            found.append((name, f"profile {profile.name} has the range {profile.dims[name]}"))
    return found
