"""A model repository for Triton Inference Server: the graphs of a pack as models that a client calls row by row.

The loop stays with the client, since what a request keeps between rows is its own: `program.txt` lists the calls. Rows
of requests that are under way together share batches wherever all tensors of a graph have rows.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vivace.errors import ArgumentError, OutputError, UnsupportedError
from vivace.export.flat_program import NAME as PROGRAM
from vivace.export.flat_program import flat_program
from vivace.export.pack import new_folder
from vivace.export.triton_config import Ensemble, Served, config_of, ensemble_of
from vivace.runtime.manifest import DTYPES, WEIGHTS, Graph, Port
from vivace.runtime.ort import OnnxRuntime
from vivace.runtime.pack import Pack, open_pack

NAMES = re.compile("[a-z0-9][a-z0-9._-]{0,63}")


def export_triton_server(
    pack: Pack | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_batch_size: int = 16,
    ensembles: bool = True,
) -> tuple[str, ...]:
    """Write a model repository of a pack, all or nothing, ready to be mounted.

    Args:
        pack: opened, or its folder; out: a folder that is not there yet.
        name: what names of models begin with, None: the model's name. max_batch_size: rows of a batch, where a graph
            can be batched. ensembles: for every row graph a model that also does what goes before it.
    Returns: the names of the models. Position tables are folded into the graphs, for the latent shape of the plan.
    Raises: PackError, OutputError; UnsupportedError for ports of a dtype that the server's ONNX Runtime does not serve;
        BackendError without onnxruntime; ArgumentError.
    """
    pack = pack if isinstance(pack, Pack) else open_pack(pack)
    begin = re.sub("[^a-z0-9._-]+", "-", str(pack.manifest.model["name"]).lower()).strip("-.") if name is None else name
    if not NAMES.fullmatch(begin) or max_batch_size < 1:
        raise ArgumentError(
            f"triton-server: name {begin!r:.80}, max_batch_size {max_batch_size}; give a short name, >= 1"
        )
    if os.path.lexists(out) or not Path(out).parent.is_dir():
        raise OutputError(f"{out}: it exists already, or its parent does not; name a new folder")
    tables = _tables(pack)
    models = [_served(pack, graph, begin, tables, max_batch_size) for graph in pack.manifest.graphs]
    models = [model for model in models if model.graph.role != "positions"]
    tried = [ensemble_of(model, models, begin) for model in models if ensembles]
    made = [ensemble for ensemble in tried if ensemble is not None]
    with new_folder(out) as folder:
        for model in models:
            _write_model(pack, folder, model, tables)
        for ensemble in made:
            (folder / ensemble.name / "1").mkdir(parents=True)
            (folder / ensemble.name / "config.pbtxt").write_text(ensemble.config())
        program = False
        with suppress(UnsupportedError):
            told = [replace(model.graph, file=model.name) for model in models]
            (folder / PROGRAM).write_text(flat_program(pack.plan, told, pack.manifest.prompts))
            program = True
        (folder / "README.md").write_text(_readme(pack, models, made, program))
    return (*(model.name for model in models), *(ensemble.name for ensemble in made))


def _tables(pack: Pack) -> dict[str, Any]:
    """What graphs of role "positions" give for the plan's latent shape, by key."""
    found: dict[str, Any] = {}
    assert pack.plan.binding is not None, "the plan of a pack is bound"
    for graph in pack.graphs("positions"):
        size = np.array(pack.plan.binding.latent_shape[-2:], np.int64)
        made = (
            OnnxRuntime(1)
            .open(pack, graph)
            .run({port.name: size for port in graph.inputs}, {port.name: None for port in graph.outputs})
        )
        found |= {port.key: made[port.name] for port in graph.outputs}
    return found


def _served(pack: Pack, graph: Graph, begin: str, tables: Mapping[str, Any], rows: int) -> Served:
    """A graph as it is served: without the tables, of one latent size, batched where all its tensors have rows."""
    binding = pack.plan.binding
    assert binding is not None, "the plan of a pack is bound"
    sizes = {"height": binding.latent_shape[-2], "width": binding.latent_shape[-1], "tokens": binding.tokens}
    if graph.role == "decode":
        sizes = {}  # of pictures, which may be larger

    def fixed(port: Port) -> Port:
        return replace(
            port, shape=tuple(sizes.get(size, size) if isinstance(size, str) else size for size in port.shape)
        )

    inputs = tuple(fixed(port) for port in graph.inputs if not _folded(port, tables))
    outputs = tuple(map(fixed, graph.outputs))
    return Served(f"{begin}-{graph.name}".lower(), replace(graph, inputs=inputs, outputs=outputs), rows)


