"""Walks a foreign module and makes the stand-in in which known pieces run our ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch

from vivace.errors import UnsupportedError
from vivace.models.pipelines.fused import attention, blocks, linears, norms, processor, video
from vivace.models.pipelines.fused.ops import DTYPES, Ops, class_of, norm_problem, ready
from vivace.models.pipelines.fused.pattern import Pattern
from vivace.models.pipelines.fused.report import FusedReport, Left, Replaced
from vivace.models.pipelines.views import fork

PATTERNS = {**norms.PATTERNS, **blocks.PATTERNS, **video.PATTERNS}
GELU = "torch.nn.modules.activation.GELU"


@dataclass(frozen=True)
class Given:
    """What a walk is handed: stand-ins of linear layers by path and how they run, and packs that earlier walks made."""

    layers: Mapping[str, Any] = field(default_factory=dict)
    replaced: tuple[Replaced, ...] = ()
    packs: dict[int, Any] = field(default_factory=dict)


class Builder:
    """One walk: the pieces replaced and left so far, the ops, and modules already made (a module may be shared)."""

    def __init__(self, ops: Ops, pack: bool = False, given: Given | None = None) -> None:
        self.ops, self.pack, self.tables = ops, pack, processor.Tables()
        self.given = given or Given()
        self.counts: Counter[str] = Counter()
        self.left: list[Left] = []
        self.made: dict[int, Any] = {}

    def report(self) -> FusedReport:
        choices = self.ops.choices
        counted = sorted(self.counts.items())
        replaced = (Replaced(op, count, choices[op].backend, choices[op].reason) for op, count in counted)
        return FusedReport((*replaced, *self.given.replaced), tuple(self.left))

    def make(self, name: str, module: Any) -> Any:
        """The stand-in of `module`, or the module itself when nothing in it is replaced."""
        if id(module) not in self.made:
            self.made[id(module)] = self._make(name, module)
        return self.made[id(module)]

    def _make(self, name: str, module: Any) -> Any:
        if name in self.given.layers:
            return self.given.layers[name]
        if (reason := rewritten(module)) is not None:
            hidden = [path for path in self.given.layers if path.startswith(f"{name}." if name else "")]
            if hidden:
                raise UnsupportedError(f"{hidden[0]}: it cannot run in another precision: {reason}")
            if any(True for _ in module.children()) or class_of(module) in PATTERNS:
                self._leave(name, module, reason)
            return module
        if self.pack and class_of(module) == linears.LINEAR:
            return self._linear(name, module)
        pattern = self._pattern(name, module)
        own = self._processor(name, module)
        skipped = attention.ABSORBED if own else pattern.absorbs(module) if pattern else ()
        replaced = {}
        for child_name, child in module._modules.items():
            if child is not None and child_name not in skipped:
                made = self.make(f"{name}.{child_name}".lstrip("."), child)
                if made is not child:
                    replaced[child_name] = made
        if not replaced and own is None and pattern is None:
            return module
        stand_in = adopt(fork(module, **replaced), module)
        if own is not None:
            stand_in.__dict__["processor"] = own
        if pattern is not None:
            stand_in.__dict__["forward"] = Piece(self.ops, pattern, module, stand_in)
        return stand_in

    def _linear(self, name: str, module: Any) -> Any:
        """The linear layer with its weight packed, or as it is."""
        reason = watched(module) or linears.problem(module, self.ops.dtype)
        if reason is not None:
            self._leave(name, module, reason)
            return module
        self.counts["linear"] += 1
        if id(module) not in self.given.packs:
            self.given.packs[id(module)] = linears.packed(module)
        return self.given.packs[id(module)]

    def _leave(self, name: str, module: Any, reason: str) -> None:
        self.left.append(Left(name, type(module).__name__, reason))

    def _pattern(self, name: str, module: Any) -> Pattern | None:
        """How `module` itself is replaced; None: it is not, and the report says why where that is not plain."""
        known = class_of(module)
        pattern = PATTERNS.get(known)
        if pattern is None:
            if reason := norms.UNKNOWN.get(known):
                self._leave(name, module, reason)
            elif type(module).__name__.endswith("Block"):
                self._leave(name, module, "no forward of ours for this class")
            return None
        reason = self._problem(pattern, module)
        if reason is not None:
            self._leave(name, module, reason)
            return None
        self.counts.update(pattern.places(module))
        return pattern

    def _problem(self, pattern: Pattern, module: Any) -> str | None:
        """Why `module` keeps its own forward."""
        if reason := watched(module) or pattern.problem(module):
            return reason
        if pattern.run is norms.plain_norm and (reason := norm_problem(module, self.ops.dtype)):
            return reason
        for child in (module._modules.get(name) for name in pattern.absorbs(module)):
            if child is None:
                continue
            known = None if class_of(child) == GELU else norm_problem(child, self.ops.dtype)
            if reason := known or rewritten(child) or watched(child):
                return f"{type(child).__name__} inside: {reason}"
        return next((self.ops.problems[op] for op in pattern.places(module) if op in self.ops.problems), None)

    def _processor(self, name: str, module: Any) -> Any:
        """Our processor for an attention; None for any other module, or when the attention keeps its own."""
        plain = getattr(module, "processor", None) if hasattr(module, "set_processor") else None
        bare = plain is not None and attention.bare(module)
        if plain is None or (bare and (class_of(plain) != attention.PLAIN or self.ops.problems)):
            return None
        reason = attention.attention_problem(module, self.ops.dtype)
        reason = reason or (None if bare else self.ops.problems.get("qk_norm_rope"))
        for norm in (module._modules.get(child) for child in attention.ABSORBED):
            if norm is not None and reason is None:
                reason = rewritten(norm) or watched(norm)
        if reason is not None:
            self._leave(name, module, reason)
            return None
        if not bare:
            self.counts["qk_norm_rope"] += 1 + (getattr(module, "add_q_proj", None) is not None)
        return attention.PROCESSORS[class_of(plain)](plain, self.ops, self.tables)


class Piece:
    """The forward of a stand-in: ours, or the module itself where a call needs it."""

    def __init__(self, ops: Ops, pattern: Pattern, module: Any, stand_in: Any) -> None:
        self.ops, self.pattern, self.module, self.stand_in = ops, pattern, module, stand_in
        self._fits = ready if pattern.mixed else ops.ready

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        if not self.module.training and isinstance(hidden, torch.Tensor) and self._fits(hidden):
            result = self.pattern.run(self.ops, self.stand_in, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.module(*args, **kwargs)

    def on(self, module: Any, stand_in: Any) -> Piece:
        """The same for a module and a stand-in that have other children."""
        return Piece(self.ops, self.pattern, module, stand_in)


def watched(module: Any) -> str | None:
    """Why calls of `module` must go through its own `__call__` and forward."""
    state = module.__dict__
    if state.get("_forward_hooks") or state.get("_forward_pre_hooks"):
        return "forward hooks"
    return "a hook of accelerate" if "forward" in state else None


def rewritten(module: Any) -> str | None:
    """Why nothing inside `module` can be replaced: its forward is not the one of its class."""
    state = module.__dict__
    if state.get("_compiled_call_impl") is not None:
        return "compiled by torch"
    if not all(_bound(state[name], module) for name in ("forward", "_old_forward") if name in state):
        return "its forward is replaced (a hook of diffusers or accelerate, or a compiled module)"
    return None


def _bound(call: Any, module: Any) -> bool:
    """`call` is a method or partial that can be bound to a stand-in instead."""
    if isinstance(call, MethodType):
        return call.__self__ is module
    return isinstance(call, partial) and bool(call.args) and call.args[0] is module


def adopt(stand_in: Any, module: Any) -> Any:
    """The stand-in with forwards that accelerate's hooks bound to `module` bound to itself."""
    state = stand_in.__dict__
    for name in ("forward", "_old_forward"):
        call = state.get(name)
        if isinstance(call, MethodType):
            state[name] = MethodType(call.__func__, stand_in)
        elif isinstance(call, partial):
            state[name] = partial(call.func, stand_in, *call.args[1:], **call.keywords)
    return stand_in


