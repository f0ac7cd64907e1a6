"""The linear layers of a denoiser's blocks, and denoisers in which some of them are computed by a function.

Nothing is patched: the network stays as it is for everybody else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from vivace.engine.denoiser import Denoiser
from vivace.errors import ArgumentError, UnsupportedError
from vivace.models.dit import DiT
from vivace.models.pipelines.network import NetworkDenoiser
from vivace.models.pipelines.views import view
from vivace.models.quantized.native import layer_names
from vivace.models.quantized.stand_in import StandIns, block_names, replaced
from vivace.models.quantized.weights import QuantizedWeights

OUTSIDE = "outside the blocks' products: an embedding, modulation or final layer"
ASKED = "kept high as asked"


def denoiser_of(pipe: Any) -> Denoiser:
    """What sessions of a loaded model run, with the weights as they were loaded."""
    from vivace.models.class_denoiser import ClassDenoiser
    from vivace.models.pipe import Pipe

    if isinstance(pipe, Pipe):
        return cast("Denoiser", ClassDenoiser(pipe.model))
    return cast("Denoiser", pipe._denoiser(dict(pipe.networks)))


def in_8_bits(denoiser: Denoiser, weights: QuantizedWeights) -> Denoiser:
    """A denoiser like this one whose rows may name the precision of these weights, which are of its network."""
    made: Any = copy.copy(denoiser)
    made.stand_ins = StandIns(weights.to(denoiser.device))
    return cast("Denoiser", made)


def network_of(denoiser: Denoiser) -> Any:
    """The network of a denoiser. Raises UnsupportedError for one of several."""
    if len(denoiser.models) > 1:
        raise UnsupportedError(
            f"quantization: the model has several networks ({', '.join(denoiser.models)}); only models with one are "
            "calibrated in this release"
        )
    named: Any = denoiser
    return named.networks["main"] if isinstance(denoiser, NetworkDenoiser) else named.model.module


def with_linears(denoiser: Denoiser, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Denoiser:
    """A denoiser like this one, the linears of these names computed by functions of their input [..., K].

    Raises: UnsupportedError for layers that hooks hide.
    """
    network = network_of(denoiser)
    views = {name: view(network.get_submodule(name), __call__=call) for name, call in functions.items()}
    made: Any = copy.copy(denoiser)
    if isinstance(denoiser, NetworkDenoiser):
        made.networks = {**denoiser.networks, "main": replaced(network, views)}
    else:
        made.model = copy.copy(made.model)
        object.__setattr__(made.model, "module", replaced(network, views))  # of a frozen dataclass
    return cast("Denoiser", made)


def block_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers inside the blocks by name, in order; of the native DiT those that read tokens."""
    blocks = block_names(network)
    own = layer_names(len(blocks)) if isinstance(network, DiT) else None
    found = {}
    for name, module in network.named_modules():
        if type(module) is nn.Linear and any(name.startswith(f"{block}.") for block in blocks):
            if own is None or name in own:
                found[name] = module
    if not found:
        raise UnsupportedError(f"quantization: {type(network).__name__} has no linear layer in its blocks")
    return found


def other_linears(network: nn.Module) -> dict[str, str]:
    """Every other linear layer by name, and why it is not quantized."""
    inside = block_linears(network)
    names = (name for name, module in network.named_modules() if isinstance(module, nn.Linear))
    return {name: OUTSIDE for name in names if name not in inside}


def asked(names: Sequence[str], high: Sequence[str]) -> dict[str, str]:
    """Layers that the caller keeps high, by name or pattern. Raises ArgumentError for one that names none."""
    kept: dict[str, str] = {}
    for pattern in high:
        found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            raise ArgumentError(f"quantize: high {pattern!r} names no layer; layers are {', '.join(names[:4])}, ...")
        kept |= dict.fromkeys(found, ASKED)
    return kept
