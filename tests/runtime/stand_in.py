"""Packs without files: graphs that are Python functions, and the step graph in ONNX Runtime."""

from functools import cache
from types import SimpleNamespace

import numpy as np

from vivace.engine.bind import ModelSpec
from vivace.engine.token_layout import Layout
from vivace.export.step import step_graph
from vivace.runtime.calling import Graphs, Opened
from vivace.runtime.calls import structures_of
from vivace.runtime.loop import Asked, Run
from vivace.runtime.manifest import Graph, Port
from vivace.runtime.ort import OnnxRuntime
from vivace.runtime.program import Given, program_of

SHAPE = (3, 8, 8)
SPEC = ModelSpec("stand-in", "5" * 64, "v", SHAPE, 4, (4, 4))


class Function:
    """A graph that is a function of its inputs by name; `calls` are those of every run."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def run(self, inputs, outputs):
        assert all(array.flags["C_CONTIGUOUS"] for array in inputs.values())
        self.calls.append({name: array.copy() for name, array in inputs.items()})
        made = self.function(**inputs)
        for name, memory in outputs.items():
            if memory is not None:
                assert memory.flags["C_CONTIGUOUS"] and not any(np.shares_memory(memory, a) for a in inputs.values())
                memory[...] = made[name]
                made[name] = memory
        return {name: made[name] for name in outputs}


def network(x, timestep, label):
    """The network of `tests.engine.test_transforms`, rows by label: 1 is cond, 0 uncond."""
    shaped = (-1, *[1] * (x.ndim - 1))
    scale = np.where(label == 1, 0.8, 0.3).astype(np.float32).reshape(shaped)
    shift = np.where(label == 1, 0.2, 0.0).astype(np.float32).reshape(shaped)
    return {"prediction": np.tanh(scale * x + np.float32(0.001) * timestep.reshape(shaped)) + shift}


def row_ports(shape):
    latent = ("rows", *shape)
    inputs = (
        Port("x", "float32", latent, "latent"),
        Port("timestep", "float32", ("rows",), "timestep"),
        Port("label", "int64", ("rows",), "condition", "label"),
    )
    return inputs, (Port("prediction", "float32", latent, "prediction"),)


@cache
def step_runner(folder):
    """The step graph, written into a folder."""
    made = step_graph()
    (folder / made.file).write_bytes(made.model.SerializeToString())
    manifest = SimpleNamespace(precision={})
    pack = SimpleNamespace(path=folder, manifest=manifest, file=lambda g: folder / g.file, graphs=lambda role: ())
    return Opened(made.described(), OnnxRuntime(1).open(pack, made.described()))


def graphs_of(plan, step, function=network):
    """Graphs for a plan whose rows are all alike."""
    (structure,) = structures_of(plan) or (None,)
    rows = {}
    if structure is not None:
        graph = Graph("row0", "row0.onnx", "row", *row_ports(plan.binding.latent_shape), structure)
        rows = {structure: Opened(graph, Function(function))}
    return Graphs(rows, [], [], [], step, None)


LABELS = {"cond": {"label": np.array(1)}, "uncond": {"label": np.array(0)}}


def run_plan(plan, noise, step, *, seed=0, values=None, tensors=None, function=network):
    """Slot x behind the last row of a bound plan, and the run."""
    n, shape = len(noise), noise.shape[1:]
    given = {ref.name: ref.default for ref in plan.inputs if ref.name not in (tensors or {})} | (values or {})
    arrays = {name: np.broadcast_to(array, noise.shape).astype(np.float32) for name, array in (tensors or {}).items()}
    asked = Asked(tuple(range(n)), seed, LABELS, given, arrays | {"noise": noise.astype(np.float32)})
    layout = Layout(shape, (shape[0], *(1,) * (len(shape) - 1)))
    program = program_of(plan, Given(given, frozenset(asked.tensors)))
    run = Run(graphs_of(plan, step, function), plan, layout, asked, program)
    while not run.done:
        run.step()
    return run.slot("x"), run
