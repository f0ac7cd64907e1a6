"""`export_onnx`: a model and its plan as a pack, which runs without torch and without this package's models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vivace.engine.denoiser import Denoiser
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.plan import Plan, Variant
from vivace.engine.precision import QUANTIZED, named
from vivace.engine.session import Session
from vivace.errors import ArgumentError, UnsupportedError
from vivace.export.description import Description, description_of
from vivace.export.dit import dit_graphs
from vivace.export.fake_quant import fake_quantized
from vivace.export.goldens import Goldens, relative_errors, run_goldens
from vivace.export.pack import MadeGraph, check_out, write_pack
from vivace.export.qdq import quantized_graphs, scheme_of
from vivace.export.step import step_graph
from vivace.export.text import condition_tensors, exported_modules
from vivace.export.told import told_of, weight_bytes
from vivace.export.traced import traced_graphs
from vivace.export.weights import WeightStore
from vivace.models.class_denoiser import ClassDenoiser
from vivace.models.pipelines.network import NetworkDenoiser
from vivace.models.quantized.given import advised
from vivace.models.quantized.reach import network_of
from vivace.models.quantized.stand_in import block_names
from vivace.models.quantized.weights import QuantizedWeights
from vivace.runtime.calls import structures_of
from vivace.runtime.pack import Pack, open_pack

DTYPES = ("float32", "float16", "bfloat16")
OPSETS = (21, 23)
TARGETS = ("cpu", "tensorrt")
TOLERANCE = 1e-4  # of a row of goldens, relative to the largest of its numbers
NARROW = frozenset(QUANTIZED)

Progress = Callable[[str, int, int], None]


def export_onnx(
    pipe: Any,
    plan: Plan | None,
    out: str | PathLike[str],
    *,
    dtype: str = "float32",
    opset: int = 21,
    target: str = "cpu",
    prompt: Any = None,
    licence: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Pack:
    """Write the pack of a model and a plan, all or nothing, and open it.

    Args:
        pipe: of `vivace.load`. With quantized weights rows that name their precision run in it; a plan that names no
            precision runs on them as they advise.
        plan: None: the model's own; it is bound to the model.
        dtype: of the network, "float32" | "float16" | "bfloat16"; latents stay float32.
        opset: 21; 23 with its attention and normalization ops. target: who reads 8-bit graphs, "cpu" (activations as
            uint8) or "tensorrt" (as int8): the same numbers.
        prompt: of the goldens, None: the model's example. licence: of the model, None: as its card says.
        overwrite: replace a pack that is there. progress: (what, done, in all).
    Returns: the pack as `runtime.open_pack` opens it.
    Raises: ArgumentError, UnsupportedError (what no pack holds, naming the row), PlanError, OutputError.
    """
    for name, value, known in (("dtype", dtype, DTYPES), ("opset", opset, OPSETS), ("target", target, TARGETS)):
        if value not in known:
            raise ArgumentError(f"export: {name} is {value!r}; use {' or '.join(map(str, known))}")
    if not isinstance(plan, Plan | None):
        raise UnsupportedError(
            f"export: a pack holds a plan, not {type(plan).__name__}; of a source of steps record a run: result.plans"
        )
    check_out(out, overwrite)
    tell = progress or (lambda what, done, total: None)
    tell("compile", 0, 3)
    chosen = pipe.choose_plan(None, None, None, None) if plan is None else plan
    work = _Work.of(pipe, advised(chosen, pipe.quantized), dtype)
    told = told_of(pipe, work.denoiser, licence)
    with WeightStore(Path(out).absolute().parent) as store:
        tell("graphs", 1, 3)
        graphs = work.graphs(opset, target, store)
        tell("goldens", 2, 3)
        goldens, tolerance = work.goldens(pipe, told.example if prompt is None else prompt)
        write_pack(
            out,
            graphs=graphs,
            store=store,
            plan=work.plan,
            goldens=goldens.arrays,
            metadata=goldens.metadata,
            model=told.model,
            prompts=told.prompts,
            precision={"network": dtype, **scheme_of(work.description, target)},
            opset=opset,
            tolerance=tolerance,
            weights=work.weights(pipe),
            versions={name: version(name) for name in ("vivace", "onnx", "torch")},
            extra=told.files,
            overwrite=overwrite,
        )
    tell("done", 3, 3)
    return open_pack(out)


@dataclass(frozen=True, slots=True)
class _Work:
    """One export under way. session: eager, of the network that the graphs are of."""

    session: Session
    plan: Plan
    dtype: str
    quantized: QuantizedWeights | None = None
    description: Description | None = None

    @classmethod
    def of(cls, pipe: Any, plan: Plan, dtype: str) -> _Work:
        quantized: QuantizedWeights | None = pipe.quantized
        session = pipe.compile(plan, backend="eager", device="cpu", dtype=dtype)
        bound = session.plans[0]
        if quantized is None or not any(NARROW & named(variant) for variant in bound.variants):
            return cls(session, bound, dtype)
        description = description_of(quantized)
        return cls(
            _eager(fake_quantized(session.denoiser, quantized, description), bound),
            bound,
            dtype,
            quantized,
            description,
        )

    @property
    def denoiser(self) -> Denoiser:
        """The network as the goldens run it."""
        return self.session.denoiser

    def graphs(self, opset: int, target: str, store: WeightStore) -> list[MadeGraph]:
        """Every graph of the pack."""
        structures, own = structures_of(self.plan), self.denoiser
        if isinstance(own, ClassDenoiser):
            made = dit_graphs(own, structures, dtype=self.dtype, opset=opset, store=store)
        else:
            made = traced_graphs(_traceable(own), structures, dtype=self.dtype, opset=opset, store=store)
        if self.description is not None:
            names = block_names(network_of(own))
            made = quantized_graphs(made, self.description, names, emitter=target, store=store, dtype=self.dtype)
        return [*made, step_graph(opset)]

    def goldens(self, pipe: Any, prompt: Any) -> tuple[Goldens, float]:
        """What the pack is held to, and how closely: in float32 by a number; in narrower numbers twice the largest
        distance of a row from the same row in float32: what rounds the other way once is as far as that."""
        plan = _of_the_model(self.plan, stores=True) if self.description is None else self.plan
        goldens = run_goldens(self.session, plan, prompt, self._conditions)
        if self.dtype == "float32" and self.description is None and not _stores_narrow(self.plan):
            return goldens, TOLERANCE
        plain = _Work.of(pipe, _of_the_model(self.plan), "float32")
        exact = run_goldens(plain.session, plain.plan, prompt, plain._conditions, goldens.arrays)
        allowed = [TOLERANCE + 2.0 * error for error in relative_errors(goldens.arrays, exact.arrays)]
        goldens.arrays["tolerances"] = np.array(allowed)
        return goldens, max(allowed)

    def _conditions(self, condition: Any) -> Mapping[str, Any]:
        if isinstance(self.denoiser, ClassDenoiser):
            return {}
        found = condition_tensors(_traceable(self.denoiser), condition)
        read = {branch for variant in self.plan.variants for branch in variant.branches}
        return {f"{branch}.{key}": v for branch, keys in found.items() if branch in read for key, v in keys.items()}

    def weights(self, pipe: Any) -> dict[str, int]:
        """Bytes of the pack's weights, by precision."""
        return weight_bytes(_modules(pipe, self.denoiser), self.dtype, self.quantized, not self._all_quantized())

    def _all_quantized(self) -> bool:
        """No row runs a quantized layer as it was."""
        structures = [s for s in structures_of(self.plan) if not s.look]
        return all(any(p in NARROW for *_, p in s.precisions) for s in structures)


