"""What must hold for every family, as functions of a network: each raises when it does not.

`CHECKS` lists them; the tests run every one for every family, and docs/models.md is made of their titles and outcomes.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any

import torch
from tests.models.caching.keeping import Run, calls, keep, later, reuse
from tests.models.pipelines.tiny import FAMILIES, VARIANTS, Tiny, make
from tests.models.tokens.dense import active, count, densely, picked, sparsely
from torch.utils._python_dispatch import TorchDispatchMode

import vivace
from vivace.engine.bind import ModelSpec
from vivace.engine.denoiser import BlockCall, BlockInfo, BlockOut, Interceptor
from vivace.models.caching.foreign import Cached
from vivace.models.pipelines.blocks import ModuleParts

TINY = {**FAMILIES, **VARIANTS}


@dataclass(frozen=True)
class Network:
    """A network of a pipeline, the arguments of one of its calls, and what it answered."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: torch.Tensor

    @property
    def parts(self) -> ModuleParts:
        return ModuleParts(self.module)

    def run(self, forward: Callable[..., Any] | None = None) -> torch.Tensor:
        """What `forward`, by default the network's own, says to the arguments."""
        with torch.no_grad():
            return tensor((forward or self.module)(*self.args, **copy.deepcopy(self.kwargs)))

    def intercepted(self, interceptor: Interceptor) -> torch.Tensor:
        """What the network says when `interceptor` has every block's turn."""
        parts = self.parts
        return self.run(lambda *args, **kwargs: parts.forward(interceptor, *args, **kwargs))


def tensor(answer: Any) -> torch.Tensor:
    """The prediction in what a network returned."""
    return answer[0] if isinstance(answer, tuple) else answer.sample


@cache
def networks(name: str) -> tuple[Network, ...]:
    """The networks of a tiny pipeline, each with the first of its calls in one run of the pipeline."""
    return tuple(captured(make(name), part, TINY[name]) for part in TINY[name].denoisers)


def captured(pipe: Any, part: str, tiny: Tiny) -> Network:
    """The network `part` of `pipe`, and its first call while the pipeline runs."""
    calls: list[tuple[Any, ...]] = []

    def note(module: Any, args: Any, kwargs: Any, answer: Any) -> None:
        if not calls:
            calls.append((args, copy.deepcopy(kwargs), tensor(answer).clone()))

    module = getattr(pipe, part)
    handle = module.register_forward_hook(note, with_kwargs=True)
    pipe(**tiny.arguments(), generator=torch.Generator().manual_seed(0))
    handle.remove()
    return Network(module, *calls[0])


def observes_every_block(network: Network) -> None:
    """Every block is seen, in order; the answer and the network stay the same."""
    before, seen = dict(network.module.__dict__), []

    def observe(call: BlockCall) -> BlockOut:
        seen.append(call.info)
        return call.compute()

    assert torch.equal(network.intercepted(observe), network.answer)
    assert tuple(seen) == network.parts.blocks
    assert len(seen) == _count(network.module)
    assert network.module.__dict__ == before
    assert torch.equal(network.run(), network.answer)


def _count(module: Any) -> int:
    """Blocks a network was configured with."""
    config = module.config
    if "down_block_types" in config:
        return len(config.down_block_types) + len(config.up_block_types) + 1
    refiners = config.num_refiner_layers if hasattr(module, "noise_refiner") else 0
    return config.num_layers + config.get("num_single_layers", 0) + refiners


def _halved(value: Any) -> Any:
    """Half of every tensor in a block's result."""
    if isinstance(value, tuple):
        return tuple(_halved(part) for part in value)
    return value if value is None else 0.5 * value


def _half(wanted: Callable[[BlockCall], bool]) -> Interceptor:
    """An interceptor that halves what the wanted blocks write."""

    def half(call: BlockCall) -> BlockOut:
        out = call.compute()
        return BlockOut(_halved(out.hidden), _halved(out.context), _halved(out.skips)) if wanted(call) else out

    return half


def _is_of(info: BlockInfo, call: BlockCall) -> bool:
    return call.info == info


def replaces_every_block(network: Network) -> None:
    """A replaced block acts as a network whose block was edited, bit for bit, and no block is without effect."""
    for info in network.parts.blocks:
        edited = copy.deepcopy(network.module)
        edited.get_submodule(info.name).register_forward_hook(lambda module, args, result: _halved(result))
        replaced = network.intercepted(_half(partial(_is_of, info)))
        assert torch.equal(replaced, network.run(edited)), info
        assert not torch.equal(replaced, network.answer), info


