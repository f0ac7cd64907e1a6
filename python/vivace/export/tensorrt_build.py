"""Builds the engines of a folder that `vivace export tensorrt` wrote. Needs Python and TensorRT (or -RTX) alone:

    python -m vivace.export.tensorrt_build FOLDER
    python tensorrt_build.py FOLDER [--graph NAME]... [--flavour tensorrt_rtx]

Networks are strongly typed. FOLDER/build.json says which graphs, profiles and flags; engines and report.json are
written beside it, each whole or not at all. The output is the report as JSON; exit code 1 where a graph failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

JOB, REPORT, CACHE = "build.json", "report.json", "timing.cache"
FLAVOURS = ("tensorrt", "tensorrt_rtx")


def flavour(wanted: str | None = None) -> str | None:
    """The package that builds here, the wanted one or the first that imports; None: there is none."""
    for name in (wanted,) if wanted else FLAVOURS:
        try:
            importlib.import_module(name)
        except Exception:  # a wheel without its libraries fails in ways of its own
            continue
        return name
    return None


def build_folder(folder: Path, graphs: Iterable[str] = (), wanted: str | None = None) -> dict[str, Any]:
    """Build the engines of a folder; graphs: names, none: all. Returns the report, which is written too.

    Raises RuntimeError when no TensorRT is here, ValueError for a folder or graph that is none.
    """
    name = flavour(wanted)
    if name is None:
        raise RuntimeError(f"no TensorRT here: install {wanted or 'tensorrt (with a GPU) or tensorrt-rtx'}")
    try:
        job = json.loads((folder / JOB).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder}: no {JOB} in it; make the folder with `vivace export tensorrt`") from None
    chosen = list(graphs) or list(job["graphs"])
    if unknown := sorted(set(chosen) - set(job["graphs"])):
        raise ValueError(f"{folder}: has no graph {unknown[0]!r}; it has {', '.join(job['graphs'])}")
    builder = _Builder(importlib.import_module(name), name, folder, job)
    report = {
        "flavour": name,
        "version": builder.version,
        "target": job["target"],
        "strongly_typed": True,
        "graphs": {graph: builder.build(graph) for graph in chosen},
    }
    _write(folder / REPORT, json.dumps(report, indent=1, sort_keys=True).encode())
    return report


class _Builder:
    """Builds one folder's graphs with one flavour of TensorRT, which names things alike."""

    def __init__(self, trt: Any, name: str, folder: Path, job: Mapping[str, Any]) -> None:
        self.trt, self.rtx, self.folder, self.job = trt, name == "tensorrt_rtx", folder, job
        self.version = str(trt.__version__)

    def build(self, graph: str) -> dict[str, Any]:
        """One graph: what came of it, and why it failed where it did."""
        began = time.perf_counter()
        logger = _logger(self.trt)
        builder = self.trt.Builder(logger)
        network = builder.create_network(self._creation())
        parser = self.trt.OnnxParser(network, logger)
        told = self.job["graphs"][graph]
        report: dict[str, Any] = {"parsed": bool(parser.parse_from_file(str(self.folder / told["file"])))}
        report["built"] = False
        if not report["parsed"]:
            report["errors"] = [parser.get_error(i).desc() for i in range(parser.num_errors)] or logger.lines
            return report
        report |= self._layers(network)
        config = self._config(builder)
        for profile in told["profiles"]:
            config.add_optimization_profile(self._profile(builder, network, profile["inputs"]))
        engine = builder.build_serialized_network(network, config)
        report["seconds"] = round(time.perf_counter() - began, 3)
        report["warnings"] = [line for line in logger.lines if line not in logger.errors]
        if engine is None:
            return report | {"errors": logger.errors or logger.lines}
        data = bytes(engine)
        _write(self.folder / f"{graph}.engine", data)
        self._keep_timings(config)
        report |= {"built": True, "bytes": len(data), "profiles": [profile["name"] for profile in told["profiles"]]}
        return report | self._inspected(data)

    def _creation(self) -> int:
        flags = self.trt.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0  # 11 knows no other kind

    def _config(self, builder: Any) -> Any:
        trt, config = self.trt, builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if target := self.job["target"]:
            if not self.rtx:
                raise ValueError(f"target {target}: TensorRT builds for the GPU it finds; leave the target out")
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
        if self.job["strip"]:
            config.set_flag(trt.BuilderFlag.STRIP_PLAN)
            # the same weights come back, and refitting others is known to lose biases in some releases
            config.set_flag(trt.BuilderFlag.REFIT if self.rtx else trt.BuilderFlag.REFIT_IDENTICAL)
        if self.job["timing_cache"] and not self.rtx:
            path = self.folder / CACHE
            config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.exists() else b""), False)
        return config

    def _profile(self, builder: Any, network: Any, inputs: Mapping[str, Any]) -> Any:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            told = inputs.get(tensor.name, {})
            if "values" in told and tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, *told["values"])
            elif "shapes" in told:
                profile.set_shape(tensor.name, *told["shapes"])
        return profile

    def _layers(self, network: Any) -> dict[str, Any]:
        """Layers by kind and by type of their first output, as they were parsed."""
        kinds: Counter[str] = Counter()
        types: Counter[str] = Counter()
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            kinds[str(layer.type).rpartition(".")[2]] += 1
            if layer.num_outputs:
                types[str(layer.get_output(0).dtype).rpartition(".")[2]] += 1
            if str(layer.type).endswith("ATTENTION_OUTPUT"):
                layer.__class__ = self.trt.IAttentionOutputLayer  # how the package casts
                layer.attention.decomposable = True  # into products and a softmax, where no kernel has its sizes
        counts = {"kinds": dict(sorted(kinds.items())), "types": dict(sorted(types.items()))}
        return {"layers": network.num_layers, **counts}

    def _keep_timings(self, config: Any) -> None:
        cache = config.get_timing_cache() if self.job["timing_cache"] and not self.rtx else None
        if cache is not None:
            _write(self.folder / CACHE, bytes(cache.serialize()))

    def _inspected(self, data: bytes) -> dict[str, Any]:
        """Layers of the engine with precision and tactic; where it cannot be loaded, that it was not."""
        try:
            runtime = self.trt.Runtime(_logger(self.trt))
            engine = runtime.deserialize_cuda_engine(data)
            if engine is None:
                return {"engine": "not loaded: no GPU here that runs it"}
            text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
            return {"engine": json.loads(text)}
        except Exception as error:
            return {"engine": f"not inspected: {error}"}


def _logger(trt: Any) -> Any:
    """Keeps warnings and errors instead of printing them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                self.lines.append(message)
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Logger()


def _write(path: Path, data: bytes) -> None:
    """All or nothing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--graph", action="append", default=[], help="only this graph; repeatable")
    parser.add_argument("--flavour", choices=FLAVOURS, help="package that builds; default: the first that is here")
    given = parser.parse_args(argv)
    try:
        report = build_folder(given.folder, given.graph, given.flavour)
    except (RuntimeError, ValueError) as error:
        print(f"tensorrt_build: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report))
    return 0 if all(graph["built"] for graph in report["graphs"].values()) else 1


if __name__ == "__main__":
    # run as a file, the folder it lies in comes first, where other modules have the names of packages
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
