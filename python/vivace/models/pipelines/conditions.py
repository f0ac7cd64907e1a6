"""Recorded arguments of a network: one row of a batch taken out, and rows of several samples put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from vivace.errors import PromptError

# Arguments with these words in their name keep their dtype: positions, angles, counts, sizes.
EXACT = ("rotary", "ids", "guidance", "mask", "size", "timestep")


@dataclass(frozen=True, slots=True)
class Row:
    """One row [1, ...] of a tensor that has the batch as its first axis."""

    value: Tensor


_NOTHING: Any = Row(torch.empty(0))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of one row. tree: `Row`s where the batch goes, other values as they are; signature: rows with equal
    signatures may share a forward: they differ in the contents of `Row`s only."""

    tree: dict[str, Any]
    signature: tuple[Any, ...]

    def same(self, other: Inputs, name: str) -> bool:
        """Argument `name` is bit for bit the same in both."""
        mine, theirs = (_sign(name, inputs.tree.get(name), contents=True) for inputs in (self, other))
        return bool(mine == theirs)


@dataclass(frozen=True, slots=True)
class Condition:
    """What a prompt is to a network: the arguments of each guidance branch, "cond" and perhaps "uncond"."""

    branches: Mapping[str, Inputs]

    def branch(self, name: str) -> Inputs:
        """The arguments of a branch. Raises: PromptError for a branch that the prompt does not have."""
        name = "cond" if name == "perturbed" else name  # which is computed otherwise
        if name not in self.branches:
            raise PromptError(
                f"prompt: the plan evaluates branch {name!r}, the prompt has {', '.join(self.branches)} only; give "
                "negative_prompt_embeds too (a bare network: {'cond': {...}, 'uncond': {...}}), or use a plan without "
                "guidance"
            )
        return self.branches[name]


def inputs_of(
    arguments: Mapping[str, Any],
    row: int,
    rows: int,
    device: torch.device | None,
    cast: tuple[torch.dtype, torch.dtype] | None,
) -> Inputs:
    """Row `row` of arguments recorded with a batch of `rows`: tensors whose first axis is `rows` long are per row.

    Args:
        device: where tensors go; None leaves them. cast: (from, to) for floating tensors but those named in `EXACT`.
    """

    def take(name: str, value: Tensor) -> Any:
        value = value if device is None else value.to(device)
        if cast is not None and value.dtype == cast[0] and not any(word in name for word in EXACT):
            value = value.to(cast[1])
        return Row(value[row : row + 1]) if value.dim() and len(value) == rows else value

    return signed({name: _map(name, value, take) for name, value in arguments.items()})


def signed(tree: dict[str, Any]) -> Inputs:
    """A tree of arguments with its signature."""
    return Inputs(tree, tuple(_sign(name, value) for name, value in sorted(tree.items())))


def parts(rows: Sequence[Inputs]) -> dict[str, tuple[Tensor, ...]]:
    """What goes into a batch of rows with one signature: by path in the tree, the `Row` values of all rows in order."""
    found = [dict(_rows_in(row.tree, "")) for row in rows]
    return {path: tuple(row[path] for row in found) for path in found[0]}


def fill(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a batch: the tree with tensors[path] in place of each `Row`."""
    filled: dict[str, Any] = _filled(tree, "", tensors)
    return filled


def hollow(row: Inputs) -> dict[str, Any]:
    """The tree of a row for `fill`, without what the row holds."""
    return fill(row.tree, {path: _NOTHING for path, _ in _rows_in(row.tree, "")})


def merge(rows: Sequence[Inputs]) -> dict[str, Any]:
    """Arguments of a batch from rows with one signature."""
    return fill(rows[0].tree, {path: torch.cat(values) for path, values in parts(rows).items()})


def _map(name: str, value: Any, take: Callable[[str, Tensor], Any]) -> Any:
    """`value` with each tensor in it replaced by take(name, tensor)."""
    if isinstance(value, Tensor):
        return take(name, value)
    if isinstance(value, Mapping):
        return {key: _map(str(key), item, take) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(name, item, take) for item in value)
    return value


def _rows_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Values of the `Row`s in an argument, by path."""
    if isinstance(value, Row):
        yield path, value.value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _rows_in(item, f"{path}/{key}")


def _filled(value: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """`value` with the tensor of its path in place of each `Row`."""
    if isinstance(value, Row):
        return tensors[path]
    if isinstance(value, Mapping):
        return {key: _filled(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(item, f"{path}/{i}", tensors) for i, item in enumerate(value))
    return value


def _sign(name: str, value: Any, contents: bool = False) -> Any:
    """What of an argument must be equal for rows to share a forward: all but the contents of a `Row`."""
    if isinstance(value, Row):
        tensor = value.value
        exact = _digest(tensor) if contents else ""
        length = int(tensor.count_nonzero()) if "mask" in name else 0  # how many tokens count may decide shapes
        return name, tuple(tensor.shape), str(tensor.dtype), length, exact
    if isinstance(value, Tensor):
        return name, tuple(value.shape), str(value.dtype), _digest(value)
    if isinstance(value, Mapping):
        return name, tuple(_sign(str(key), item, contents) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return name, tuple(_sign(name, item, contents) for item in value)
    return name, value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
