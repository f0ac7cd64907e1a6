"""Inductor on the `diffusers` network: frozen, prepacked weights and static shapes, its code kept on disk.

`torch.compile` with freezing keeps nothing on disk that a later process could take up, so the same code is generated
ahead of time (AOTInductor): compiled once, loaded in seconds, called without guards.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vivace.bench.artefacts import DESCRIPTION, Artefact, versions
from vivace.bench.compiling import no_longer_than
from vivace.bench.models import BenchModel
from vivace.bench.peers import Ready, absent
from vivace.bench.peers.graphs import Plain

NAME = "torch.compile"
DTYPES = ("float32", "bfloat16")
SECONDS = 1500  # that compiling may take
FILE = "network.pt2"
FORMAT = 1


def why_not(dtype: str) -> str | None:
    """None, or why it cannot run."""
    return absent("diffusers")


def make(model: BenchModel, dtype: str, batch: int, threads: int) -> Ready:
    """Loaded from the code on disk, generated now when it is not there; compile_s counts both."""
    place = package(model, dtype, batch, threads).get()
    begin = time.perf_counter()
    compiled: Any = torch._inductor.aoti_load_package(str(place / FILE))

    def call(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with torch.inference_mode():  # the code takes strides for granted
            prediction: Tensor = compiled(x.to(getattr(torch, dtype)).contiguous(), t.contiguous(), labels.contiguous())
            return prediction.float()

    call(*model.inputs(batch))
    made = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))["seconds"]
    seconds = made + time.perf_counter() - begin
    return Ready(call, seconds, versions("diffusers", "torch"), "inductor ahead of time, freezing, static shapes")


def package(model: BenchModel, dtype: str, batch: int, threads: int) -> Artefact:
    """The compiled network for one dtype, batch and number of threads, on this processor."""
    key = {
        "format": FORMAT, "fingerprint": model.opened.fingerprint, "dtype": dtype, "batch": batch, "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(), **versions("torch", "diffusers"),
    }  # fmt: skip
    kind = f"inductor-{model.short}-{dtype}-{batch}"
    return Artefact(kind, key, lambda place: _compile(model, dtype, batch, threads, place / FILE))


def _compile(model: BenchModel, dtype: str, batch: int, threads: int, path: Path) -> None:
    network = Plain(model.transformer(getattr(torch, dtype)))
    settings = {"freezing": True, "cpp.threads": threads}
    with torch.no_grad(), no_longer_than(SECONDS):
        program = torch.export.export(network, model.inputs(batch, getattr(torch, dtype)))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
