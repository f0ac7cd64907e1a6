"""Graphs of a tiny native DiT in ONNX Runtime: rows that keep and give, as `tests.models.caching.rows` runs them."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator

from tests.models.caching.rows import BRANCHES, LABELS, SAMPLES, TIMES, Memory
from tests.models.conftest import TINY
from vivace.engine.kept import split
from vivace.export.dit import dit_graphs
from vivace.export.pack import write_graphs
from vivace.export.weights import WeightStore
from vivace.models.dit import DiT
from vivace.models.dit_config import DiTConfig
from vivace.runtime.calls import Kept, Structure
from vivace.runtime.manifest import DTYPES


def tiny_model(**fields):
    """A small random network with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = DiT(DiTConfig.from_dict({**TINY, **fields}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_folder_of(folder):
    """The same in the diffusers format."""
    tiny_model().save(folder)
    return folder


def denoiser_of(network, pixels=False):
    """As much of a `ClassDenoiser` as the export reads."""
    return SimpleNamespace(model=SimpleNamespace(module=network, pixels=pixels))


def kept_of(turn):
    use = turn.use
    return Kept(use.site, *use.blocks, use.reads, use.made, use.terms, use.store)


def structure_of(turns, tokens=False, **options):
    """What a forward with these turns computes."""
    return Structure(kept=tuple(map(kept_of, turns)), tokens=tokens, **options)


def structures_of(rows, store=None, some=()):
    """Of rows as `Case.run` takes them; some: numbers of token rows."""
    memory, found = Memory(rows, store), {}
    for i, row in enumerate(rows):
        for _, mine in split(BRANCHES, memory.turns(row)):
            found[structure_of(mine, i in some)] = None
    return tuple(found)


class Graphs:
    """Graphs written into a folder, with a session each; every model is checked and its shapes are inferred."""

    def __init__(self, folder, network, structures, dtype="float32", opset=21, pixels=False):
        with WeightStore() as store:
            self.made = dit_graphs(denoiser_of(network, pixels), structures, dtype=dtype, opset=opset, store=store)
            write_graphs(folder, self.made, store)
        self.folder, self.dtype, self.runs = folder, dtype, {}
        self.by_structure = {graph.structure: graph for graph in self.made if graph.role == "row"}
        self.named = {graph.name: graph for graph in self.made}
        for graph in self.made:
            path = str(folder / graph.file)
            onnx.checker.check_model(path, full_check=True)
            onnx.shape_inference.infer_shapes_path(path, check_type=True, strict_mode=True, data_prop=True)

    def session(self, graph):
        if graph.name not in self.runs:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.runs[graph.name] = onnxruntime.InferenceSession(
                str(self.folder / graph.file), options, providers=["CPUExecutionProvider"]
            )
        return self.runs[graph.name]

    def run(self, graph, feeds, **sizes):
        """Outputs by port of a graph; feeds: arrays by name; sizes: of free dimensions."""
        if self.dtype == "bfloat16":
            return self.by_definition(graph, feeds)
        session = self.session(graph)
        binding, arrays = session.io_binding(), {}
        known = dict(sizes)
        for port in graph.inputs:
            array = np.ascontiguousarray(feeds[port.name])
            assert array.dtype == numpy_of(port.dtype), port
            assert len(array.shape) == len(port.shape)
            for size, name in zip(array.shape, port.shape, strict=True):
                assert known.setdefault(name, size) == size if isinstance(name, str) else name == size, port
            arrays[port.name] = array
            binding.bind_input(port.name, "cpu", 0, DTYPES[port.dtype][0], array.shape, array.ctypes.data)
        outs = {}
        for port in graph.outputs:
            shape = [known[size] if isinstance(size, str) else size for size in port.shape]
            outs[port] = np.full(shape, 77).astype(numpy_of(port.dtype))
            where = outs[port].ctypes.data
            binding.bind_output(port.name, "cpu", 0, DTYPES[port.dtype][0], shape, where)
        session.run_with_iobinding(binding)
        return outs

    def by_definition(self, graph, feeds):
        """The same by the evaluator of the ONNX standard: ONNX Runtime has no bfloat16 products on a processor."""
        if graph.name not in self.runs:
            self.runs[graph.name] = ReferenceEvaluator(onnx.load(str(self.folder / graph.file)))
        outs = self.runs[graph.name].run(None, {port.name: feeds[port.name] for port in graph.inputs})
        return dict(zip(graph.outputs, outs, strict=True))

    def of(self, name, feeds, **sizes):
        """Outputs by name of a graph by its name."""
        return {port.name: value for port, value in self.run(self.named[name], feeds, **sizes).items()}

    def prepared(self, timesteps, labels, size, patch=TINY["patch_size"]):
        """What row graphs are fed besides of the latent: modulation of timesteps [R] and labels [R], positions."""
        feeds = {"timestep": np.float32(timesteps), "label": np.int64(labels)}
        made = self.of("prepare", feeds)
        tokens = size[0] // patch * (size[1] // patch)
        return made | self.of("positions", {"size": np.int64(size)}, tokens=tokens)


def numpy_of(dtype):
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


class Pack:
    """What a runtime does with a case's rows: batches of branches, kept planes, weights."""

    def __init__(self, case, graphs):
        self.case, self.graphs, self.kept = case, graphs, {}

    def run(self, rows, store=None, samples=range(SAMPLES), ids=None):
        """As `Case.run`, by the graphs."""
        self.kept, made = {}, []
        memory = Memory(rows, store)
        for i, row in enumerate(rows):
            some = None if ids is None or ids[i] is None else ids[i][list(samples)].numpy().astype(np.int64)
            made.append(self.row(i, memory.turns(row, samples), list(samples), some))
        return torch.stack(made)

    def row(self, i, turns, samples, ids=None, **options):
        """Predictions [B, n, C, H, W] of row i."""
        outs = {}
        for names, mine in split(BRANCHES, turns):
            structure = structure_of(mine, ids is not None, **options)
            outs.update(self.call(i, names, structure, [turn.weights[0] for turn in mine], samples, ids))
        return torch.stack([outs[name] for name in BRANCHES])

    def call(self, i, names, structure, weights, samples, ids=None, hidden=None):
        """Predictions by branch."""
        made = self.outputs(i, names, structure, weights, samples, ids, hidden)
        found = next(value for port, value in made.items() if port.source == "prediction")
        return dict(zip(names, torch.from_numpy(found).chunk(len(names)), strict=True))

    def outputs(self, i, names, structure, weights, samples, ids=None, hidden=None):
        x, rows, n = self.case.x[i, samples], len(names) * len(samples), len(samples)
        graph = self.graphs.by_structure[structure]
        size = tuple(x.shape[-2:])
        labels = [LABELS[BRANCHES.index(name)] for name in names for _ in samples]
        feeds = self.graphs.prepared([TIMES[i]] * rows, labels, size)
        feeds["x"] = np.concatenate([x.float().numpy()] * len(names))
        feeds["hidden"] = hidden
        if ids is not None:
            feeds["token_ids"] = np.concatenate([ids] * len(names))
        by_name = dict(zip((kept.name for kept in structure.kept), weights, strict=True))
        for port in graph.inputs:
            if port.source == "weights":
                feeds[port.name] = np.float32(by_name[port.key])
            if port.source in ("kept", "kept_scale"):
                sizes = {"tokens": self.case.tokens, "rows": n}
                empty = np.zeros([sizes.get(wide, wide) for wide in port.shape], numpy_of(port.dtype))
                held = [self.kept.get((port.source, port.key, port.plane, name), empty) for name in names]
                feeds[port.name] = np.concatenate(held)
        made = self.graphs.run(graph, feeds, tokens=self.case.tokens)
        for port, value in made.items():
            if port.source in ("kept", "kept_scale"):
                for name, part in zip(names, np.split(value, len(names)), strict=True):
                    self.kept[port.source, port.key, port.plane, name] = part
        return made
