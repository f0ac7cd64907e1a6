"""The modules inside a block that give its sites: stand-ins that keep what they return, or return what was kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from vivace.errors import UnsupportedError
from vivace.models.pipelines.blocks import rebound
from vivace.models.pipelines.families import Child, Half, arguments_of, plain
from vivace.models.pipelines.fused.build import Piece
from vivace.models.pipelines.views import fork, view


class Memory(Protocol):
    """Where one cell's parts of the rows of a forward are kept."""

    def keep(self, part: int, fresh: Tensor, base: Tensor | None = None, text: bool = False) -> None:
        """Keep `fresh` [R, ...], or fresh - base. text: it is a stream of text alone."""
        ...

    def give(
        self,
        part: int,
        like: Tensor,
        shape: tuple[int, ...] | None = None,
        hidden: Tensor | None = None,
        text: bool = False,
    ) -> Any:
        """What was kept, [R, *shape] in the dtype of `like`, plus `hidden`. shape None: whatever was kept."""
        ...


Wrap = Callable[[Any], Any]  # a module -> its stand-in


def children_of(block: Any, children: tuple[Child, ...]) -> list[tuple[str, Child]]:
    """(path, record) of the modules of a record that a block has, in order."""
    return [(path, child) for child in children for path in _paths(plain(block), child.path.split("."))]


def _paths(module: Any, names: list[str]) -> list[str]:
    """Paths in `module` that fit names, of which "*" fits all."""
    head, *rest = names
    table = getattr(module, "_modules", {})
    found = [name for name in (table if head == "*" else (head,)) if table.get(name) is not None]
    return [
        ".".join((name, *filter(None, (path,))))
        for name in found
        for path in (_paths(table[name], rest) if rest else [""])
    ]


def keeping(block: Any, half: Half, memory: Memory) -> dict[str, Wrap]:
    """Stand-ins of a site's children, by path, that keep what they return."""
    found = children_of(block, half.children)
    return {path: partial(_viewed, _kept, memory, 2 * k, record, path) for k, (path, record) in enumerate(found)}


def giving(block: Any, half: Half, memory: Memory) -> dict[str, Wrap]:
    """Stand-ins of a site's children, by path, that return what was kept; idle ones return next to nothing."""
    found = children_of(block, half.children)
    idle = children_of(block, half.idle)
    wraps: dict[str, Wrap] = {path: partial(_viewed, _idle, record.streams) for path, record in idle}
    for k, (path, record) in enumerate(found):
        wraps[path] = partial(_viewed, _given, memory, 2 * k, record)
    return wraps


def watching(block: Any, half: Half, watch: Callable[[Tensor], None]) -> dict[str, Wrap]:
    """A stand-in of a site's first child that shows what it reads and returns zeros; all others return zeros."""
    found = children_of(block, half.children)
    return {
        path: partial(_viewed, _watched, watch if k == 0 else None, record.streams)
        for k, (path, record) in enumerate(found)
    }


def silent(block: Any, half: Half) -> dict[str, Wrap]:
    """Stand-ins of a site's children that return zeros and compute nothing."""
    found = children_of(block, half.children)
    return {path: partial(_viewed, _watched, None, record.streams) for path, record in found}


def inside(wraps: Mapping[str, Wrap], block: Any) -> Any:
    """A stand-in of `block` with stand-ins of its children at these paths. Raises UnsupportedError for hidden ones."""
    heads: dict[str, dict[str, Wrap]] = {}
    for path, wrap in wraps.items():
        head, _, rest = path.partition(".")
        heads.setdefault(head, {})[rest] = wrap
    if block.__dict__.get("_compiled_call_impl") is not None or plain(block) is not block:
        raise UnsupportedError(
            f"{type(block).__name__}: compiled by torch, so caches cannot reach its {', '.join(sorted(heads))}; use "
            "site 'residual' or 'block', or leave the block uncompiled"
        )
    table = block._modules
    children = {}
    for name, deep in heads.items():
        own = deep.pop("", None)
        child = inside(deep, table[name]) if deep else table[name]
        children[name] = child if own is None else own(child)
    made = fork(block, **children)
    forward = block.__dict__.get("forward")
    if isinstance(forward, Piece):
        made.__dict__["forward"] = forward.on(inside(wraps, forward.module), made)
    elif forward is not None:
        made.__dict__["forward"] = rebound(forward, block, made)
    return made


def both(around: Wrap, within: Wrap, child: Any) -> Any:
    """A stand-in of the stand-in of a module."""
    return around(within(child))


def _viewed(turn: Callable[..., Any], *bound: Any) -> Any:
    """A stand-in of a module, the last argument, whose calls are `turn`."""
    *given, child = bound
    return view(child, __call__=partial(turn, *given, child))


def _kept(memory: Memory, part: int, record: Child, path: str, child: Any, *args: Any, **kwargs: Any) -> Any:
    result = child(*args, **kwargs)
    tensors = result if isinstance(result, tuple) else (result,)
    if len(tensors) != record.streams:
        raise UnsupportedError(
            f"{path}: returns {len(tensors)} tensors in this call, the record of the family says {record.streams}; use "
            "site 'residual' or 'block'"
        )
    for stream, tensor in enumerate(tensors):
        memory.keep(part + stream, tensor, text=record.text or stream > 0)
    return result


def _given(memory: Memory, part: int, record: Child, child: Any, *args: Any, **kwargs: Any) -> Any:
    read = _read(record.streams, child, args, kwargs)
    shapes = [tuple(tensor.shape[1:]) for tensor in read]
    width = getattr(child, "out_features", None)
    if width is not None:  # a linear layer
        shapes = [(*shape[:-1], width) for shape in shapes]
    made = tuple(
        memory.give(part + k, like, shape, text=record.text or k > 0)
        for k, (like, shape) in enumerate(zip(read, shapes, strict=True))
    )
    return made[0] if record.streams == 1 else made


def _idle(streams: int, child: Any, *args: Any, **kwargs: Any) -> Any:
    """One column: what reads it goes on to a child that is given."""
    made = tuple(tensor.new_zeros((*tensor.shape[:-1], 1)) for tensor in _read(streams, child, args, kwargs))
    return made[0] if streams == 1 else made


def _watched(watch: Callable[[Tensor], None] | None, streams: int, child: Any, *args: Any, **kwargs: Any) -> Any:
    read = _read(streams, child, args, kwargs)
    if watch is not None:
        watch(read[0])
    made = tuple(tensor.new_zeros(()).expand(tensor.shape) for tensor in read)
    return made[0] if streams == 1 else made


def _read(streams: int, child: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The streams that a child is handed: its first argument, and its text."""
    first = args[0] if args else next(iter(kwargs.values()))
    if streams == 1:
        return (first,)
    cls: Any = type(plain(child))
    named = {**dict(zip(arguments_of(cls), args, strict=False)), **kwargs}
    return first, named["encoder_hidden_states"]