def _folded(port: Port, tables: Mapping[str, Any]) -> bool:
    return port.source == "prepared" and port.key in tables


def _write_model(pack: Pack, folder: Path, model: Served, tables: Mapping[str, Any]) -> None:
    """config.pbtxt, and the graph with the weights file beside it: one file on the disk, linked by every model."""
    version = folder / model.name / "1"
    version.mkdir(parents=True)
    (folder / model.name / "config.pbtxt").write_text(config_of(model))
    graph = next(graph for graph in pack.manifest.graphs if graph.name == model.graph.name)
    made = onnx.load(pack.file(graph), load_external_data=False)
    for port in graph.inputs:
        if _folded(port, tables):
            value = tables[port.key]
            number = DTYPES[port.dtype][0]
            made.graph.initializer.append(
                onnx.TensorProto(name=port.name, data_type=number, dims=value.shape, raw_data=value.tobytes())
            )
            made.graph.input.remove(next(each for each in made.graph.input if each.name == port.name))
    (version / graph.file).write_bytes(made.SerializeToString(deterministic=True))
    if pack.stored[graph.name]:
        _link(folder, pack.path / WEIGHTS, version / WEIGHTS)


def _link(folder: Path, weights: Path, place: Path) -> None:
    """The weights at a place: a copy for the first model, further names of that copy for the others."""
    first = next(iter(sorted(folder.glob(f"*/1/{WEIGHTS}"))), None)
    if first is not None:
        with suppress(OSError):
            os.link(first, place)
            return
    shutil.copyfile(weights, place)


def _readme(pack: Pack, models: Sequence[Served], ensembles: Sequence[Ensemble], program: bool) -> str:
    """What a client does."""
    rows = [f"| `{model.name}` | {_ROLES[model.graph.role]} | {_batching(model)} |" for model in models]
    rows += [
        f"| `{each.name}` | ensemble: what goes before `{each.model}`, and that | {_batching(each)} |"
        for each in ensembles
    ]
    assert pack.plan.binding is not None, "the plan of a pack is bound"
    text = _README.format(
        name=pack.manifest.model["name"],
        licence=pack.manifest.model["licence"],
        plan=pack.plan.hash[:12],
        evaluations=pack.plan.nfe,
        shape=list(pack.plan.binding.latent_shape),
        opset=pack.manifest.opset,
        models="\n".join(rows),
    )
    return text + (_WITH_PROGRAM if program else _WITHOUT_PROGRAM)


def _batching(model: Any) -> str:
    return f"up to {model.max_batch_size} rows" if model.max_batch_size else "as one request sends it"


_ROLES = {
    "row": "an evaluation of the network",
    "prepare": "what does not depend on the latents, once a row before the loop",
    "step": "the solver step: combines slots",
    "encode": "a text encoder",
    "decode": "latents to uint8 pictures",
}
_README = """# {name}

A model repository for Triton Inference Server (`tritonserver --model-repository <this folder>`), backend onnxruntime of
opset {opset} or later. Plan {plan}: {evaluations} evaluations, latents {shape}.

Licence of the model: {licence}

| Model | What it does | Batched |
|---|---|---|
{models}

Weights lie in `weights.bin` beside every graph: one file with several names (hard links). Copy the folder with its
links (`rsync -aH`, `cp -a`), or it grows; object stores hold a copy for every model.

## What a client does

Tensors are sent and come back as in the pack's manifest. Where a model is batched and a tensor has one number a row
(`timestep`, `label`), its shape is [rows, 1]. Rows of one call are the branches of guidance, each with all pictures:
row b * n + j is picture j in branch b; more rows than a batch has are sent in parts. What a row keeps (inputs and
outputs with a plane number) stays with the client and is sent with the next call that reads it.

An ensemble takes what the models before it take, in place of what they give.
"""
_WITH_PROGRAM = """
`program.txt` lists every call of the plan in order, with its model, where inputs come from and where outputs go; the
words are explained in `vivace/export/flat_program.py`, and `examples/cpp_runtime/main.cpp` is a reader of them in C++.
A client that follows it gets the pictures of `vivace run` with the same seed.
"""
_WITHOUT_PROGRAM = """
This plan decides while it runs, so there is no flat list of its calls: let `vivace.runtime` follow the plan, with a
backend that sends its calls here.
"""
