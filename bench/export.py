"""Exported packs: how far from the eager run, how large, how fast in ONNX Runtime, and who else reads their graphs.

Errors are measured anew from packs that `make bench-setup` keeps. A row of a pack is timed as one forward of its graph
on two rows of a batch, the branches of one guided picture, in memory that was bound before; candidates take turns. Work
is counted from the model's sizes.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.bench.export_packs import CASES, EMOJI, LARGE, PackCase
from vivace.bench.harness import Candidate, Claim, interleave, of_claims, ratio_of_medians, report
from vivace.engine.caching import caches, share_of
from vivace.errors import BackendError
from vivace.runtime.calls import Structure, calls_of
from vivace.runtime.manifest import Graph
from vivace.runtime.openvino import OpenVino
from vivace.runtime.ort import Backend, OnnxRuntime, storage
from vivace.runtime.pack import Pack
from vivace.runtime.verify import verify_pack

SEED, ROWS, SLACK = 7, 2, 5_000_000  # bytes of a pack beside its weights
SECONDS = {True: 12.0, False: 40.0}
RTX = ".venv-rtx"  # in the working folder: an environment that has TensorRT-RTX alone

Found = tuple[list[dict[str, Any]], Claim]


def fp32_error(quick: bool) -> Found:
    """The largest error of a row's latents over the float32 packs."""
    name, bound = "export.max_rel_error_fp32", 1e-4
    if (reason := absent()) is not None:
        return [], Claim(name, "<=", bound, reason)
    rows = []
    for case in CASES.values():
        if not case.int8 and (case.model is EMOJI or not quick):
            found = verify_pack(case.open())
            rows.append({"op": "latents", "case": case.name, "error": found.error, "rows": len(found.rows)})
    worst = max(rows, key=lambda row: row["error"])
    how = f"largest of every row's latents, max|a-b|/max|b| to the eager run, worst: {worst['case']}"
    return rows, Claim(name, "<=", bound, how, worst["error"], None, len(rows))


def int8_error(quick: bool) -> Found:
    """An int8 graph and the fake-quantized network of the same description, on the same inputs."""
    name, bound = "export.int8_rel_error_same_description", 1e-3
    if (reason := absent()) is not None:
        return [], Claim(name, "<=", bound, reason)
    rows = []
    for model in (EMOJI,) if quick else (EMOJI, LARGE):
        case = next(case for case in CASES.values() if case.model is model and case.int8)
        found = _compared(case)
        rows.append({
            "op": "int8", "case": case.name, "error": found.error, "free": found.free,
            "ties": found.ties, "codes": found.codes,
        })  # fmt: skip
    worst = max(rows, key=lambda row: row["error"])
    how = (
        "prediction of a whole row, max|a-b|/max|b| to the fake-quantized network of the same scales and codes; where "
        f"a value lies within 1e-3 of a step of halfway between two codes ({worst['ties']} of {worst['codes']}) the "
        f"reference rounds as the graph did; with ties as they fall: {worst['free']:.1e}"
    )
    return rows, Claim(name, "<=", bound, how, worst["error"], None, len(rows))


