"""A network of diffusers under cache rules, and the same by torch's own hooks: recorded outputs put in their places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vivace.engine.caching import CachePlan, RowUse, caches
from vivace.engine.kept import Kept, KeptMemory, Sample, Turn
from vivace.engine.plan import Action, Args, Binding, Plan, Recipe, Rule, Step, Variant
from vivace.engine.tokens import Focus
from vivace.models.caching.foreign import Cached

if TYPE_CHECKING:
    from tests.models.pipelines.checks import Network

BRANCH = "cond"


def rows_of(rules: Sequence[tuple[Rule, ...]], forecast: tuple[float, ...], blocks: int) -> CachePlan:
    """The caches of a plan with one row a tuple of rules; rows that read keys compute some tokens."""
    some = [any(rule.site == "kv" and rule.action == Action.REUSE for rule in row) for row in rules]
    variants = (Variant(rules=row, selector="random" if part else "all") for row, part in zip(rules, some, strict=True))
    steps = tuple(Step(1.0, 1.0, 1.0, (), variant, forecast=forecast) for variant in variants)
    plan = Plan(steps, "eps", (), Recipe("make_plan", Args()), binding=Binding("x", blocks, 1, 1, (1,)))
    return caches(plan)


@dataclass
class Run:
    """Rows of one request over the batch of a captured call, each row's picture a picture of the request."""

    network: Network
    plan: CachePlan
    memory: KeptMemory
    kept: Kept

    @classmethod
    def of(cls, network: Network, *rules: tuple[Rule, ...], forecast: tuple[float, ...] = ()) -> Run:
        """A request whose row i has rules[i]."""
        plan, memory = rows_of(rules, forecast, len(network.parts.blocks)), KeptMemory()
        return cls(network, plan, memory, Kept(memory, plan, len(network.answer)))

    def row(
        self, number: int, network: Network | None = None, module: Any = None, focus: Focus | None = None
    ) -> torch.Tensor:
        """What row `number` answers to the arguments of `network`; `focus`: with these image tokens of every row."""
        network = network or self.network
        cached, count = Cached(module or network.module), len(network.answer)
        turns = [self._turn(item, count) for item in self.plan.rows[number].uses]
        return network.run(partial(cached.forward, turns, [(BRANCH, n) for n in range(count)], focus=focus))

    def _turn(self, item: RowUse, count: int) -> Turn:
        return Turn(item.use, "main", tuple(Sample(self.kept, n, item.weights) for n in range(count)))


def keep(blocks: tuple[int, int], site: str, order: int = 0, store: str | None = None) -> Rule:
    return Rule(blocks, site, action=Action.COMPUTE, order=order, store=store)


def reuse(blocks: tuple[int, int], site: str) -> Rule:
    return Rule(blocks, site, action=Action.REUSE)


def later(network: Network, scale: float = 0.8) -> Network:
    """The same network with other latents, as a later row has them, and what it says to these."""
    args, kwargs = list(network.args), copy.deepcopy(network.kwargs)
    noise = torch.Generator().manual_seed(7)

    def moved(value: torch.Tensor) -> torch.Tensor:
        return scale * value + 0.2 * torch.randn(value.shape, generator=noise)

    if args:
        args[0] = moved(args[0])
    else:
        name = next(name for name in ("hidden_states", "sample") if name in kwargs)
        kwargs[name] = moved(kwargs[name])
    made = replace(network, args=tuple(args), kwargs=kwargs)
    return replace(made, answer=made.run().clone())


@contextmanager
def hooked(module: Any, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on submodules: hook(module, args, kwargs, output)."""
    handles = [module.get_submodule(path).register_forward_hook(hook, with_kwargs=True) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(network: Network, paths: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """(first argument, output) of submodules while the network answers."""
    found: dict[str, tuple[Any, Any]] = {}

    def note(path: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found[path] = _first(args, kwargs).clone(), _cloned(output)

    with hooked(network.module, {path: partial(note, path) for path in paths}):
        network.run()
    return found


def answered(network: Network, outputs: Mapping[str, Callable[[Any, Any], Any]]) -> torch.Tensor:
    """What the network says when submodules give outputs[path](first argument, output) instead."""

    def given(make: Callable[[Any, Any], Any], module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return make(_first(args, kwargs), output)

    with hooked(network.module, {path: partial(given, make) for path, make in outputs.items()}):
        return network.run()


def calls(network: Network, paths: Sequence[str], run: Callable[[], Any]) -> int:
    """How often submodules run in `run`."""
    count = [0]

    def note(*_: Any) -> None:
        count[0] += 1

    with hooked(network.module, dict.fromkeys(paths, note)):
        run()
    return count[0]


def _first(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _cloned(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_cloned(part) for part in output)
    return output.clone() if isinstance(output, torch.Tensor) else output
