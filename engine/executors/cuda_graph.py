"""The compiled executor of GPUs: every forward is a CUDA graph, replayed with a row's numbers; then the solver step.

A model hands out its evaluations in pieces (`engine.denoiser.Piece`). A piece's key names one artefact: static inputs
and the graph of its forward on them. A row copies its numbers into the inputs and replays. Nothing in a row waits for
the device: samples, conditions and hoisted tables are on it, timesteps come from pinned memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.engine.compiled import Evaluation, Hoisted
from vivace.engine.denoiser import Denoiser, Piece, Replayable, predictions, samples_of
from vivace.engine.executors import Group
from vivace.engine.executors.eager import check_compiled, looked
from vivace.engine.executors.graphs import CudaGraphs, Graph, Graphs, Unrecorded
from vivace.engine.executors.hoists import Kept
from vivace.engine.executors.rehearsal import rehearsed
from vivace.engine.executors.steps import by_branches, evaluation, run_rows, step_kernels
from vivace.engine.kept import KeptMemory, Seen
from vivace.engine.perturbed import APART, perturbs, run_parted
from vivace.engine.plan import Plan, Variant
from vivace.engine.pool import Pool
from vivace.engine.receipt import KernelUse, Timeline
from vivace.errors import PromptError, ShapeError, UnsupportedError

RESUMED = "rows that go on from a guard's look are not captured"
FOCUSED = "rows that compute some tokens are not captured"
MERGED = "rows that merge tokens are not captured"


def bucket(count: int) -> int:
    """Samples a forward is captured for: the next power of two."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True, slots=True, eq=False)
