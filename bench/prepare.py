"""What `make bench-setup` prepares, so that a claim takes seconds: `python -m vivace.bench.prepare`.

Models with random weights, exported graphs, inductor's code, calibration tables and converged latents; never timings
or errors. All is keyed by what it depends on and appears at once: stop it, run it again, and it goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch

from vivace.bench import caching_cases, e2e, export, export_packs, solvers, solvers_guidance, solvers_search
from vivace.bench.artefacts import Artefact, folder, megabytes
from vivace.bench.int8_weights import int8_weights
from vivace.bench.models import MODELS
from vivace.bench.peers import graphs, inductor, runtime
from vivace.errors import VivaceError
from vivace.kernels.spec import CPU, missing

PAIR = 2  # rows of a guided evaluation
# (model, dtypes and batches of inductor's code, whether INT8 and ONNX are needed too)
PLANS = (
    ("emoji", (("bfloat16", PAIR), ("float32", PAIR)), True),
    ("DiT-B/2", (("bfloat16", 1), ("float32", 1), ("bfloat16", PAIR), ("float32", PAIR)), True),
    ("DiT-XL/2", (), True),
)


def artefacts() -> Iterator[Artefact]:
    """Everything that can be made with what is installed, the quickest claims' needs first."""
    threads = torch.get_num_threads()
    for name, compiled, everything in PLANS:
        model = MODELS[name]
        if model.artefact is not None:
            yield model.artefact
        if missing(CPU) is None:
            yield int8_weights(model)
            if name == "emoji":
                yield from (caching_cases.table_artefact(e2e.emoji_case(), base) for base in caching_cases.BASES)
                yield from solvers_search.artefacts()
                yield from (solvers_guidance.tables(guidance) for guidance in solvers_guidance.GUIDANCE)
                yield solvers_guidance.adaptive(solvers_guidance.GUIDANCE[0])
        if runtime("onnx_runtime").why_not("float32") is None and everything:
            yield graphs.onnx_int8(model, "dynamic")
        if export.absent() is None:
            yield from (case.artefact for case in export_packs.CASES.values() if case.model is model)
        if runtime("open_vino").why_not("float32") is None:
            yield graphs.openvino(model)
            if everything:
                yield graphs.openvino(model, int8=True)
        if runtime("inductor").why_not("float32") is None:
            for dtype, batch in compiled:
                yield inductor.package(model, dtype, batch, threads)


def latents() -> None:
    """Converged latents of the bundled model."""
    solvers.prepare()
    e2e.emoji_case().converged()


def main() -> int:
    """Make what is missing; one line each. Returns 1 when something could not be made."""
    begin, failed = time.perf_counter(), 0
    for artefact in artefacts():
        there = artefact.ready
        try:
            artefact.get()
            print("there " if there else "made  ", artefact.told(), flush=True)
        except (VivaceError, RuntimeError, OSError, ValueError) as error:  # of foreign exporters
            failed += 1
            print("FAILED", artefact.kind, f"{type(error).__name__}: {str(error).splitlines()[0]:.200}", flush=True)
    latents()
    print(f"converged latents are there; {megabytes(folder()):.0f} MB in {folder()}")
    print(f"{(time.perf_counter() - begin) / 60:.1f} min in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
