"""Networks of diffusers compiled for the CPU: a DiT as the native one, others with our ops and packed linears."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vivace.engine.compiled import Bucket, Compiler, Evaluation
from vivace.engine.denoiser import Replayable
from vivace.engine.kept import Seen
from vivace.engine.plan import Variant
from vivace.engine.precision import named, spelled
from vivace.errors import ModelError, PromptError, UnsupportedError
from vivace.kernels.spec import CPU, missing
from vivace.models.compiled.native import DTYPES, native_compiler
from vivace.models.compiled.replay import DitReplay
from vivace.models.dit import DiT
from vivace.models.dit_config import DiTConfig
from vivace.models.dit_files import parameters_of
from vivace.models.pipelines.conditions import Condition, Row
from vivace.models.pipelines.fused import FusedReport, Given, Replaced, fuse, linears
from vivace.models.pipelines.fused.build import rewritten, watched
from vivace.models.quantized.layers import FLOATS
from vivace.models.quantized.native import as_native
from vivace.models.quantized.products import Int8Products
from vivace.models.quantized.stand_in import Precisions, StandIns, layers_in
from vivace.models.quantized.weights import QuantizedWeights

if TYPE_CHECKING:
    from vivace.models.pipelines.network import Manner, NetworkDenoiser

NATIVE = "DiTTransformer2DModel"
MOST_ROWS = 1024  # tokens that int8 products are measured with


def foreign_compiler(denoiser: NetworkDenoiser) -> Compiler | Replayable:
    """The compiler of a pipeline's networks for their device. Raises UnsupportedError with the reason."""
    model, weights = native_of(denoiser), denoiser.stand_ins.weights
    if model is not None and weights is not None:
        weights = as_native(weights, model.config)
        model = None if weights is None else model  # one that the native layers cannot hold runs as it is
    fed, sign = partial(_fed, denoiser.manner), denoiser.manner.sign
    given = {} if model is None or weights is None else {"quantized": weights}
    if denoiser.device.type == "cuda":
        return denoiser.replayable() if model is None else DitReplay(model, label_of, fed, sign, **given)
    if model is not None:
        return native_compiler(model, denoiser.spec, label_of, fed, sign, **given)
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


class FusedStandIns(StandIns):
    """Stand-ins with our ops, packed linears and int8 layers inside, by what a row says. The packs are shared.

    networks: by the name in a plan's `model` column; rows: tokens that int8 products are measured with.
    """

    def __init__(self, networks: Mapping[str, Any], weights: QuantizedWeights | None, rows: int) -> None:
        super().__init__(weights)
        self._names = {id(network): name for name, network in networks.items()}
        self.products = Int8Products(rows)
        self.reports: dict[str, FusedReport] = {}
        self._packs: dict[int, Any] = {}
        self._cast: dict[tuple[int, torch.dtype], Any] = {}
        self._quantized: dict[str, Any] = {}

    def of(self, network: Any, variant: Variant) -> Any:
        """What runs a row of that variant. Raises UnsupportedError."""
        if named(variant):
            return super().of(network, variant)
        return self.kept(network, ())

    def make(self, network: Any, precisions: Precisions) -> Any:
        """A stand-in of the network; of precisions () in its own."""
        said = sorted({name for pair in precisions for name in pair if name is not None})
        for name in said:
            if name not in self.precisions:
                raise UnsupportedError(f"{name}: the model was loaded without {name} weights; load(quantized=...)")
            if name == "fp8":
                raise UnsupportedError("fp8 has kernels on CUDA only")
        wanted = layers_in(network, precisions, self.weights) if said else {}
        layers = {name: self._layer(network, name, precision) for name, precision in wanted.items()}
        counts = Counter(wanted.values())
        told = tuple(Replaced(f"{name} linear", counts[name], "cpu", self._why(name)) for name in sorted(counts))
        made, report = fuse(network, pack=True, given=Given(layers, told, self._packs))
        label = " in ".join(filter(None, (self._names[id(network)], "+".join(said))))
        count = sum(key.split(" (")[0] == label for key in self.reports)  # the same precisions, of other blocks
        self.reports[f"{label} ({count + 1})" if count else label] = report
        return made

    def _layer(self, network: Any, name: str, precision: str) -> Any:
        """The layer in another precision than the model's, made once."""
        layer = network.get_submodule(name)
        if (reason := rewritten(layer) or watched(layer)) is not None:
            raise UnsupportedError(f"{name}: it cannot run in {precision}: {reason}; undo that, or leave it out")
        if precision in FLOATS:
            key = id(layer), FLOATS[precision]
            if key not in self._cast:
                self._cast[key] = linears.packed_as(layer, FLOATS[precision])
            return self._cast[key]
        if name not in self._quantized and self.weights is not None:
            made = self.products.layer(name, self.weights.layers[name], layer.bias, network.dtype)
            self._quantized[name] = linears.standing(layer, made.forward)
        return self._quantized[name]

    def _why(self, precision: str) -> str:
        return "asked for by the plan" if precision in FLOATS else "by shape, see products"


