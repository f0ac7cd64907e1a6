"""Networks under the precision rules of a row: stand-ins that share everything but the layers that run otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vivace.engine.plan import Rule, Variant
from vivace.engine.precision import QUANTIZED, BlockPrecision, named, precisions_of
from vivace.errors import ModelError, UnsupportedError
from vivace.models.dit import DiT
from vivace.models.pipelines.families import family_of
from vivace.models.pipelines.fused.build import adopt, rewritten, watched
from vivace.models.pipelines.fused.linears import standing
from vivace.models.pipelines.views import fork
from vivace.models.quantized import honoured
from vivace.models.quantized.layers import FLOATS, CastLinear, QuantizedLinear
from vivace.models.quantized.native import HALVES, PreciseDiT, layer_names, own_precisions
from vivace.models.quantized.weights import QuantizedWeights

Precisions = tuple[BlockPrecision, ...]


def stand_in(network: Any, precisions: Precisions, weights: QuantizedWeights | None) -> Any:
    """`network` with its blocks in these precisions; itself where nothing is said.

    Args:
        network: a native DiT, or a network of diffusers of a known family.
        precisions: (attention, MLP) of every block, see `engine.precision`; None: the model's own.
        weights: of this network, for blocks in "int8" or "fp8".
    Returns: a stand-in that shares parameters, buffers and all other modules; nothing of the network is changed. In a
        network of diffusers the linear layers of a block are replaced, nothing else: each reads and writes the model's
        dtype; those that the weights do not hold stay as they are.
    Raises: UnsupportedError for a precision without weights, and for layers that cannot be reached.
    """
    said = {name for pair in precisions for name in pair if name is not None}
    if not said:
        return network
    if missing := sorted(said - honoured(weights)):
        raise UnsupportedError(f"{missing[0]}: the model was loaded without {missing[0]} weights; load(quantized=...)")
    if isinstance(network, DiT):
        layers_in(network, precisions, weights)
        return PreciseDiT.standing_for(network, precisions, {} if weights is None else weights.layers)
    wanted = layers_in(network, precisions, weights)
    return replaced(network, {name: _twin(network.get_submodule(name), name, wanted, weights) for name in wanted})


def _twin(layer: nn.Linear, name: str, wanted: Mapping[str, str], weights: QuantizedWeights | None) -> Any:
    """The eager twin of a layer, behind a copy of it whose parameters may be looked at."""
    if wanted[name] in QUANTIZED and weights is not None:
        made: nn.Module = QuantizedLinear(name, weights.layers[name], layer.bias)
    else:
        made = CastLinear(layer, FLOATS[wanted[name]])
    return standing(layer, made.forward)


def block_names(network: Any) -> tuple[str, ...]:
    """Paths of a network's blocks, in the order in which rules count them. Raises UnsupportedError."""
    if isinstance(network, DiT):
        return tuple(f"blocks.{i}" for i in range(len(network.blocks)))
    return tuple(name for name, _ in family_of(network).names(network))