def _compared(case: PackCase) -> Any:
    """The full row of an int8 pack against its reference."""
    import vivace
    from vivace.bench.export_packs import static_weights
    from vivace.engine.plan import Variant
    from vivace.export.description import description_of
    from vivace.export.same_codes import compared
    from vivace.models.quantized.reach import denoiser_of, network_of, with_linears

    pack, pipe = case.open(), vivace.load(str(case.model.folder), quantized=static_weights(case.model))
    forward = Forward(pack, whole(pack), OnnxRuntime(1))
    denoiser, weights = denoiser_of(pipe), pipe.quantized
    network, description = network_of(denoiser), description_of(weights)
    x = torch.from_numpy(forward.feeds["x"][:1])

    def evaluate(functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        stood = with_linears(denoiser, functions)
        with torch.no_grad():
            outs = stood.evaluate(x, (TIME,), [stood.encode(LABEL)], Variant(branches=("cond", "uncond")))
        return torch.cat(outs)

    linears = {layer: network.get_submodule(layer) for layer in description.layers}
    return compared(pack.file(forward.graph), forward.feeds, description, linears, evaluate)


def size_ratio(quick: bool) -> Found:
    """Bytes of packs less 5 MB over those of their weights, each precision once."""
    name, bound = "export.pack_size_ratio", 1.05
    if (reason := absent()) is not None:
        return [], Claim(name, "<=", bound, reason)
    rows = []
    for case in CASES.values():
        manifest = case.open().manifest
        size, weights = sum(info.bytes for info in manifest.files), sum(manifest.weights.values())
        graphs = sum(graph.role == "row" for graph in manifest.graphs)
        row = {"op": "size", "case": case.name, "variants": graphs, "mb": size / 1e6, "weights_mb": weights / 1e6}
        rows.append(row | {"ratio": (size - SLACK) / weights})
    worst = max(rows, key=lambda row: float(row["ratio"]))
    how = f"bytes of all files less 5 MB over the model's weights, worst: {worst['case']} ({worst['variants']} graphs)"
    return rows, Claim(name, "<=", bound, how, float(worst["ratio"]), None, len(rows))


def int8_speedup(quick: bool) -> Found:
    """Time of a row of the float32 pack over that of the int8 pack, ONNX Runtime on both, OpenVINO beside."""
    name, bound = "export.int8_speedup_ort", 1.5
    if (reason := absent()) is not None:
        return [], Claim(name, ">=", bound, reason)
    threads = torch.get_num_threads()
    cases = {dtype: CASES[f"{LARGE.name}, variants{told}"] for dtype, told in (("float32", ""), ("int8", ", int8"))}
    calls: dict[str, Candidate] = {}
    for dtype, case in cases.items():
        pack = case.open()
        calls[f"onnxruntime {dtype}"] = Candidate(Forward(pack, whole(pack), OnnxRuntime(threads)))
        if not quick and find_spec("openvino") is not None:
            calls[f"openvino {dtype}"] = Candidate(Forward(pack, whole(pack), OpenVino(threads)))
    times = interleave(calls, seconds=SECONDS[quick], least=5)
    rows = [
        {"op": "row", "case": f"{LARGE.name} x{ROWS}", "backend": key.split()[0], "dtype": key.split()[1],
         "ms": timing.median, "timing": timing.to_dict()}
        for key, timing in times.items()
    ]  # fmt: skip
    value, interval = ratio_of_medians([times["onnxruntime float32"]], [times["onnxruntime int8"]], SEED)
    how = f"{LARGE.name}, a guided row of one picture, {threads} threads, medians of interleaved rounds"
    rounds = len(times["onnxruntime int8"].ms)
    return rows, Claim(name, ">=", bound, how, value, (interval[0], interval[1]), rounds)


def cached_rows(quick: bool) -> list[dict[str, Any]]:
    """Share of a row's work that caches and tokens remove, and share of its time in ONNX Runtime."""
    rows: list[dict[str, Any]] = []
    for model in (EMOJI,) if quick else (EMOJI, LARGE):
        case = CASES[f"{model.name}, variants"]
        pack, backend = case.open(), OnnxRuntime(torch.get_num_threads())
        forwards = {graph.name: Forward(pack, graph, backend) for graph in pack.graphs("row")}
        times = interleave({name: Candidate(each) for name, each in forwards.items()}, seconds=SECONDS[quick], least=5)
        shares = shares_of(pack, model.opened.spec.costs)
        for name, timing in times.items():
            ratio, _ = ratio_of_medians([timing], [times[whole(pack).name]], SEED)
            rows.append({
                "op": "cached", "case": case.name, "setting": name, "share": shares[name], "time_ratio": ratio,
                "gap": ratio - shares[name], "ms": timing.median,
            })  # fmt: skip
    return rows


def shares_of(pack: Pack, costs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Of every row graph the share of a whole row's work that it computes."""
    plan, found = pack.plan, dict[str, float]()
    assert plan.binding is not None, "plans of packs are bound"
    names = {graph.structure: graph.name for graph in pack.graphs("row")}
    for step, calls, cached in zip(plan.steps, calls_of(plan), caches(plan).rows, strict=True):
        if step.variant is not None and len(calls.own) == 1:
            args = step.variant, cached.uses, plan.binding.blocks, costs, plan.binding.tokens
            found[names[calls.own[0].structure]] = share_of(*args)
    return found


def rtx_built(quick: bool) -> Found:
    """Engines that TensorRT-RTX builds of one pack's graphs, strongly typed, without a GPU."""
    name, bound = "export.tensorrt_rtx_graphs_built", 4.0
    if (reason := absent()) is not None:
        return [], Claim(name, ">=", bound, reason)
    python = Path(RTX, "bin", "python").absolute()
    if not python.exists():
        return [], Claim(name, ">=", bound, f"no TensorRT-RTX in {RTX}; `make bench-setup` installs it there")
    import vivace.export

    case = CASES[f"{EMOJI.name}, variants, int8"]
    with tempfile.TemporaryDirectory() as place:
        vivace.export.export_tensorrt(case.open(), Path(place) / "engines")
        script = Path(vivace.export.__file__).with_name("tensorrt_build.py")
        command = [str(python), str(script), str(Path(place) / "engines"), "--flavour", "tensorrt_rtx"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if not done.stdout.strip():
        raise BackendError(f"bench export: the build of engines failed: {done.stderr.strip()[-300:]}")
    told = json.loads(done.stdout)
    graphs = told["graphs"].items()
    rows = [{"op": "engine", "case": case.name, "setting": name, **_plain(found)} for name, found in graphs]
    built = sum(bool(row.get("built", row.get("bytes"))) for row in rows)
    how = f"{case.name}, {told['flavour']} {told['version']} for {told['target']}, strongly typed; not run: no GPU"
    return rows, Claim(name, ">=", bound, how, float(built), None, len(rows))


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if isinstance(value, (bool, int, float, str))}


def whole(pack: Pack) -> Graph:
    """The graph that computes every token of every block and keeps nothing."""
    found = [graph for graph in pack.graphs("row") if graph.structure is not None]
    return next(graph for graph in found if graph.structure == Structure(precisions=_precisions(graph)))


def _precisions(graph: Graph) -> Any:
    return () if graph.structure is None else graph.structure.precisions


TIME, LABEL = 500.0, 0


class Forward:
    """One graph of a pack with inputs of a row of `ROWS`; a call runs it into memory that is bound."""

    def __init__(self, pack: Pack, graph: Graph, backend: Backend) -> None:
        self.pack, self.graph, self.runner = pack, graph, backend.open(pack, graph)
        self.feeds = self._feeds(backend)
        made = self.runner.run(self.feeds, {port.name: None for port in self.graph.outputs})
        self.outputs = {name: np.empty_like(array) for name, array in made.items()}

    def __call__(self) -> Any:
        return self.runner.run(self.feeds, self.outputs)

    def _feeds(self, backend: Backend) -> dict[str, Any]:
        binding = self.pack.plan.binding
        assert binding is not None, "plans of packs are bound"
        channels, height, width = binding.latent_shape
        classes = int(self.pack.manifest.prompts["classes"])
        known = {
            "timestep": np.full(ROWS, TIME, np.float32), "label": np.array([LABEL, classes], np.int64),
            "size": np.array([height, width], np.int64),
        }  # fmt: skip
        for role in ("prepare", "positions"):
            for graph in self.pack.graphs(role):
                inputs = {port.name: known[port.name] for port in graph.inputs}
                made = backend.open(self.pack, graph).run(inputs, {port.name: None for port in graph.outputs})
                known |= made
        active = int(min(step.variant.keep for step in self.pack.plan.steps if step.variant is not None))
        dims = {"rows": ROWS, "height": height, "width": width, "tokens": binding.tokens, "active": active}
        random = np.random.default_rng(SEED)
        for port in self.graph.inputs:
            shape = [size if isinstance(size, int) else dims[size] for size in port.shape]
            if port.name in known:
                continue
            if port.source == "tokens":
                ids = np.sort(random.permutation(binding.tokens)[:active])
                known[port.name] = np.ascontiguousarray(np.broadcast_to(ids, shape)).astype(np.int64)
            elif port.source == "latent":
                one = random.standard_normal((1, *shape[1:]))
                known[port.name] = np.ascontiguousarray(np.broadcast_to(one, shape)).astype(np.float32)
            else:
                known[port.name] = random.standard_normal(shape).astype(storage(port.dtype))
        return {port.name: known[port.name] for port in self.graph.inputs}


def absent() -> str | None:
    """Why nothing can be measured here."""
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    return f"{missing[0]} is not installed: pip install 'vivace[onnx]'" if missing else None


CLAIMS: Mapping[str, Callable[[bool], Found]] = {
    "export.max_rel_error_fp32": fp32_error,
    "export.int8_rel_error_same_description": int8_error,
    "export.pack_size_ratio": size_ratio,
    "export.int8_speedup_ort": int8_speedup,
    "export.tensorrt_rtx_graphs_built": rtx_built,
}


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All rows and claims; with `claim`, that one and the rows behind it."""
    rows, claims = of_claims("export", CLAIMS, op, claim, quick)
    if claim is None and absent() is None:
        rows += cached_rows(quick)
    return report("export", rows, claims)
