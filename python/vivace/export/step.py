"""The solver step as a graph: one for every row of every plan, since coefficients are its inputs."""

from __future__ import annotations

from vivace.export.builder import GraphBuilder
from vivace.export.pack import MadeGraph
from vivace.runtime.manifest import Port

NAME = "step"
SLOTS = Port("slots", "float32", ("rows", "sources", "elements"), "slots")
COEFFICIENTS = Port("coefficients", "float32", ("coefficient_rows", "outs", "sources"), "coefficients")
FIELDS = Port("fields", "float32", ("field_rows", "field_sources", "field_elements"), "fields")
RESULTS = Port("results", "float32", ("rows", "outs", "elements"), "outs")


def step_graph(opset: int = 21) -> MadeGraph:
    """results[n] = coefficients[n] @ (slots[n] * fields[n]), in float32.

    slots: [rows, sources, elements], what a row reads, each latent in one line; coefficients: [rows or 1, outs,
    sources], composed by `runtime.program`; fields: what sources are multiplied by, each axis as of slots or 1: one
    number 1 where nothing is. results: [rows, outs, elements].
    """
    graph = GraphBuilder(NAME, opset)
    slots, coefficients, fields = (graph.input(port) for port in (SLOTS, COEFFICIENTS, FIELDS))
    with graph.scope(NAME):
        sources = graph.op("Mul", slots, fields, name="sources")
        graph.output(RESULTS, graph.op("MatMul", coefficients, sources, name="combine"))
    return graph.made("step")
