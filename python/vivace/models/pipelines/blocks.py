"""The blocks of a foreign network, observed and replaced in one forward for one caller.

A forward runs on a stand-in of the network whose blocks are stand-ins that ask the interceptor. The network, its blocks
and what hangs on them stay as they are, so that several threads may each run a forward of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from vivace.engine.denoiser import BlockCall, BlockInfo, BlockOut, Interceptor
from vivace.errors import UnsupportedError
from vivace.models.pipelines.families import Blocks, Family, Shape, arguments_of, family_of, plain, registered_shape
from vivace.models.pipelines.views import fork, view


class ModuleParts:
    """A `diffusers` network as `engine.denoiser.Parts`: its blocks as they run, and a forward that hands them out.

    Raises: UnsupportedError for an unknown network (the message shows the record to add), a compiled one, and one whose
    forward something replaced.
    """

    def __init__(self, module: Any) -> None:
        self.family: Family = family_of(module)
        self.module = module
        _require_reachable(module)
        self._parts = tuple(
            (_info(module, index, name, entry), entry, _shape(module.get_submodule(name), entry))
            for index, (name, entry) in enumerate(self.family.names(module))
        )
        self.blocks: tuple[BlockInfo, ...] = tuple(info for info, _, _ in self._parts)
        self.entries: tuple[Blocks, ...] = tuple(entry for _, entry, _ in self._parts)  # the list of each block

    def forward(self, interceptor: Interceptor, *args: Any, **kwargs: Any) -> Any:
        """module(*args, **kwargs), every block's turn handed to `interceptor`."""
        _require_reachable(self.module)
        given = _named(type(self.module), args, kwargs)
        images = {entry.path: _image(entry, given) for _, entry, _ in self._parts}
        children: dict[str, dict[str, Any]] = {}
        for info, entry, shape in self._parts:
            path, _, index = info.name.partition(".")
            part = getattr(self.module, path)
            block = part._modules[index] if index else part
            turn = partial(_turn, interceptor, block, info, shape, images[entry.path])
            children.setdefault(path, {})[index] = view(block, __call__=turn)
        lists = {path: _list(getattr(self.module, path), standing) for path, standing in children.items()}
        stand_in = fork(self.module, **lists)
        if "forward" in stand_in.__dict__:
            stand_in.__dict__["forward"] = rebound(self.module.forward, self.module, stand_in)
        return stand_in(*args, **kwargs)


def _list(part: Any, standing: dict[str, Any]) -> Any:
    """The list of modules `part` with its blocks replaced; a single block is its own stand-in."""
    return standing[""] if "" in standing else fork(part, **standing)


