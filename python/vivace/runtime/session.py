"""A session runs an opened pack, any number of requests one after the other: the whole loop without torch."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vivace.engine.token_layout import Layout
from vivace.errors import ArgumentError, BackendError, DtypeError, OutputError, ShapeError, StateError
from vivace.runtime.calling import Graphs, branches_of
from vivace.runtime.loop import Asked, Run
from vivace.runtime.ort import Backend, OnnxRuntime
from vivace.runtime.pack import Pack
from vivace.runtime.program import Given, Program, program_of
from vivace.runtime.prompts import prompts_of

Array: TypeAlias = NDArray[Any]
Callback: TypeAlias = Callable[[int, Array], Any]
BACKENDS = ("onnxruntime", "openvino", "tensorrt")
SEED_LIMIT, PICTURE_LIMIT = 1 << 64, 1 << 32


@dataclass(frozen=True, slots=True)
class PackResult:
    """images: PIL pictures, none where the pack cannot decode; latents: float32 [n, *latent]; receipt: plain JSON data,
    rows with the graphs they called and their times, what guards decided, tokens computed; slots: the plan's other
    results by name; computed: int32 [n, *grid], evaluations that computed each token, None where all do."""

    images: list[Image.Image]
    latents: Array
    receipt: dict[str, Any]
    slots: Mapping[str, Array]
    computed: Array | None = None


class PackSession:
    """The graphs of a pack, loaded and ready. One request at a time, from any thread.

    backend: one of `BACKENDS`, or an object that opens graphs; threads: of a forward, None: as the backend likes.
    Raises BackendError for one that is not here, PackError for graphs that it cannot load.
    """

    kept_programs = 16

    def __init__(self, pack: Pack, *, backend: str | Backend = "onnxruntime", threads: int | None = None) -> None:
        began = time.perf_counter()
        self.pack, self.plan, self.threads = pack, pack.plan, threads
        self.backend = backend_of(backend, threads) if isinstance(backend, str) else backend
        self.graphs = Graphs.of(pack, self.backend)
        self.branches = branches_of(self.plan)
        self.prompts = prompts_of(pack, self.graphs.encode, self.branches)
        assert self.plan.binding is not None, "the plan of a pack is bound"
        self.shape = self.plan.binding.latent_shape
        self.layout = layout_of(pack.manifest.model, self.shape)
        self._lock, self._programs = threading.Lock(), dict[Any, Program]()
        self.load_ms = (time.perf_counter() - began) * 1e3

    def __call__(
        self,
        prompt: Any = None,
        *,
        n: int = 1,
        index: int = 0,
        seed: int = 0,
        latents: Array | None = None,
        guidance_scale: float | None = None,
        image: Any = None,
        mask: Any = None,
        inputs: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> PackResult:
        """Pictures `index` .. `index + n - 1` of `seed` for a prompt.

        Args:
            prompt: text, a class, or tensors by branch and key, as the pack's manifest says.
            latents: unit normal [n, *latent] in place of the generator's draw 0.
            guidance_scale: in place of the plan's.
            image, mask: start and mask of plans that read `input:start` and `mask`: float arrays of the latent's shape,
                or [n, ...]; a picture or its path as image where latents are pixels.
            inputs: further numbers and arrays that the plan reads, by name.
            callback: called with the row executed and slot x [n, *latent]; returning False stops the run.
        Raises: ArgumentError, ShapeError, DtypeError, PromptError before any work; StateError when it was stopped.
        """
        given: dict[str, Any] = {"n": n, "index": index, "seed": seed, "latents": latents}
        given |= {"guidance_scale": guidance_scale, "image": image, "mask": mask, "inputs": inputs}
        with self._lock:
            run = self.begin(prompt, **given)
            while not run.done:
                run.step()
                if callback is not None and callback(run.row - 1, run.slot("x")) is False:
                    raise StateError(f"the callback stopped the run after row {run.row - 1}")
            return self.finish(run)

    def begin(
        self,
        prompt: Any = None,
        *,
        n: int = 1,
        index: int = 0,
        seed: int = 0,
        latents: Array | None = None,
        guidance_scale: float | None = None,
        image: Any = None,
        mask: Any = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Run:
        """The same request at its first row, for callers who step it themselves; one thread at a time."""
        check_request(n, index, seed)
        scale = None if guidance_scale is None else float(guidance_scale)
        named = {"start": image, "mask": mask, "guidance_scale": scale}
        offered = {**(inputs or {}), **{name: value for name, value in named.items() if value is not None}}
        values, tensors, warnings = self._inputs(offered, n)
        if latents is not None:
            tensors["noise"] = self._tensor("latents", latents, n)
        clock = [time.perf_counter()]
        condition = self.prompts(prompt)
        clock.append(time.perf_counter())
        pictures, told = tuple(range(index, index + n)), (condition.said, tuple(warnings))
        asked = Asked(pictures, seed, condition.tensors, values, tensors, *told)
        run = Run(self.graphs, self.plan, self.layout, asked, self._program(asked))
        run.clock = [*clock, time.perf_counter()]
        return run

    def finish(self, run: Run) -> PackResult:
        """Pictures, latents and receipt of a run that is done."""
        slots = {name: run.slot(name) for name in self.plan.results}
        x = slots.pop("x")
        run.clock.append(time.perf_counter())
        images = self.decode(x)
        run.clock.append(time.perf_counter())
        computed = None if run.tokens is None else run.tokens.computed.reshape(len(x), *self.layout.grid)
        return PackResult(images, x, self._receipt(run), slots, computed)

    def _program(self, asked: Asked) -> Program:
        """The plan's rows for what a request gives; those of the last requests are remembered."""
        given = Given(asked.values, frozenset(asked.tensors))
        key = tuple(sorted(given.values.items())), given.tensors
        if key not in self._programs:
            while len(self._programs) >= self.kept_programs:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = program_of(self.plan, given)
        return self._programs[key]

    def decode(self, latents: Array) -> list[Image.Image]:
        """Pictures of latents float32 [n, *latent]; none where the pack has no decoder."""
        if self.graphs.decode is None:
            return []
        graph = self.graphs.decode.graph
        given = {port.name: np.ascontiguousarray(latents, np.float32) for port in graph.inputs}
        name = next(port.name for port in graph.outputs if port.source == "picture")
        found = self.graphs.decode.runner.run(given, {name: None})[name]
        return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in found]

    def _inputs(self, offered: Mapping[str, Any], n: int) -> tuple[dict[str, float], dict[str, Array], list[str]]:
        """Numbers and tensors by input name, checked against what the plan reads."""
        known = {ref.name: ref for ref in self.plan.inputs}
        values: dict[str, float] = {}
        tensors: dict[str, Array] = {}
        warnings = []
        for name, value in offered.items():
            if name == "guidance_scale" and name not in known:
                warnings.append("guidance_scale had no effect: the plan has no guidance")
            elif name not in known and name != "x_init":
                raise ArgumentError(f"request: the plan reads no input {name!r}; it reads {sorted(known) or 'none'}")
            elif isinstance(value, (int, float)):
                if not math.isfinite(value):
                    raise ArgumentError(f"request: {name} is {value}; a finite number is needed")
                values[name] = float(value)
            else:
                tensors[name] = self._tensor(name, self._latent(value) if name == "start" else value, n)
        for name, ref in known.items():
            if name not in offered:
                if ref.default is None:
                    raise ArgumentError(f"request: the plan needs input {name!r}; give it")
                values[name] = ref.default
        self._check_fed(values)
        return values, tensors, warnings

    def _check_fed(self, values: Mapping[str, float]) -> None:
        for step in self.plan.steps:
            for _, coef in step.net_inputs:
                if (name := getattr(coef, "name", None)) is not None and name not in values:
                    raise ArgumentError(f"request: {name} is a tensor; the network is fed one number, so give that")

    def _latent(self, image: Any) -> Any:
        """A start as an array: itself, or a picture where latents are pixels."""
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            return image
        if not self.pack.manifest.model.get("pixels"):
            raise ArgumentError(f"request: this pack encodes no pictures; give image as a latent {self.shape}")
        from vivace.models.pictures import to_array

        return to_array(image, (self.shape[0], self.shape[1], self.shape[2]))

    def _tensor(self, name: str, value: Any, n: int) -> Array:
        """A float32 array [n, *latent] of what a request offers under `name`."""
        array = np.asarray(value)
        if array.dtype.kind != "f":
            raise DtypeError(f"request: {name} is {array.dtype}; a float array is needed")
        fits = array.shape == (n, *self.shape) or (name != "latents" and array.ndim <= len(self.shape))
        try:
            full = np.broadcast_to(array, (n, *self.shape)) if fits else None
        except ValueError:
            full = None
        if full is None:
            raise ShapeError(f"request: {name} has shape {array.shape}; needs {(n, *self.shape)}")
        if not np.isfinite(full).all():
            raise ArgumentError(f"request: {name} holds NaN or infinity; give finite values")
        return np.ascontiguousarray(full, np.float32)

    def _receipt(self, run: Run) -> dict[str, Any]:
        evaluated = [record for record in run.records if record.calls]
        return {
            "plan_hash": self.plan.hash,
            "model": self.pack.manifest.model.get("name", ""),
            "fingerprint": self.pack.manifest.model["fingerprint"],
            "backend": self.backend.name,
            "version": getattr(self.backend, "version", ""),
            "precision": dict(self.pack.manifest.precision),
            "threads": self.threads,
            "n": len(run.asked.pictures),
            "seed": run.asked.seed,
            "prompt": run.asked.said,
            "nfe": len(evaluated),
            "calls": sum(len(record.calls) for record in evaluated),
            "kept_bytes": run.kept.nbytes,
            "load_ms": round(self.load_ms, 3),
            "ms": _ms(run.clock),
            "rows": [record.to_dict() for record in run.records],
            "decisions": [] if run.watch is None else [decision.to_dict() for decision in run.watch.decisions],
            "warnings": list(run.asked.warnings),
        }