def structure(module: Any) -> tuple[Any, ...]:
    """A key that changes when a stand-in must be made anew: modules, their attributes, hooks, dtypes, device."""
    found, stack = list[Any](), [module]
    first = next(iter(module.parameters()), None)
    while stack:
        state = stack.pop().__dict__
        children = state["_modules"]
        parameter = next((p for p in state["_parameters"].values() if p is not None), None)
        found.append(tuple(map(id, state.values())))
        found.append((len(state["_forward_hooks"]), len(state["_forward_pre_hooks"]), *map(id, children.values())))
        found.append(None if parameter is None else parameter.dtype)
        stack += [child for child in children.values() if child is not None]
    return None if first is None else first.device.type, *found


def build(module: Any, backend: str | None, pack: bool = False, given: Given | None = None) -> tuple[Any, FusedReport]:
    """The stand-in of `module` and the report; the module itself when its dtype or place rules our ops out."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    kind, reason = type(module).__name__, None
    if parameter is None:
        reason = "no parameters"
    elif parameter.dtype not in DTYPES:
        reason = f"dtype {str(parameter.dtype)[6:]}; our ops take float32 and bfloat16"
    elif module.training:
        reason = "training mode; call eval()"
    if parameter is None or reason is not None:
        if given is not None and given.layers:
            raise UnsupportedError(f"{kind}: it cannot run in another precision: {reason}")
        return module, FusedReport(left=(Left("", kind, reason or ""),))
    ops = Ops(parameter.dtype, parameter.device, backend)
    builder = Builder(ops, pack and parameter.device.type == "cpu" and "linear" in ops.choices, given)
    return builder.make("", module), builder.report()