class FusedCompiler:
    """Stand-ins of the networks with our ops and packed linears inside; nothing leaves the loop.

    The packed weights are copies of what the networks hold when a row first needs them.
    """

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        self.denoiser = copy.copy(denoiser)
        rows = min(denoiser.spec.tokens(), MOST_ROWS)
        self.stand_ins = FusedStandIns(denoiser.networks, denoiser.stand_ins.weights, rows)
        self.denoiser.stand_ins = self.stand_ins

    @property
    def precisions(self) -> frozenset[str]:
        """In which rows run, where a plan names precisions."""
        return self.stand_ins.precisions

    @property
    def sites(self) -> frozenset[str]:
        """Of which rows keep and give again."""
        return self.denoiser.sites

    @property
    def metrics(self) -> frozenset[str]:
        """Of guards that networks can look at."""
        return self.denoiser.metrics

    def why_not(self, variant: Variant) -> str | None:
        """Why a variant cannot be compiled; None when it can. Whatever needs more than whole forwards was refused."""
        return self.denoiser.why_not(variant)

    def compile(self, variant: Variant, bucket: Bucket, shape: Sequence[int]) -> FusedNetwork:
        """The network of a variant, for every bucket."""
        self.stand_ins.of(self.denoiser.networks[variant.model], variant)
        inside = f" (rows in {spelled(variant)})" if named(variant) else ""
        return FusedNetwork(self.denoiser, variant, f"torch, with our ops and packed linears inside{inside}")

    def hoist(self, timesteps: Sequence[float], branches: Sequence[str], condition: Any) -> None:
        """Nothing: what these networks compute of timestep and prompt is theirs."""

    def report(self) -> dict[str, Any]:
        """What was replaced in each network, and what was left and why; what runs int8 products, by shape."""
        made = {name: report.to_dict() for name, report in self.stand_ins.reports.items()}
        products = self.stand_ins.products.report()
        return made | ({"products": products} if products else {})


class FusedNetwork:
    """A variant of stand-ins."""

    def __init__(self, denoiser: NetworkDenoiser, variant: Variant, how: str) -> None:
        self.denoiser, self.variant, self.how = denoiser, variant, how

    def run(self, call: Evaluation) -> tuple[Tensor, ...]:
        """One prediction [n, ...] per branch."""
        x = call.x[list(call.lanes)]
        args = x, call.timesteps, call.conditions, self.variant, call.turns, call.resume, call.focus
        return self.denoiser.evaluate(*args, call.merging)

    def look(self, call: Evaluation, metric: str, params: Sequence[float]) -> Seen:
        """The first blocks alone, as far as a guard's metric needs them."""
        x = call.x[list(call.lanes)]
        return self.denoiser.look(x, call.timesteps, call.conditions, self.variant, metric, params)