def _stores_narrow(plan: Plan) -> bool:
    """Something is kept in less than float32."""
    return any(rule.store not in (None, "fp32") for variant in plan.variants for rule in variant.rules)


def _of_the_model(plan: Plan, *, stores: bool = False) -> Plan:
    """The plan with every row in the model's own precision, and what is kept as it is; stores: as the plan says."""

    def plain(variant: Variant) -> Variant:
        rules = (rule if stores else replace(rule, store=None) for rule in variant.rules if rule.precision is None)
        return replace(variant, rules=tuple(rules))

    steps = []
    for step in plan.steps:
        guard = None if step.guard is None else replace(step.guard, otherwise=plain(step.guard.otherwise))
        steps.append(replace(step, variant=None if step.variant is None else plain(step.variant), guard=guard))
    return replace(plan, steps=tuple(steps), recipe=None)


def _eager(denoiser: Denoiser, plan: Plan) -> Session:
    executor = EagerExecutor(denoiser)
    return Session(
        denoiser, [plan], executor, shape=denoiser.spec.latent_shape, state_dtype=torch.float32, probed=False
    )


def _modules(pipe: Any, denoiser: Denoiser) -> dict[str, Any]:
    """Modules whose weights a pack holds: networks, and text encoders and decoder of a pipeline."""
    if isinstance(denoiser, ClassDenoiser):
        return {"main": denoiser.model.module}
    return dict(exported_modules(_traceable(denoiser)))


def _traceable(denoiser: Denoiser) -> NetworkDenoiser:
    """A denoiser that is no native DiT. Raises UnsupportedError for one that is no network of diffusers either."""
    if not isinstance(denoiser, NetworkDenoiser):
        raise UnsupportedError(f"export: {type(denoiser).__name__} has no graphs; use a model of vivace.load")
    return denoiser
