"""Networks of diffusers compiled for the CPU: a DiT as the native one, others with our ops and packed linears."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vivace.engine.compiled import Bucket, Compiler, Evaluation
from vivace.engine.denoiser import Replayable
from vivace.engine.plan import Variant
from vivace.errors import ModelError, PromptError, UnsupportedError
from vivace.kernels.spec import CPU, missing
from vivace.models.compiled.native import DTYPES, native_compiler
from vivace.models.compiled.replay import DitReplay
from vivace.models.dit import DiT
from vivace.models.dit_config import DiTConfig
from vivace.models.dit_files import parameters_of
from vivace.models.pipelines.conditions import Condition, Row
from vivace.models.pipelines.fused import fuse
from vivace.models.pipelines.fused.build import rewritten, watched

if TYPE_CHECKING:
    from vivace.models.pipelines.network import Manner, NetworkDenoiser

NATIVE = "DiTTransformer2DModel"


def foreign_compiler(denoiser: NetworkDenoiser) -> Compiler | Replayable:
    """The compiler of a pipeline's networks for their device. Raises UnsupportedError with the reason."""
    model = native_of(denoiser)
    fed, sign = partial(_fed, denoiser.manner), denoiser.manner.sign
    if denoiser.device.type == "cuda":
        return denoiser if model is None else DitReplay(model, label_of, fed, sign)
    if model is not None:
        return native_compiler(model, denoiser.spec, label_of, fed, sign)
    if denoiser.dtype not in DTYPES:
        name = str(denoiser.dtype).removeprefix("torch.")
        raise UnsupportedError(f"the model is {name}; {' and '.join(DTYPES.values())} are compiled")
    if (reason := missing(CPU)) is not None:
        raise UnsupportedError(reason)
    return FusedCompiler(denoiser)


def native_of(denoiser: NetworkDenoiser) -> DiT | None:
    """A diffusers DiT as the native one, weights shared where they can be; None for others and where it was changed."""
    network = denoiser.networks["main"]
    if type(network).__name__ != NATIVE or len(denoiser.networks) > 1:
        return None
    if any(watched(module) or rewritten(module) for module in network.modules()):
        return None
    try:
        config = DiTConfig.from_dict({k: v for k, v in network.config.items() if not k.startswith("_")})
        return DiT.of(config, parameters_of(config, network.state_dict(), denoiser.dtype, NATIVE))
    except ModelError:
        return None


def _fed(manner: Manner, timesteps: Sequence[float]) -> list[float]:
    """What the network is fed at timesteps of a plan."""
    times: list[float] = manner.times(timesteps).tolist()
    return times


def label_of(condition: Condition, branch: str) -> int:
    """The class id that a recorded condition hands to the network. Raises PromptError where it hands none."""
    label = condition.branch(branch).tree.get("class_labels")
    if label is None:
        raise PromptError(f"prompt: branch {branch!r} has no class_labels, which {NATIVE} needs; give class_labels")
    return int(label.value if isinstance(label, Row) else label)


class FusedCompiler:
    """Stand-ins of the networks with our ops and packed linears inside; nothing leaves the loop.

    The packed weights are copies of what the networks hold now.
    """

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        self.denoiser = copy.copy(denoiser)
        self._fused = {name: fuse(network, pack=True) for name, network in denoiser.networks.items()}
        self.denoiser.networks = {name: stand_in for name, (stand_in, _) in self._fused.items()}

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        return frozenset()

    def why_not(self, variant: Variant) -> str | None:
        return None  # whatever needs more than whole forwards was refused before

    def compile(self, variant: Variant, bucket: Bucket, shape: Sequence[int]) -> FusedNetwork:
        return FusedNetwork(self.denoiser, variant, "torch, with our ops and packed linears inside")

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> None:
        """Nothing: what these networks compute of timestep and prompt is theirs."""

    def report(self) -> dict[str, Any]:
        """What was replaced in each network, and what was left and why."""
        return {name: report.to_dict() for name, (_, report) in self._fused.items()}


class FusedNetwork:
    """A variant of stand-ins."""

    def __init__(self, denoiser: NetworkDenoiser, variant: Variant, how: str) -> None:
        self.denoiser, self.variant, self.how = denoiser, variant, how

    def run(self, call: Evaluation) -> tuple[Tensor, ...]:
        """One prediction [n, ...] per branch."""
        return self.denoiser.evaluate(call.x[list(call.lanes)], call.timesteps, call.conditions, self.variant)