def place_of(name: str, blocks: Mapping[str, int]) -> tuple[int, int] | None:
    """(block, half) of the layer of that name, half 0 for the attention and 1 for the rest; None outside the blocks."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        index = blocks.get(".".join(parts[:count]))
        if index is not None and count < len(parts):
            rest = parts[count:]
            attention = rest[0] in HALVES[0] or any("attn" in part or part == "attention" for part in rest)
            return index, 0 if attention else 1
    return None


def layers_in(network: Any, precisions: Precisions, weights: QuantizedWeights | None) -> dict[str, str]:
    """Precision of every linear layer that runs otherwise than the model does, by name."""
    names = block_names(network)
    if len(names) != len(precisions):
        raise ModelError(f"{type(network).__name__}: has {len(names)} blocks, the row speaks of {len(precisions)}")
    own = [own_precisions(pair, network.dtype) for pair in precisions]
    blocks = {name: index for index, name in enumerate(names)}
    found = {}
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or (place := place_of(name, blocks)) is None:
            continue
        precision = own[place[0]][place[1]]
        held = weights is not None and name in weights.layers
        if precision is not None and (held or precision not in QUANTIZED):
            found[name] = precision
    check_held([name for pair in precisions for name in pair], list(found.values()))
    return found


def check_held(said: Sequence[str | None], found: Sequence[str]) -> None:
    """Raise UnsupportedError where a row names a quantized precision and no layer runs in it."""
    if any(name in QUANTIZED for name in said) and not any(name in QUANTIZED for name in found):
        raise UnsupportedError("the weights hold no linear of the blocks that the row names; quantize these too")


def replaced(module: Any, others: Mapping[str, Any], path: str = "") -> Any:
    """A stand-in of `module`, other modules at these paths. Raises UnsupportedError for those that hooks hide."""
    heads: dict[str, dict[str, Any]] = {}
    for name, made in others.items():
        head, _, rest = name.partition(".")
        heads.setdefault(head, {})[rest] = made
    for name in heads:
        child = module._modules[name]
        if (reason := rewritten(child) or (watched(child) if "" in heads[name] else None)) is not None:
            where = f"{path}.{name}".lstrip(".")
            raise UnsupportedError(f"{where}: it cannot run in another precision: {reason}; undo that, or leave it out")
    children = {
        name: parts[""] if "" in parts else replaced(module._modules[name], parts, f"{path}.{name}".lstrip("."))
        for name, parts in heads.items()
    }
    return adopt(fork(module, **children), module)


class StandIns:
    """Stand-ins of a denoiser's networks by what a row says, made when first needed. weights: of its only network."""

    def __init__(self, weights: QuantizedWeights | None = None) -> None:
        self.weights = weights
        self._made: dict[tuple[int, Precisions], tuple[Any, Any]] = {}
        self._found: dict[tuple[int, tuple[Rule, ...]], tuple[Any, Any]] = {}  # by the rules of a row

    @property
    def precisions(self) -> frozenset[str]:
        """In which blocks run, where a row names precisions."""
        return honoured(self.weights)

    @property
    def digest(self) -> str:
        """Of the weights, "" without."""
        return "" if self.weights is None else self.weights.digest

    def of(self, network: Any, variant: Variant) -> Any:
        """What runs a row of that variant: the network, or its stand-in. Raises UnsupportedError."""
        if not variant.rules:
            return network
        key = id(network), variant.rules
        if key not in self._found:
            said = bool(named(variant))
            made = self.kept(network, precisions_of(variant, len(block_names(network)))) if said else network
            self._found[key] = network, made
        return self._found[key][1]

    def kept(self, network: Any, precisions: Precisions) -> Any:
        """`make`, called once."""
        key = id(network), precisions
        if key not in self._made:
            self._made[key] = network, self.make(network, precisions)
        return self._made[key][1]

    def make(self, network: Any, precisions: Precisions) -> Any:
        """A stand-in; see `stand_in`."""
        return stand_in(network, precisions, self.weights)

    def group_of(self, variant: Variant) -> Callable[[float], int] | None:
        """The timestep group of a row's activation scales; None: a row of that variant reads none."""
        weights = self.weights
        reads = weights is not None and weights.static and weights.format in named(variant)
        return weights.group_of if reads and weights is not None else None

    def tensors(self) -> list[Tensor]:
        """Those of the quantized weights."""
        layers = () if self.weights is None else self.weights.layers.values()
        return [tensor for layer in layers for tensor in layer.tensors.values()]


def check_layers(network: Any, weights: QuantizedWeights, where: str) -> None:
    """Raise ModelError unless every layer is a linear layer in a block of the network, of the same shape."""
    blocks = {name: index for index, name in enumerate(block_names(network))}
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in weights.layers.items():
        if name not in linears or (isinstance(network, DiT) and name not in layer_names(len(blocks))):
            raise ModelError(f"{where}: {name!r} is no linear layer that {type(network).__name__} runs in 8 bits")
        if place_of(name, blocks) is None:
            raise ModelError(f"{where}: {name!r} lies outside the blocks, where no rule of a plan reaches it")
        if layer.weight.shape != linears[name].weight.shape:
            got, need = tuple(layer.weight.shape), tuple(linears[name].weight.shape)
            raise ModelError(f"{where}: {name} has shape {got}, the model's {need}; the weights are of another model")
