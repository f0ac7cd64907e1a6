"""A network of diffusers behind the engine's `Denoiser`: how it is called, and its forward taken apart for replay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.engine.compiled import Compiler, Evaluation
from vivace.engine.denoiser import Piece, Replayable, predictions, samples_of
from vivace.engine.kept import Seen, Turn, split
from vivace.engine.merging import Merging
from vivace.engine.perturbed import SITE as IDENTITY
from vivace.engine.perturbed import parted, perturbs
from vivace.engine.plan import Variant
from vivace.engine.tokens import Focus
from vivace.errors import ShapeError, UnsupportedError
from vivace.models.caching.bound import ForeignLayouts, Runs
from vivace.models.caching.foreign import Cached
from vivace.models.caching.foreign_looks import Look, check_metric, metrics_of, resumed, states_of
from vivace.models.caching.looks import going_on
from vivace.models.perturbed import perturbed_network, why_not
from vivace.models.pipelines.capture import argument_names
from vivace.models.pipelines.conditions import Condition, Inputs, fill, hollow, parts
from vivace.models.pipelines.embedded import fed, taken
from vivace.models.quantized.layers import forward_at
from vivace.models.quantized.stand_in import StandIns
from vivace.models.versions import held

GROUP = "timestep group"  # input of a piece whose layers have activation scales by time

Rows = Sequence[tuple[str, int]]  # of a forward: branch and position of the sample
Runner = Callable[[Any, Rows], Callable[..., Any]]  # (network, rows of a forward) -> what runs them


@dataclass(frozen=True, slots=True)
class Manner:
    """How a network is called: argument names, fed time = t / divisor + offset in `dtype`, prediction = sign * output.

    order: branches in the order of their rows or calls; column: the time argument has one value per token.
    """

    latent: str
    time: str
    divisor: float = 1.0
    offset: float = 0.0
    dtype: torch.dtype = torch.float32
    sign: float = 1.0
    order: tuple[str, ...] = ("cond", "uncond")
    column: int = 0

    def times(self, timesteps: Sequence[float], device: torch.device | str = "cpu") -> Tensor:
        """What the network is fed at `timesteps` of a plan, [n]."""
        return self.fed(torch.tensor(timesteps, dtype=self.dtype, device=device))

    def fed(self, t: Tensor) -> Tensor:
        """The same of timesteps in `dtype`."""
        fed = t if self.divisor == 1.0 else t / self.divisor
        return fed if self.offset == 0.0 else fed + self.offset

    def spread(self, times: Tensor) -> Tensor:
        """The time argument from [n]: as it is, or [n, tokens]."""
        return times[:, None].expand(-1, self.column) if self.column else times


class NetworkDenoiser:
    """What both kinds share: predictions of a network from recorded arguments.

    networks: by the name in a plan's `model` column, "main" first; stand_ins: what runs a row that names precisions.
    """

    def __init__(self, networks: Mapping[str, Any], spec: ModelSpec, manner: Manner, device: torch.device) -> None:
        self.networks, self.spec, self.manner = dict(networks), spec, manner
        self.stand_ins = StandIns()
        self.models = tuple(self.networks)
        self.device, self.dtype = device, next(iter(networks.values())).dtype
        self._parts: dict[int, Cached] = {}
        self._layouts = ForeignLayouts()
        self.sites, self.metrics = self._offers()
        self._options = {} if "return_dict" not in argument_names(networks["main"]) else {"return_dict": False}

    def evaluate(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Condition],
        variant: Variant,
        turns: Sequence[Turn] = (),
        resume: Seen | None = None,
        focus: Focus | None = None,
        merging: Merging | None = None,
    ) -> tuple[Tensor, ...]:
        """One prediction [n, ...] per branch; samples and branches with arguments of equal shapes share a forward.

        turns: what is kept and what is given again; branches that do not the same with the caches run apart. focus:
        image tokens of the samples that are computed, None: all; pixels of others mean nothing. merging: what blocks
        merge, None: nothing; where branches have arguments of other shapes, "cond", whose maps all use, runs first.
        """
        found: dict[str, Tensor] = {}
        if perturbs(variant):
            for part, blocks in parted(variant):
                own = partial(self._perturbed, blocks=blocks) if blocks else None
                found |= zip(part.branches, self.run_with(x, timesteps, conditions, part, own), strict=True)
            return tuple(found[branch] for branch in variant.branches)
        parts = split(variant.branches, turns)
        if merging is not None and len({c.branch(b).signature for c in conditions for b in variant.branches}) > 1:
            parts = [((branch,), mine) for branches, mine in parts for branch in branches]
        for branches, mine in parts:
            seen = going_on(resume, mine)
            plain = not mine and seen is None and focus is None and merging is None
            given = {"turns": mine, "seen": seen, "focus": focus, "merging": merging}
            runner = None if plain else partial(self._cached, **given)
            outs = self.run_with(x, timesteps, conditions, replace(variant, branches=branches), runner)
            found |= zip(branches, outs, strict=True)
        return tuple(found[branch] for branch in variant.branches)

    def why_not_kept(self, site: str, blocks: tuple[int, int]) -> str | None:
        """Why a site of `sites` cannot be kept or given again in these blocks; None when it can."""
        if site == IDENTITY:
            asked = (why_not(self.cached(network), range(*blocks)) for network in self.networks.values())
            return next((reason for reason in asked if reason is not None), None)
        found = (self.cached(network).lacks(site, blocks) for network in self.networks.values())
        return next((reason for reason in found if reason is not None), None)

    def look(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Condition],
        variant: Variant,
        metric: str,
        params: Sequence[float],
    ) -> Seen:
        """The first blocks alone, as far as a guard's metric needs them. Raises UnsupportedError for another metric."""
        looks: list[tuple[Rows, Look]] = []

        def runner(network: Any, rows: Rows) -> Callable[..., Any]:
            cached = self.cached(network)
            check_metric(cached, metric)
            looks.append((rows, Look(cached, rows, metric, params)))
            return partial(cached.parts.forward, looks[-1][1])

        self.run_with(x, timesteps, conditions, variant, runner)
        signals: dict[tuple[str, int], Tensor] = {}
        states: list[dict[str, dict[int, Tensor]]] = [{} for _ in range(len(x))]
        for rows, look in looks:
            assert look.signal is not None, "a look measures"
            signals |= zip(rows, look.signal, strict=True)
            states_of(look.held, rows, states)
        by_branch = [torch.stack([signals[branch, n] for n in range(len(x))]) for branch in variant.branches]
        samples = tuple(range(len(x)))
        return Seen(torch.stack(by_branch), variant.branches, looks[0][1].block, states, samples)

    def run_with(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        conditions: Sequence[Condition],
        variant: Variant,
        runner: Runner | None,
    ) -> tuple[Tensor, ...]:
        """Predictions by branch of forwards by `runner`, the networks themselves without one."""
        lanes = tuple(range(len(x)))
        call = Evaluation(x, lanes, lanes, tuple(timesteps), tuple(conditions), (None,) * len(lanes))
        # what a module keeps of a forward stays an ordinary tensor
        with torch.inference_mode(False), torch.no_grad(), forward_at(timesteps):
            pieces = self.stage(call, variant, runner=runner)
            results = [piece.forward(self._joined(piece.inputs)) for piece in pieces]
            return predictions(pieces, results, len(variant.branches), len(lanes))

    def _cached(
        self,
        network: Any,
        rows: Rows,
        turns: Sequence[Turn],
        seen: Seen | None,
        focus: Focus | None,
        merging: Merging | None,
    ) -> Callable[..., Any]:
        """A forward that keeps and gives what its turns say, from where a look ended; of `focus` alone, or merging."""
        cached = self.cached(network)
        keeper = cached.keeper(turns, rows, focus, merging)
        if seen is not None:
            resumed(keeper, [seen.states[sample] for sample in seen.samples], seen.block, rows)
        return partial(cached.run, keeper)

    def _perturbed(self, network: Any, rows: Rows, blocks: Collection[int]) -> Callable[..., Any]:
        """A forward with the identity for the attention maps of some blocks."""
        forward: Callable[..., Any] = perturbed_network(self.cached(network), blocks)
        return forward

    @property
    def identity(self) -> bool:
        """Attention maps can be replaced, where blocks can be reached."""
        return bool(self.sites)

    @property
    def takes(self) -> frozenset[str]:
        """Further numbers that the networks are fed: the embedded scale of guidance-distilled ones."""
        return taken(self.networks)

    def feed(self, condition: Condition, numbers: Mapping[str, float]) -> Condition:
        """A condition with these numbers."""
        return fed(condition, numbers, self.networks)

    def cached(self, network: Any) -> Cached:
        """What caches need of a network or of a stand-in of one."""
        if id(network) not in self._parts or self._parts[id(network)].parts.module is not network:
            self._parts[id(network)] = Cached(network)
        return self._parts[id(network)]

    def compiler(self) -> Compiler | Replayable:
        """Itself on CUDA, where graphs replay it. Raises UnsupportedError with the reason."""
        from vivace.models.compiled.foreign import foreign_compiler

        return foreign_compiler(self)

    def _offers(self) -> tuple[frozenset[str], frozenset[str]]:
        """Sites that rows can keep, and metrics of looks, in every network; none where blocks cannot be reached."""
        try:
            found = [self.cached(network) for network in self.networks.values()]
        except UnsupportedError:  # of no known family, or compiled: whole forwards run all the same
            return frozenset(), frozenset()
        sites, metrics = [each.sites for each in found], [metrics_of(each) for each in found]
        return frozenset.intersection(*sites), frozenset.intersection(*metrics)

    def replayable(self) -> NetworkDenoiser:
        """The same for graphs, of which no row goes on from a look or merges tokens."""
        made = copy.copy(self)
        made.sites, made.metrics = self.sites - {"merge"}, frozenset()
        made._layouts = ForeignLayouts()
        return made

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        return self.stand_ins.precisions

    @property
    def digest(self) -> str:
        """Of the quantized weights, "" without."""
        return self.stand_ins.digest

    def why_not(self, variant: Variant) -> str | None:
        """Why a variant cannot be staged; None when it can."""
        if variant.model not in self.networks:
            return f"there is no network {variant.model!r}"
        try:
            self.stand_ins.of(self.networks[variant.model], variant)
            speaks = any(rule.action is not None for rule in variant.rules)
            return self.cached(self.networks[variant.model]).why_not(variant) if speaks else None
        except UnsupportedError as error:
            return str(error)

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Condition) -> None:
        """Nothing: what a network of diffusers does with its conditions happens in its forward."""

    def weights(self) -> list[Tensor]:
        """Parameters and buffers of the networks, and quantized weights."""
        own = [tensor for network in self.networks.values() for tensor in held(network)]
        return own + self.stand_ins.tensors()

    def report(self) -> dict[str, Any]:
        """Which classes run."""
        return {"networks": [type(network).__name__ for network in self.networks.values()]}

    def stage(
        self,
        call: Evaluation,
        variant: Variant,
        bucket: Callable[[int], int] = int,
        runner: Runner | None = None,
    ) -> tuple[Piece, ...]:
        """One piece for the rows (sample and branch) whose arguments have equal shapes, filled up to its bucket.

        Where layers have activation scales by time, also one for each group of timesteps. runner: makes what runs a
        forward, where it is not the network itself.
        """
        if variant.model not in self.networks:
            raise UnsupportedError(f"denoiser: no network {variant.model!r}; there are {', '.join(self.networks)}")
        count = len(call.lanes)
        wanted = [(n, branch) for branch in variant.branches for n in range(count)]
        inputs = [call.conditions[n].branch(branch) for n, branch in wanted]
        network, group_of = self.stand_ins.of(self.networks[variant.model], variant), self.stand_ins.group_of(variant)
        groups: dict[Any, list[int]] = {}
        for position, row in enumerate(inputs):
            group = None if group_of is None else group_of(call.timesteps[position % count])
            groups.setdefault((row.signature, group), []).append(position)
        pieces = []
        for (signature, group), positions in groups.items():
            size = bucket(len(positions))
            filled = positions + positions[-1:] * (size - len(positions))
            lanes = [call.lanes[position % count] for position in filled]
            tensors = parts([inputs[position] for position in filled])
            tensors[self.manner.latent] = samples_of(call.x, lanes)
            times = self.manner.times([call.timesteps[position % count] for position in filled])
            tensors[self.manner.time] = (_sendable(times, call.x.device),)
            if group is not None:
                tensors[GROUP] = (_sendable(torch.tensor([group]), call.x.device),)
            key = (variant.model, id(network), size, tuple(call.x.shape[1:]), call.x.dtype, signature)
            rows = [(branch, n) for n, branch in (wanted[position] for position in filled)]
            places, like = (*positions, *[-1] * (size - len(positions))), inputs[positions[0]]
            run = network if runner is None else runner(network, rows)
            piece = Piece(key, tensors, self._forward(_by(run), like, network), places)
            pieces.append(
                self._kept(call, network, piece, rows, like) if call.turns or call.focus is not None else piece
            )
        return tuple(pieces)

    def _kept(self, call: Evaluation, network: Any, piece: Piece, rows: Rows, like: Inputs) -> Piece:
        """A piece with what its rows keep and give again."""

        def try_out(runs: Runs) -> None:
            self._forward(runs, like, network)(self._joined(piece.inputs))

        cached, filled = self.cached(network), [place < 0 for place in piece.places]
        laid, runs = self._layouts.of(cached, call, rows, filled, piece.key, try_out)
        return replace(
            piece,
            key=(piece.key, laid.key),
            inputs={**piece.inputs, **laid.inputs},
            forward=self._forward(runs, like, network),
            idle=laid.idle,
            stands=laid.stands,
        )

    def _joined(self, inputs: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """The inputs of a piece as tensors of their own on the device."""
        return {name: torch.cat(values).to(self.device) for name, values in inputs.items()}

    def _forward(self, runs: Runs, row: Inputs, network: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Predictions [rows, ...] from the tensors of a batch whose other arguments are those of `row`.

        runs: makes of the tensors what runs the forward.
        """
        manner, tree, options = self.manner, hollow(row), self._options

        def forward(tensors: Mapping[str, Tensor]) -> Tensor:
            latent, times = tensors[manner.latent], manner.spread(tensors[manner.time])
            with torch.inference_mode(False), torch.no_grad(), forward_at(groups=tensors.get(GROUP)):
                out = runs(tensors)(**fill(tree, tensors), **{manner.latent: latent, manner.time: times}, **options)
                return _prediction(out, latent, type(network).__name__, manner.sign)

        return forward


def _by(run: Callable[..., Any]) -> Runs:
    """Runs every forward by the same."""
    return lambda _: run


def _sendable(numbers: Tensor, device: torch.device) -> Tensor:
    """Host numbers that a device can fetch without anybody waiting."""
    return numbers.pin_memory() if device.type == "cuda" else numbers


def _prediction(out: Any, latent: Tensor, name: str, sign: float) -> Tensor:
    """What a network returned as predictions of the latents' shape, learned variances left out. Raises ShapeError."""
    out = out if isinstance(out, Tensor) else out[0]
    axis = next(
        (i for i in range(1, latent.dim()) if out.dim() == latent.dim() and out.shape[i] > latent.shape[i]), None
    )
    if axis is not None:
        out = out.narrow(axis, 0, latent.shape[axis])
    if out.shape != latent.shape:
        raise ShapeError(
            f"{name}: predicts {tuple(out.shape)} for latents {tuple(latent.shape)}; a session needs a prediction of "
            "the latents' shape"
        )
    return out if sign == 1.0 else out * sign