def _turn(
    interceptor: Interceptor,
    block: Any,
    info: BlockInfo,
    shape: Shape,
    image: slice,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A block's turn: the interceptor's answer, in the form in which the block would have returned it."""
    options = _named(type(plain(block)), args, kwargs)
    skips = options.pop(shape.skips, None) if shape.skips else None
    call = BlockCall(
        info=info,
        hidden=options.pop(shape.hidden),
        context=options.pop(shape.context, None) if shape.context else None,
        compute=partial(_compute, block, shape, args, kwargs),
        skips=() if skips is None else tuple(skips) if isinstance(skips, (tuple, list)) else (skips,),
        image=image,
        options=options,
    )
    return _written(shape, interceptor(call))


def _compute(
    block: Any,
    shape: Shape,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    hidden: Any = None,
    options: Mapping[str, Any] | None = None,
    skips: tuple[Any, ...] | None = None,
    inside: Callable[[Any], Any] | None = None,
) -> BlockOut:
    """The block as the model would run it; with other arguments, or as the stand-in that `inside` makes of it."""
    changed = dict(options or {})
    if hidden is not None:
        changed[shape.hidden] = hidden
    if skips is not None:
        assert shape.skips is not None, "blocks that take skips are told others"
        changed[shape.skips] = skips
    if changed:
        args, kwargs = (), {**_named(type(plain(block)), args, kwargs), **changed}
    return _read(shape, (block if inside is None else inside(block))(*args, **kwargs))


def _read(shape: Shape, result: Any) -> BlockOut:
    """A block's result as a `BlockOut`."""
    return (
        BlockOut(result) if shape.returns == ("hidden",) else BlockOut(**dict(zip(shape.returns, result, strict=True)))
    )


def _written(shape: Shape, out: BlockOut) -> Any:
    """A `BlockOut` as the block would return it."""
    return out.hidden if shape.returns == ("hidden",) else tuple(getattr(out, part) for part in shape.returns)


def _image(entry: Blocks, given: Mapping[str, Any]) -> slice:
    """Where the image tokens lie in what blocks of `entry` read, in a forward with these arguments."""
    return slice(None) if entry.text is None else slice(entry.text(given), None)


def _named(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `cls`.forward by name."""
    return {**dict(zip(arguments_of(cls), args, strict=False)), **kwargs}


def _shape(block: Any, entry: Blocks) -> Shape:
    """How a block takes and returns its streams: as the record says, else as `diffusers` registers for its class."""
    cls = type(plain(block))
    shape = entry.shape or registered_shape(cls)
    if shape is None:
        raise UnsupportedError(
            f"{entry.path}: diffusers registers no streams for {cls.__name__}; say them in the record: "
            f"Blocks({entry.path!r}, Shape(hidden=..., context=..., returns=(...)))"
        )
    if shape.hidden not in arguments_of(cls):
        raise UnsupportedError(
            f"{entry.path}: {cls.__name__} has no argument {shape.hidden!r}, it has {', '.join(arguments_of(cls))}; "
            "this release of diffusers is not the one the record was written for: register_family with replace=True"
        )
    return shape


def _info(module: nn.Module, index: int, name: str, entry: Blocks) -> BlockInfo:
    block = module.get_submodule(name)
    writes = "context" in _shape(block, entry).returns and not getattr(block, "context_pre_only", False)
    return BlockInfo(index, name, entry.kind, text=writes, joint=entry.text is not None)


def _require_reachable(module: Any) -> None:
    """Refuses a compiled network: its blocks are no longer separate."""
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise UnsupportedError(
            f"{type(module).__name__}: compiled as a whole by torch.compile, so its blocks cannot be reached; compile "
            "the blocks instead (module.compile_repeated_blocks()), pass the network before compiling (_orig_mod), or "
            "use a plan without rules for blocks"
        )


def rebound(forward: Any, module: nn.Module, stand_in: Any) -> Callable[..., Any]:
    """A forward that hooks replaced on `module`, on the stand-in. Raises UnsupportedError naming what cannot move."""
    if getattr(forward, "__self__", None) is module:
        return MethodType(forward.__func__, stand_in)
    name = type(module).__name__
    if isinstance(forward, partial) and len(forward.args) == 1 and forward.args[0] is module:
        for cell in forward.func.__closure__ or ():
            if hasattr(cell.cell_contents, "pre_forward"):
                return _rebound_hook(cell.cell_contents, module, stand_in)
        if "_hf_hook" in module.__dict__:  # accelerate
            stand_in.__dict__["_old_forward"] = rebound(module._old_forward, module, stand_in)
            return partial(forward.func, stand_in)
    raise UnsupportedError(
        f"{name}.forward was replaced on the object by {forward!r}, which keeps the network it was made for; its "
        "blocks cannot be reached in one call alone: undo it, or use a plan without rules for blocks"
    )


def _rebound_hook(reference: Any, module: Any, stand_in: Any) -> Callable[..., Any]:
    """The forward of one `diffusers` hook on the stand-in; hooks that replace the forward are refused."""
    if reference.original_forward is not None:
        hooks = module._diffusers_hook.hooks
        name = next((key for key, hook in hooks.items() if hook.fn_ref is reference), "a hook")
        raise UnsupportedError(
            f"{type(module).__name__}: the diffusers hook {name!r} ({type(hooks.get(name)).__name__}) replaces the "
            f"forward, so blocks cannot be reached beneath it; remove it (disable_cache() for caches), or use a plan "
            "without rules for blocks"
        )
    inner = rebound(reference.forward, module, stand_in)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = reference.pre_forward(stand_in, *args, **kwargs)
        return reference.post_forward(stand_in, inner(*args, **kwargs))

    return forward