def leaves_out_a_block(network: Network) -> None:
    """A block that hands on what it reads acts as a network without that block."""

    def through(wanted: str, call: BlockCall) -> BlockOut:
        return BlockOut(call.hidden, call.context) if call.info.name == wanted else call.compute()

    for info in network.parts.blocks[1:]:  # the first also embeds the timestep for the head of DiT
        if info.kind == "transformer":
            left_out = network.intercepted(partial(through, info.name))
            assert torch.equal(left_out, network.run(_without(network.module, info.name))), info


def _without(module: Any, name: str) -> Any:
    """A copy of a network without one block."""
    edited, (path, _, index) = copy.deepcopy(module), name.rpartition(".")
    if type(module).__name__ == "HunyuanDiT2DModel":  # it counts its blocks
        edited.get_submodule(name).forward = lambda hidden_states, **options: hidden_states
    else:
        del edited.get_submodule(path)[int(index)]
    return edited


class Narrow(TorchDispatchMode):
    """Notes whether anything is computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= isinstance(result, torch.Tensor) and result.dtype is torch.float32
        return result


def _wider(value: Any) -> Any:
    """The float32 tensors of nested arguments as float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype is torch.float32 else value
    if isinstance(value, dict):
        return {key: _wider(part) for key, part in value.items()}
    return type(value)(_wider(part) for part in value) if isinstance(value, (tuple, list)) else value


def runs_in_float64(network: Network) -> None:
    """In float64 it says the same up to rounding; the record says what its blocks compute in float32 all the same."""
    module = copy.deepcopy(network.module).double()
    wide = replace(network, module=module, args=_wider(network.args), kwargs=_wider(network.kwargs))
    narrow = Narrow()

    def watch(call: BlockCall) -> BlockOut:
        with narrow:
            return call.compute()

    answer = wide.intercepted(watch)
    assert answer.dtype is torch.float64
    assert (answer - network.answer).abs().max() < 64 * torch.finfo(torch.float32).eps * answer.abs().max()
    assert narrow.found == bool(wide.parts.family.float32)


def keeps_and_gives(network: Network) -> None:
    """Blocks and sites inside them that are given what they gave do not run, and the answer has the same bits."""
    last = len(network.parts.blocks) - 1
    first = 1 if network.parts.blocks[0].kind == "down" else 0
    cached = Cached(network.module)
    rules = {"block": [(first, last)]}
    for site in sorted(cached.sites & {"attn", "cross_attn", "mlp"}):
        rules[site] = [(i, i + 1) for i in range(last) if cached.lacks(site, (i, i + 1)) is None]
    inner = [site for site in rules if site != "block"]
    names = [info.name for info in network.parts.blocks[first:last]]
    for sites in (["block"], inner):
        run = Run.of(network, *(tuple(say(b, site) for site in sites for b in rules[site]) for say in (keep, reuse)))
        assert torch.equal(run.row(0), network.answer)
        assert torch.equal(run.row(1), network.answer)
        assert sites == inner or calls(network, names, partial(run.row, 1)) == 0


def runs_some_tokens(network: Network) -> None:
    """Some tokens get what a dense run gives them where others keep old keys; all tokens the plain bits.

    A network that needs all tokens in every row says why.
    """
    if (why := Cached(network.module).whole) is not None:
        assert any(told in why for told in ("computes all", "does not say how")), why
        return
    late, ids = later(network), picked(network)
    found = active(late, sparsely(network, late, ids), ids)
    wanted = active(late, densely(network, late, ids), ids)
    assert (found - wanted).abs().max() <= 16 * torch.finfo(torch.float32).eps * wanted.abs().max()
    every = torch.arange(count(network), dtype=torch.int32).expand(len(network.answer), -1)
    assert torch.equal(sparsely(network, late, every), late.answer)


def serves_two_threads(network: Network) -> None:
    """One thread replaces blocks while another runs the plain network: both as if alone."""

    def replaced() -> torch.Tensor:
        return network.intercepted(_half(lambda call: True))

    alone = replaced()
    with ThreadPoolExecutor(2) as pool:
        jobs = [(pool.submit(replaced), pool.submit(network.run)) for _ in range(5)]
    assert all(torch.equal(first.result(), alone) for first, _ in jobs)
    assert all(torch.equal(second.result(), network.answer) for _, second in jobs)