class Artefact:
    """One captured piece. inputs: its static tensors; reason: why it is not a graph, empty when it is one.

    weights: what it reads besides, held so that a model that moves on leaves no graph on freed memory; stands: as of
    its piece.
    """

    inputs: Mapping[str, Tensor]
    graph: Graph
    weights: Sequence[Tensor]
    stands: Callable[[], bool]
    reason: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and graph."""
        return sum(tensor.nbytes for tensor in self.inputs.values()) + self.graph.nbytes


class CudaGraphExecutor:
    """Artefacts by the key of their piece, the least recently used dropped beyond `kept`."""

    name = "cuda_graph"
    kept = 256

    def __init__(
        self, denoiser: Denoiser, network: Replayable, *, hoist: bool = True, graphs: Graphs | None = None
    ) -> None:
        self.denoiser, self.network = denoiser, network
        self.graphs = graphs or CudaGraphs()
        if denoiser.device.type != self.graphs.device:
            raise UnsupportedError(f"graphs run models on {self.graphs.device}, this one is on {denoiser.device.type}")
        self.one_by_one: str | None = None
        self.compiles = 0
        self._artefacts: OrderedDict[Hashable, Artefact] = OrderedDict()
        self._eager: dict[str, None] = {}  # why rows ran without a graph
        self._hoists = Kept(network, hoist)

    def check(self, plan: Plan) -> None:
        """Everything that `EagerExecutor.check` refuses, and variants that the model cannot stage."""
        check_compiled(plan, self.name, self.denoiser, self.network)

    def prepare(self, plan: Plan, shape: tuple[int, ...], samples: int, memory: KeptMemory) -> None:
        """Capture what `plan` needs for so many samples without a prompt, so that no request waits for it.

        Of other shapes than the model's own, and of networks without such a condition, the first request's row does.
        """
        if shape != self.denoiser.spec.latent_shape:
            return
        try:
            condition = self.denoiser.encode(None)
        except PromptError:
            return
        x = torch.zeros((samples, *shape), dtype=self.denoiser.dtype, device=self.denoiser.device)
        for call, variant in rehearsed(plan, self.denoiser.spec, x, condition, memory):
            if call.focus is None or self._not_captured(call) is None:
                self._network(call, variant)

    def hoist(self, plan: Plan, condition: Any) -> Hoisted | None:
        """What leaves the loop of a request, kept for the next one with the same plan and condition."""
        return self._hoists.of_plan(plan, condition)

    def run(self, group: Group, pool: Pool, timeline: Timeline) -> None:
        """Copy a row's numbers in, replay its pieces, then the fused steps; nothing waits for the device."""
        run_rows(group, pool, timeline, self.predict)

    def predict(self, group: Group, pool: Pool) -> tuple[Tensor, ...]:
        """Predictions by out slot, valid until the next call."""
        return by_branches(group, evaluation(group, pool.net, group.lanes), self._network)

    def evaluate(
        self, x: Tensor, timesteps: Sequence[float], conditions: Sequence[Any], variant: Variant
    ) -> tuple[Tensor, ...]:
        """Predictions [n, ...] of x [n, ...] by branch, valid until the next call."""
        lanes, times = tuple(range(len(x))), tuple(timesteps)
        hoisted = tuple(self._hoists.of_rows(times, variant.branches, condition) for condition in conditions)
        return self._network(Evaluation(x, lanes, lanes, times, tuple(conditions), hoisted), variant)

    def look(self, group: Group, pool: Pool, metric: str, params: Sequence[float]) -> Seen:
        """The denoiser's, eagerly: what follows it is decided on the host."""
        with self.graphs.ready(self.denoiser.device), torch.inference_mode():
            x = pool.net[list(group.lanes)]
            return looked(self.denoiser, x, group, self.one_by_one is not None, metric, params)

    def kernels(self, pool: Pool) -> tuple[KernelUse, ...]:
        """The solver step's, then one line for graphs and one for every reason why a piece is none."""
        reasons = [*(artefact.reason for artefact in self._artefacts.values()), *self._eager]
        uses = [KernelUse("network", "cuda_graph", "captured")] if "" in reasons else []
        uses += [KernelUse("network", "torch", f"eager: {reason}") for reason in dict.fromkeys(filter(None, reasons))]
        return *step_kernels(pool), *uses

    def report(self) -> dict[str, Any]:
        """How many graphs there are and what they take, and which pieces are none."""
        artefacts = list(self._artefacts.values())
        told = {"graphs": sum(not a.reason for a in artefacts), "graph_bytes": sum(a.nbytes for a in artefacts)}
        eager = [artefact.reason for artefact in artefacts if artefact.reason]
        return {**self.network.report(), **told, **({"not_captured": eager} if eager else {})}

    def _network(self, call: Evaluation, variant: Variant) -> tuple[Tensor, ...]:
        with self.graphs.ready(self.denoiser.device), torch.inference_mode(False), torch.no_grad():
            if self.one_by_one is None:
                outs = self._evaluation(call, variant)
            else:
                single = [self._evaluation(call.sample(n), variant) for n in range(len(call.lanes))]
                outs = tuple(torch.cat(branch) for branch in zip(*single, strict=True))
        needed = (len(call.lanes), *call.x.shape[1:])
        for branch, out in zip(variant.branches, outs, strict=True):
            if out.shape != needed:
                raise ShapeError(
                    f"denoiser: prediction of branch {branch!r} has shape {tuple(out.shape)}, needs {needed}"
                )
        return outs

    def _evaluation(self, call: Evaluation, variant: Variant) -> tuple[Tensor, ...]:
        """Every piece replayed, its rows put in place; copies where another replay comes before they are read."""
        if perturbs(variant):
            self._eager[APART.removeprefix("eager: ")] = None
            return run_parted(call, variant, self._evaluation, self._eagerly)
        if (why := self._not_captured(call)) is not None:
            self._eager[why] = None
            return self._eagerly(call, variant)
        pieces = self.network.stage(call, variant, bucket)
        results = []
        for piece in pieces:
            result = self._replayed(piece)  # graphs share their memory: the next one may work where this one left it
            results.append(result if len(pieces) == 1 and self.one_by_one is None else result.clone())
        return predictions(pieces, results, len(variant.branches), len(call.lanes))

    def _not_captured(self, call: Evaluation) -> str | None:
        """Why an evaluation runs without graphs; None when it does not."""
        if call.merging is not None:
            return MERGED
        if call.focus is not None and "kv" not in self.network.sites:
            return FOCUSED
        if call.resume is not None:
            return RESUMED
        beyond = sorted({turn.use.site for turn in call.turns} - self.network.sites)
        return f"rows that keep or give again {', '.join(beyond)} are not captured" if beyond else None

    def _eagerly(self, call: Evaluation, variant: Variant) -> tuple[Tensor, ...]:
        """By the denoiser, as the framework runs it."""
        x = torch.cat(samples_of(call.x, call.lanes))
        args = (x, call.timesteps, call.conditions, variant, call.turns, call.resume)
        if call.merging is not None:
            return self.denoiser.evaluate(*args, merging=call.merging)
        return self.denoiser.evaluate(*args) if call.focus is None else self.denoiser.evaluate(*args, call.focus)

    def _replayed(self, piece: Piece) -> Tensor:
        artefact = self._artefacts.get(piece.key)
        if artefact is None:
            artefact = self._compiled(piece)
        else:
            self._artefacts.move_to_end(piece.key)
            _write(artefact.inputs, piece.inputs)
        return artefact.graph.replay()

    def _compiled(self, piece: Piece) -> Artefact:
        """A new artefact, its inputs holding those of `piece`."""
        device = self.denoiser.device
        inputs = {
            name: parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]), device=device)
            for name, parts in piece.inputs.items()
        }
        for key in [key for key, artefact in self._artefacts.items() if not artefact.stands()]:
            del self._artefacts[key]  # over memory that has moved
        _write(inputs, {**piece.inputs, **piece.idle})
        self.graphs.warm_up(piece.forward, inputs)
        try:
            graph, reason, weights = self.graphs.capture(piece.forward, inputs), "", self.network.weights()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = f"cannot be captured ({str(error).strip().splitlines()[0]})"
            graph, weights = Unrecorded(piece.forward, inputs), ()
        _write(inputs, piece.inputs)  # a network may have written into them
        artefact = Artefact(inputs, graph, weights, piece.stands, reason)
        self.compiles += 1
        self._artefacts[piece.key] = artefact
        if len(self._artefacts) > self.kept:
            self._artefacts.popitem(last=False)
        return artefact


def _write(static: Mapping[str, Tensor], inputs: Mapping[str, tuple[Tensor, ...]]) -> None:
    """Copy the parts of each input into its static tensor, without waiting."""
    for name, parts in inputs.items():
        if len(parts) == 1:
            static[name].copy_(parts[0], non_blocking=True)
        else:
            torch.cat(parts, out=static[name])
