"""Graphs of networks of diffusers: their own forward, traced with what is kept as inputs and outputs.

A row is run as the eager denoiser runs it, by the same interceptor of blocks; only the memory that it is handed is
tensors of a graph (`traced_lanes`), and so are its token ids (`traced_tokens`). What comes out of the exporter is put
in order by `tidy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vivace.errors import ArgumentError, UnsupportedError
from vivace.export.pack import MadeGraph
from vivace.export.text import condition_tensors, encode_graph, exported_modules, prompts_of
from vivace.export.tidy import MOST_TOLD, digest, tidied
from vivace.export.traced_lanes import Ledger, starts
from vivace.export.traced_ops import array_of, constants_of, exported, found_free, layers_of
from vivace.export.traced_row import PREFIX, Row, RowForward
from vivace.export.vae import decode_graph
from vivace.export.weights import WeightStore
from vivace.models.perturbed import why_not as why_no_identity
from vivace.models.pipelines.conditions import Condition, hollow, signed
from vivace.models.pipelines.denoiser import BareDenoiser
from vivace.models.pipelines.network import NetworkDenoiser
from vivace.runtime.calls import Structure

__all__ = ["condition_tensors", "exported_modules", "prompts_of", "traced_graphs"]

OPSETS = (21, 23)


def traced_graphs(
    denoiser: NetworkDenoiser,
    structures: Sequence[Structure],
    *,
    dtype: str,
    opset: int,
    store: WeightStore,
    condition: Condition | None = None,
) -> list[MadeGraph]:
    """The row graphs of a network of diffusers, one for each structure, in their order.

    Args:
        denoiser: of a pipeline or a bare network, on the CPU; dtype: its own, "float32" | "float16" | "bfloat16".
        structures: all of a plan, in order of first use; opset: 21, or 23 with the standard attention.
        condition: as the denoiser encodes a prompt: shapes of text and constants such as rotary positions are taken
            from it. None: of the empty prompt, which a bare network has not.
    Raises: UnsupportedError with the reason for what the family or a trace of it cannot do, before any graph is made
        where that can be told; ArgumentError.
    """
    given = _condition(denoiser, condition)
    _check(denoiser, structures, dtype, opset)
    ledger, first = Ledger(), starts(structures)
    rows = [Row(denoiser, structure, given, ledger, first, opset) for structure in structures]
    for row in rows:
        row.try_out()
    free = not any(part.text for part in ledger.parts.values())
    alike = _alike(denoiser)
    graphs = [row_graph(row, f"row-{number}", free, opset, store, alike) for number, row in enumerate(rows)]
    others = encode_graph(denoiser, opset, store), decode_graph(denoiser, opset, store)
    return [*graphs, *(graph for graph in others if graph is not None)]


def row_graph(row: Row, name: str, free_text: bool, opset: int, store: WeightStore, alike: Any) -> MadeGraph:
    """One row's graph. free_text: prompts may have any length where the forward allows it; alike: as of `tidied`."""
    program, model = exported(RowForward(row), row.examples(), row.dynamic(free_text), opset, row.name)
    inputs = [found_free(port, value) for port, value in zip(row.inputs, model.graph.input, strict=True)]
    made, used = tidied(model, inputs, row.outputs, layers_of(program), store, PREFIX, alike, constants_of(program))
    return MadeGraph(name, "row", made, used, tuple(row.outputs), row.structure)


def _alike(denoiser: NetworkDenoiser) -> dict[tuple[str, bytes], str]:
    """Names of small parameters by what is in them, the first of each."""
    found: dict[tuple[str, bytes], str] = {}
    for network in denoiser.networks.values():
        for name, parameter in network.named_parameters():
            if 1 < parameter.numel() and parameter.nbytes <= MOST_TOLD:
                found.setdefault(digest(array_of(parameter)), name)
    return found


def _condition(denoiser: NetworkDenoiser, condition: Condition | None) -> Condition:
    if condition is None:
        if isinstance(denoiser, BareDenoiser):
            raise ArgumentError("export: a bare network has no prompt of its own; pass the arguments of one")
        condition = denoiser.encode(None)  # type: ignore[attr-defined]
    first, *others = condition.branches.values()
    if any(signed(hollow(first)).signature != signed(hollow(other)).signature for other in others):
        raise UnsupportedError(
            "export: the branches of a prompt differ in arguments that are no rows of the batch, so one graph cannot "
            "run both; give prompts of equal length"
        )
    return condition


def _check(denoiser: NetworkDenoiser, structures: Sequence[Structure], dtype: str, opset: int) -> None:
    if str(denoiser.dtype) != f"torch.{dtype}":
        raise ArgumentError(
            f"export: the network is {denoiser.dtype}, the pack is to be {dtype}; load it in that dtype"
        )
    if opset not in OPSETS:
        raise ArgumentError(
            f"export: opset {opset}; networks of diffusers are traced to {' or '.join(map(str, OPSETS))}"
        )
    for structure in structures:
        if (reason := _why_not(denoiser, structure)) is not None:
            raise UnsupportedError(f"export: {reason}")


def _why_not(denoiser: NetworkDenoiser, structure: Structure) -> str | None:
    """Why a structure cannot be a graph of this network."""
    if structure.look or structure.begin:
        return (
            f"a guard of the plan looks at blocks ({structure.look or 'first_block'}), which graphs of diffusers "
            "networks do not; freeze the plan (vivace.passes.freeze) or drop the guard"
        )
    network = denoiser.networks[structure.model]
    if not (structure.kept or structure.tokens or structure.identity):
        return None
    cached = denoiser.cached(network)
    if structure.identity:
        if structure.kept or structure.tokens:
            return (
                "blocks with the identity for their attention map, in rows that keep something or compute some tokens"
            )
        return why_no_identity(cached, structure.identity)
    if structure.tokens and cached.whole is not None:
        return cached.whole
    found = (cached.lacks(kept.site, (kept.first, kept.last)) for kept in structure.kept)
    return next((reason for reason in found if reason is not None), None)