def says_its_spec(network: Network) -> None:
    """The tokens of the spec are the image tokens that a block reads."""
    tokens = []

    def measure(call: BlockCall) -> BlockOut:
        space = call.hidden[:, call.image].shape[1] if call.info.kind == "transformer" else call.hidden[0, 0].numel()
        tokens.append(space)
        return call.compute()

    network.intercepted(measure)
    family = network.parts.family
    spec = ModelSpec("tiny", "tiny", **family.spec_fields(network.module))
    assert spec.tokens() > 0
    assert spec.blocks == len(tokens)
    latent = (*network.args, *network.kwargs.values())[0][0]
    if family.layout == "tokens":
        assert latent.shape == (tokens[0], spec.latent_shape[0] * prod(spec.patch))
    else:
        shape = latent.transpose(0, 1).shape if family.layout == "frames" else latent.shape
        assert tokens[0] == spec.tokens(tuple(shape))
    assert len(set(tokens)) == 1 or network.parts.blocks[0].kind == "down"


def _picture(pipe: Any, tiny: Tiny) -> torch.Tensor:
    return torch.as_tensor(pipe(**tiny.arguments(), generator=torch.Generator().manual_seed(0))[0])


def accelerates(name: str) -> None:
    """With the scheduler's own plan the pipeline gives its own bits; restored, it is what it was."""
    pipe = make(name)
    plain = _picture(pipe, TINY[name])
    kind, keys, parts = type(pipe), set(pipe.__dict__), dict(pipe.components)
    vivace.accelerate(pipe)
    assert torch.equal(_picture(pipe, TINY[name]), plain)
    vivace.restore(pipe)
    assert type(pipe) is kind
    assert pipe.__dict__.keys() == keys
    assert all(pipe.components[part] is value for part, value in parts.items())
    assert torch.equal(_picture(pipe, TINY[name]), plain)


def follows_a_plan(name: str) -> None:
    """With the fused step and own kernels the picture is the plain one up to rounding."""
    pipe = make(name)
    plain = _picture(pipe, TINY[name])
    vivace.accelerate(pipe, arithmetic="plan")
    picture = _picture(pipe, TINY[name])
    assert vivace.receipt(pipe).kernels[0].backend == "plan"
    assert float((picture - plain).abs().max()) < 2e-5 * float(plain.abs().max())


def gives_memory_back(name: str) -> None:
    """After `restore` no tensor lives that did not live before."""
    pipe = make(name)
    _picture(pipe, TINY[name])
    gc.collect()
    gc.freeze()  # imported libraries hold a million objects: they are not looked at again
    try:
        kept = []  # after plain calls: a pipeline holds on to things of its last one
        for _ in range(2):
            _picture(pipe, TINY[name])
            gc.collect()
            kept.append(_bytes_alive())
            for arithmetic in ("auto", "plan"):
                vivace.accelerate(pipe, arithmetic=arithmetic)
                _picture(pipe, TINY[name])
                vivace.restore(pipe)
        assert kept[1] <= kept[0]
    finally:
        gc.unfreeze()


def _bytes_alive() -> int:
    """Bytes of the tensors the collector sees. Types are asked, since isinstance would wake lazy modules."""
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


@dataclass(frozen=True)
class Check:
    """A claim about a family: `title` heads its column in the documentation; `run(name)` raises when it is wrong.

    A claim that held once is not tried again in the same process.
    """

    title: str
    run: Callable[[str], None]


def _each(holds: Callable[[Network], None], name: str) -> None:
    """`holds` for every network of family `name`."""
    for network in networks(name):
        holds(network)


ON_NETWORKS: dict[str, Callable[[Network], None]] = {
    "blocks observed": observes_every_block,
    "replaced": replaces_every_block,
    "left out": leaves_out_a_block,
    "float64": runs_in_float64,
    "two threads": serves_two_threads,
    "cached": keeps_and_gives,
    "token rows": runs_some_tokens,
    "spec": says_its_spec,
}
ON_PIPELINES: dict[str, Callable[[str], None]] = {
    "accelerated, restored": accelerates,
    "fused step": follows_a_plan,
    "memory back": gives_memory_back,
}
CHECKS: dict[str, Check] = {
    title.split(",")[0].replace(" ", "_"): Check(title, cache(holds)) for title, holds in ON_PIPELINES.items()
} | {title.replace(" ", "_"): Check(title, cache(partial(_each, holds))) for title, holds in ON_NETWORKS.items()}