def _ms(clock: Sequence[float]) -> dict[str, float]:
    """Milliseconds of the phases of a request between readings of a clock, in seconds."""
    names = ("encode", "prepare", "loop", "decode")
    found = {name: (end - start) * 1e3 for name, (start, end) in zip(names, pairwise(clock), strict=True)}
    return {name: round(ms, 3) for name, ms in {**found, "all": (clock[-1] - clock[0]) * 1e3}.items()}


def backend_of(name: str, threads: int | None = None) -> Backend:
    """The backend of that name. Raises BackendError."""
    if name == "onnxruntime":
        return OnnxRuntime(threads)
    if name == "openvino":
        from vivace.runtime.openvino import OpenVino

        return OpenVino(threads)
    if name == "tensorrt":
        from vivace.runtime.tensorrt import TensorRt

        return TensorRt()
    raise BackendError(f"run: backend {name!r} is not here; use one of {', '.join(BACKENDS)}")


def write_latents(results: Sequence[PackResult], path: str | os.PathLike[str]) -> None:
    """The latents of results, one after the other, as a `.npy` file of exactly that name. Raises OutputError."""
    try:
        with open(path, "wb") as file:
            np.save(file, np.concatenate([result.latents for result in results]))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def layout_of(model: Mapping[str, Any], shape: tuple[int, ...]) -> Layout:
    """Where image tokens lie in latents: as the manifest's `model.layout` says, else patches of [C, H, W]."""
    said = model.get("layout")
    if said is not None:
        return Layout(shape, tuple(said["edges"]), int(said.get("channels", 0)), int(said.get("places", 1)))
    return Layout(shape, (shape[0], *model.get("patch", (1,) * (len(shape) - 1))))


def check_request(n: Any, index: Any, seed: Any) -> None:
    """Raise ArgumentError unless n, index and seed are integers in range."""
    for name, value, low, high in (
        ("n", n, 1, 1 << 20),
        ("index", index, 0, PICTURE_LIMIT - (n if isinstance(n, int) else 0) + 1),
        ("seed", seed, 0, SEED_LIMIT),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < high:
            raise ArgumentError(f"request: {name} is {value!r}; an integer from {low} to {high - 1} is needed")
