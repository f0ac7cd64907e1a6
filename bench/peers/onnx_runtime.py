"""ONNX Runtime on the exported graph: float32, and INT8 with ranges measured at run time or calibrated before."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from vivace.bench.artefacts import versions
from vivace.bench.models import BenchModel
from vivace.bench.peers import Ready, absent
from vivace.bench.peers.graphs import FILE, onnx, onnx_int8

NAME = "onnxruntime"
DTYPES = ("float32", "int8 dynamic", "int8 static")


def why_not(dtype: str) -> str | None:
    """None, or why it cannot run."""
    return absent("diffusers", "onnx", "onnxscript", "onnxruntime")


def make(model: BenchModel, dtype: str, batch: int, threads: int) -> Ready:
    """All optimisations, static batch, no spinning: its threads would take the cores from whoever runs next."""
    import onnxruntime as ort

    artefact = onnx(model) if dtype == "float32" else onnx_int8(model, dtype.split()[1])
    path = artefact.get() / FILE
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_free_dimension_override_by_name("batch", batch)
    options.log_severity_level = 3
    begin = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - begin

    def call(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        feeds = {"x": x.numpy(), "t": t.numpy(), "labels": labels.numpy()}
        return torch.from_numpy(session.run(None, feeds)[0])

    return Ready(call, seconds, versions("onnxruntime", "onnx"), f"all optimisations, {threads} threads, no spinning")
