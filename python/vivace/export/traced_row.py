"""One row of a network of diffusers as a function of tensors: which go in, which come out, and the forward between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vivace.engine.caching import KEYS
from vivace.engine.compiled import Evaluation
from vivace.engine.plan import Variant
from vivace.export import traced_tokens
from vivace.export.text import spelt
from vivace.export.traced_lanes import Ledger, Noted, Traced, store_dtype, turn_of
from vivace.export.traced_ops import Decomposed
from vivace.export.traced_tokens import TracedActive
from vivace.models.caching.foreign import Cached, Keeper
from vivace.models.caching.inside import both
from vivace.models.perturbed import perturbed_network
from vivace.models.pipelines.conditions import Condition, parts
from vivace.models.pipelines.embedded import UNITS
from vivace.models.pipelines.network import NetworkDenoiser
from vivace.models.pipelines.records import plain
from vivace.runtime.calls import Kept, Structure
from vivace.runtime.manifest import Port

ROWS = 3  # of an example batch: no size that means something
PREFIX = "network."  # of names of parameters in a traced module
IDS = "token_ids"


class Row:
    """A structure of one network: its ports, an example of every tensor, and how it runs.

    ledger: what rows keep, filled by `try_out` in the order of first use; starts: as of `traced_lanes.starts`.
    """

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        structure: Structure,
        condition: Condition,
        ledger: Ledger,
        starts: Mapping[tuple[str, int], int],
        opset: int,
    ) -> None:
        self.denoiser, self.structure, self.ledger, self.opset = denoiser, structure, ledger, opset
        self.network = denoiser.networks[structure.model]
        self.name = type(plain(self.network)).__name__
        self._like = next(iter(condition.branches.values()))
        self._starts = starts
        self._runs: Callable[..., Any] = self.network
        x = torch.zeros(ROWS, *denoiser.spec.latent_shape, dtype=denoiser.dtype, device=denoiser.device)
        lanes, times = tuple(range(ROWS)), (1.0,) * ROWS
        call = Evaluation(x, lanes, lanes, times, (condition,) * ROWS, (None,) * ROWS)
        branch = next(iter(condition.branches))
        (self._piece,) = denoiser.stage(call, Variant(structure.model, (branch,)), runner=self._runner)
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []

    def _runner(self, network: Any, rows: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._runs(*args, **kwargs)

    # --- ports -------------------------------------------------------------------------------------------------------
    def try_out(self) -> None:
        """Run the forward once to learn what it keeps, and know the ports."""
        lanes = {kept: self._memory(Noted, kept) for kept in self.structure.kept}
        self._run(self._example_inputs(), lanes)
        if self.structure.kept and not self.denoiser.cached(self.network).wiring.resized:
            self.ledger.tell(self._tokens)
        self.inputs = [port for port, _ in self._ports_in()]
        self.outputs = [port for port, _ in self._ports_out()]

    def examples(self) -> list[Tensor]:
        """A tensor for every input."""
        own, device = self._example_inputs(), self.denoiser.device
        made = []
        for port, dtype in self._ports_in():
            sizes = [size if isinstance(size, int) else self._sizes[size] for size in port.shape]
            made.append(own[port.name] if port.name in own else torch.ones(sizes, dtype=dtype, device=device))
        return made

    def dynamic(self, free_text: bool) -> list[dict[int, Any]]:
        """Which dimensions a trace is to leave free, and of which it is to find out whether it can."""
        found = []
        for port in self.inputs:
            dims = {i: Dim.DYNAMIC for i, size in enumerate(port.shape) if size in ("rows", "active")}
            if free_text:
                dims |= {i: Dim.AUTO for i, size in enumerate(port.shape) if size == "length"}
            found.append(dims)
        return found

    def _ports_in(self) -> list[tuple[Port, torch.dtype]]:
        latent = tuple(self.denoiser.spec.latent_shape)
        found = [
            (Port("x", "float32", ("rows", *latent), "latent"), torch.float32),
            (Port("timestep", "float32", ("rows",), "timestep"), torch.float32),
        ]
        found += [(self._condition_port(path, value), _outside(value.dtype)) for path, value in self._conditions()]
        if self.structure.tokens:
            found.append((Port(IDS, "int64", ("rows", "active"), "tokens"), torch.int64))
        for kept in self.structure.kept:
            found += self._planes(kept, "kept", _read(kept, self.structure.tokens))
            if kept.gives and kept.terms > 1:
                port = Port(f"weights.{kept.name}", "float32", (kept.terms,), "weights", kept.name)
                found.append((port, torch.float32))
        return found

    def _ports_out(self) -> list[tuple[Port, torch.dtype]]:
        latent = tuple(self.denoiser.spec.latent_shape)
        found = [(Port("prediction", "float32", ("rows", *latent), "prediction"), torch.float32)]
        for kept in self.structure.kept:
            found += self._planes(kept, "next", _written(kept, self.structure.tokens))
        return found

    def _planes(self, kept: Kept, prefix: str, count: int) -> list[tuple[Port, torch.dtype]]:
        found = []
        for number, part in self.ledger.of(self.structure.model, kept).items() if count else ():
            dtype = store_dtype(kept, part.dtype)
            for j in range(count):
                name = f"{kept.name}.{number}.{j}"
                where = {"key": kept.name, "part": number, "plane": j}
                port = Port(f"{prefix}.{name}", _name(dtype), ("rows", *part.shape), "kept", **where)  # type: ignore[arg-type]
                found.append((port, dtype))
                if dtype is torch.int8:
                    shape = ("rows", *part.shape[:-1])
                    port = Port(f"{prefix}_scale.{name}", "float32", shape, "kept_scale", **where)  # type: ignore[arg-type]
                    found.append((port, torch.float32))
        return found

    def _condition_port(self, path: str, value: Tensor) -> Port:
        name = spelt(path)
        number = name in self.denoiser.takes
        shape: tuple[int | str, ...] = ("rows", *value.shape[1:])
        if value.dim() >= 2 and value.shape[1] == self._length and any(word in path for word in ("hidden", "mask")):
            shape = ("rows", "length", *value.shape[2:])
        return Port(name, _name(_outside(value.dtype)), shape, "number" if number else "condition", name)

    # --- the forward -------------------------------------------------------------------------------------------------
    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the outputs are for tensors of the inputs."""
        named = dict(zip([port.name for port in self.inputs], tensors, strict=True))
        memories: dict[Kept, Noted] = {}
        for kept in self.structure.kept:
            memory = self._memory(Traced, kept)
            assert isinstance(memory, Traced), "made as such"
            planes, scales = self._found(named, kept, "kept"), self._found(named, kept, "kept_scale")
            memories[kept] = memory.fill(planes, scales, named.get(f"weights.{kept.name}"))
        with Decomposed(self.opset < 23):
            prediction = self._run(named, memories)
        made = {f"next.{kept.name}.{part}.{j}": t for kept, m in memories.items() for (part, j), t in m.made.items()}  # type: ignore[attr-defined]
        for kept, memory in memories.items():
            made |= {f"next_scale.{kept.name}.{p}.{j}": t for (p, j), t in memory.made_scales.items()}  # type: ignore[attr-defined]
        made["prediction"] = prediction.float()
        return [made[port.name] for port in self.outputs]

    def _found(self, named: Mapping[str, Tensor], kept: Kept, source: str) -> dict[tuple[int, int], Tensor]:
        ports = [port for port in self.inputs if (port.source, port.key) == (source, kept.name)]
        return {(port.part, port.plane): named[port.name] for port in ports}

    def _run(self, named: Mapping[str, Tensor], memories: Mapping[Kept, Noted]) -> Tensor:
        """The prediction; memories keep what they are told to."""
        manner, denoiser = self.denoiser.manner, self.denoiser
        tensors = {path: self._fed(path, named[spelt(path)], value) for path, value in self._conditions()}
        tensors[manner.latent] = named["x"].to(denoiser.dtype)
        tensors[manner.time] = manner.fed(named["timestep"].to(manner.dtype))
        active = None if not self.structure.tokens else TracedActive(named[IDS], self._tokens)
        if self.structure.identity:
            self._runs = perturbed_network(denoiser.cached(self.network), self.structure.identity)
        elif self.structure.kept or active is not None:
            cached = denoiser.cached(self.network)
            self._runs = partial(cached.run, TracedKeeper(cached, self.structure, memories, active))
        result: Tensor = self._piece.forward(tensors)
        return result

    def _memory(self, kind: type[Noted], kept: Kept) -> Noted:
        start = self._starts.get((self.structure.model, kept.last), kept.first) if kept.site == "block" else 0
        return kind(kept, self.structure.model, self.ledger, start)

    def _fed(self, path: str, value: Tensor, like: Tensor) -> Tensor:
        scale = UNITS[self.name] if spelt(path) in self.denoiser.takes else 1.0
        return (value if scale == 1.0 else value * scale).to(like.dtype)

    def _conditions(self) -> list[tuple[str, Tensor]]:
        return [(path, values[0]) for path, values in parts([self._like]).items()]

    def _example_inputs(self) -> dict[str, Tensor]:
        device = self.denoiser.device
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(ROWS, *self.denoiser.spec.latent_shape, generator=generator)
        named = {"x": x.to(device), "timestep": torch.ones(ROWS, device=device)}
        for path, value in self._conditions():
            named[spelt(path)] = value.to(_outside(value.dtype)).expand(ROWS, *value.shape[1:]).clone()
        if self.structure.tokens:
            named[IDS] = torch.arange(self._active, device=device).expand(ROWS, -1).clone()
        return named

    @property
    def _tokens(self) -> int:
        """Image tokens of the latent."""
        cached = self.denoiser.cached(self.network)
        return cached.parts.family.latents(self.network, tuple(self.denoiser.spec.latent_shape)).tokens

    @property
    def _active(self) -> int:
        """Tokens that an example computes: no number that means something else."""
        return max(2, self._tokens // 2 - 1) if self.structure.tokens else 0

    @property
    def _sizes(self) -> dict[str, int]:
        """Of free dimensions in an example."""
        return {"rows": ROWS, "active": self._active, "length": self._length}

    @property
    def _length(self) -> int:
        """Text tokens of the example prompt; 0: none."""
        text = [value for path, value in self._conditions() if value.dim() == 3 and "hidden" in path]
        return int(text[0].shape[1]) if text else 0


class RowForward(nn.Module):
    """A row as a module of which graphs are traced."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.network, self._row = row.network, row

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """As of `Row.run`."""
        return self._row.run(tensors)


class TracedKeeper(Keeper):
    """The interceptor of a row whose memory is tensors of a graph."""

    def __init__(
        self, cached: Cached, structure: Structure, memories: Mapping[Kept, Noted], active: TracedActive | None
    ) -> None:
        turns = {turn_of(kept, structure.model): memories[kept] for kept in structure.kept}
        of_use = {turn.use: memory for turn, memory in turns.items()}

        def lanes(turn: Any, rows: Any, some: Any, behind: bool) -> Noted:
            return of_use[turn.use].at(active, behind)

        super().__init__(cached.parts, cached.wiring, tuple(turns), [("cond", 0)], active, lanes)  # type: ignore[arg-type]
        cached.check(tuple(turns))

    def _add_keys(self, site: str, index: int, memory: Any) -> None:
        record, block = self.parts.entries[index].tokens, self.parts.module.get_submodule(self.parts.blocks[index].name)
        assert record is not None, "checked beforehand"
        there = [path for path in record.attention if getattr(block, path, None) is not None]
        if site == KEYS[0]:
            active = self.active if isinstance(self.active, TracedActive) else None
            made = traced_tokens.attending(there, memory, record, active)
        else:
            listens = not memory.use.reads
            made = traced_tokens.listening(there[0], memory, record, lambda: self._image) if listens else {}
        mine = self._keys.setdefault(index, {})
        mine |= {path: partial(both, mine[path], wrap) if path in mine else wrap for path, wrap in made.items()}


def _read(kept: Kept, tokens: bool) -> int:
    """Planes that come in."""
    if kept.site == "received":
        return 0
    if kept.gives:
        return kept.terms if kept.site != "kv" else 1
    return kept.made + 1 if tokens else kept.made


def _written(kept: Kept, tokens: bool) -> int:
    """Planes that go out."""
    if kept.gives:
        return int(kept.site == "kv")
    return kept.made + 1


def _outside(dtype: torch.dtype) -> torch.dtype:
    """In which dtype a graph takes what its network reads in this one."""
    return torch.float32 if dtype.is_floating_point else dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
