"""A network of diffusers behind the engine's `Denoiser`: how it is called, and its forward taken apart for replay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.engine.bind import ModelSpec
from vivace.engine.compiled import Compiler, Evaluation
from vivace.engine.denoiser import Piece, Replayable, predictions, samples_of
from vivace.engine.plan import Variant
from vivace.errors import ShapeError, UnsupportedError
from vivace.models.pipelines.capture import argument_names
from vivace.models.pipelines.conditions import Condition, Inputs, fill, hollow, parts
from vivace.models.quantized.layers import forward_at
from vivace.models.quantized.stand_in import StandIns
from vivace.models.versions import held

GROUP = "timestep group"  # input of a piece whose layers have activation scales by time


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
        t = torch.tensor(timesteps, dtype=self.dtype, device=device)
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
        self._options = {} if "return_dict" not in argument_names(networks["main"]) else {"return_dict": False}

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Condition], variant: Variant
    ) -> tuple[Tensor, ...]:
        """One prediction [n, ...] per branch; samples and branches with arguments of equal shapes share a forward."""
        lanes = tuple(range(len(x)))
        call = Evaluation(x, lanes, lanes, tuple(timesteps), tuple(conditions), (None,) * len(lanes))
        # what a module keeps of a forward stays an ordinary tensor
        with torch.inference_mode(False), torch.no_grad(), forward_at(timesteps):
            pieces = self.stage(call, variant)
            results = [piece.forward(self._joined(piece.inputs)) for piece in pieces]
            return predictions(pieces, results, len(variant.branches), len(lanes))

    def compiler(self) -> Compiler | Replayable:
        """Itself on CUDA, where graphs replay it. Raises UnsupportedError with the reason."""
        from vivace.models.compiled.foreign import foreign_compiler

        return foreign_compiler(self)

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
        except UnsupportedError as error:
            return str(error)
        return None

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Condition) -> None:
        """Nothing: what a network of diffusers does with its conditions happens in its forward."""

    def weights(self) -> list[Tensor]:
        """Parameters and buffers of the networks, and quantized weights."""
        own = [tensor for network in self.networks.values() for tensor in held(network)]
        return own + self.stand_ins.tensors()

    def report(self) -> dict[str, Any]:
        """Which classes run."""
        return {"networks": [type(network).__name__ for network in self.networks.values()]}

    def stage(self, call: Evaluation, variant: Variant, bucket: Callable[[int], int] = int) -> tuple[Piece, ...]:
        """One piece for the rows (sample and branch) whose arguments have equal shapes, filled up to its bucket.

        Where layers have activation scales by time, also one for each group of timesteps.
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
            forward = self._forward(network, inputs[positions[0]])
            pieces.append(Piece(key, tensors, forward, (*positions, *[-1] * (size - len(positions)))))
        return tuple(pieces)

    def _joined(self, inputs: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """The inputs of a piece as tensors of their own on the device."""
        return {name: torch.cat(values).to(self.device) for name, values in inputs.items()}

    def _forward(self, network: Any, row: Inputs) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Predictions [rows, ...] from the tensors of a batch whose other arguments are those of `row`."""
        manner, tree, options = self.manner, hollow(row), self._options

        def forward(tensors: Mapping[str, Tensor]) -> Tensor:
            latent, times = tensors[manner.latent], manner.spread(tensors[manner.time])
            with torch.inference_mode(False), torch.no_grad(), forward_at(groups=tensors.get(GROUP)):
                out = network(**fill(tree, tensors), **{manner.latent: latent, manner.time: times}, **options)
                return _prediction(out, latent, type(network).__name__, manner.sign)

        return forward


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
