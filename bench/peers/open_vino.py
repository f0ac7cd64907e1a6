"""OpenVINO on the exported graph: float32, bfloat16 by its precision hint, INT8 by the static QDQ graph."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from vivace.bench.artefacts import versions
from vivace.bench.models import BenchModel
from vivace.bench.peers import Ready, absent
from vivace.bench.peers.graphs import openvino

NAME = "openvino"
DTYPES = ("float32", "bfloat16", "int8")
HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}  # bfloat16 around INT8 products was slower


def why_not(dtype: str) -> str | None:
    """None, or why it cannot run."""
    if (reason := absent("diffusers", "onnx", "onnxscript", "onnxruntime", "openvino")) is not None:
        return reason
    import openvino as ov

    if dtype == "bfloat16" and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "openvino: this processor has no bfloat16 arithmetic"
    return None


def make(model: BenchModel, dtype: str, batch: int, threads: int) -> Ready:
    """Latency hint, one stream, static shapes, inputs and outputs shared without copies."""
    import openvino as ov

    path = openvino(model, int8=dtype == "int8").get() / "graph.xml"
    begin = time.perf_counter()
    graph = ov.Core().read_model(path)
    graph.reshape({"x": [batch, *model.opened.shape], "t": [batch], "labels": [batch]})
    settings = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": HINTS[dtype],
    }  # fmt: skip
    request = ov.compile_model(graph, "CPU", settings).create_infer_request()
    seconds = time.perf_counter() - begin

    def call(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        feeds = {"x": x.numpy(), "t": t.numpy(), "labels": labels.numpy()}
        found = request.infer(feeds, share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    hint = f"latency, 1 stream, {threads} threads, precision hint {HINTS[dtype]}"
    return Ready(call, seconds, versions("openvino", "onnxruntime"), hint)
