"""Products, the denoiser and whole pictures on a GPU: ours against torch, compiled, and quantized.

    python -m vivace.bench.on_gpu products|denoiser|large|cached|e2e [OUT.json]

Every candidate runs in the same interleaved rounds: a span of calls between two synchronizations, so that work of the
host counts where the device waits for it, and only there. Each result is compared with eager float32 first. The network
of the peers is that of `diffusers` where it can be imported, else the native one, which computes the same.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vivace
from vivace.bench import device, gpu_cached, gpu_products
from vivace.bench import e2e_cases as cases
from vivace.bench.compiling import no_longer_than
from vivace.bench.e2e import CLASSES
from vivace.bench.harness import Claim, Timing, report
from vivace.bench.models import MODELS, BenchModel, flops, sizes
from vivace.bench.peers import absent
from vivace.bench.peers.loop import draw, scheduler
from vivace.bench.steady import BACKEND, SteadyRow
from vivace.errors import BackendError, VivaceError
from vivace.kernels.spec import error_of
from vivace.models.dit import DiT

SEED = 7
COMPILE_SECONDS = 60  # that a peer may take
SECONDS = 3.0  # of timed rounds of one table
LIMIT = 0.15  # error against eager float32 above which nothing is timed
DENOISERS = (("DiT-B/2", "bfloat16"), ("DiT-XL/2", "bfloat16"), ("DiT-B/2", "float32"))
LARGE = BenchModel("DiT-XL/2, 1024", sizes(28, 16, 72, size=128), "bfloat16")  # 4,096 tokens
# (name, modulation hoisted, precision of the linears); the last ones beside bfloat16
OURS_STEADY = (
    ("vivace", True, None),
    ("vivace, nothing hoisted", False, None),
    ("vivace int8", True, "int8"),
    ("vivace fp8", True, "fp8"),
)
OVER_COMPILE = 1.5  # int8 over torch.compile in bfloat16
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Row:
    """A line of a table: its columns, the call, and what is done untimed before so many calls."""

    columns: dict[str, Any]
    call: Callable[[], Any]
    prepare: Callable[[int], Any] = field(default=lambda calls: None)


# ---------------------------------------------------------------- peers
def network(model: BenchModel, dtype: str) -> tuple[str, Any, Callable[[Any], Network]]:
    """Name of the network, its module on the GPU, and how a module like it is called."""
    kind = getattr(torch, dtype)

    def of_diffusers(module: Any) -> Network:
        return lambda x, t, labels: module(x.to(kind), t.to(x.device), class_labels=labels, return_dict=False)[
            0
        ].float()

    def native(module: Any) -> Network:
        def call(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            half = len(x) // 2  # both branches see the same latents
            return torch.cat(module(x[:half].to(kind), t[:half].to(x.device), labels.view(2, half))).float()

        return call

    if absent("diffusers") is None:
        return "diffusers", model.transformer(kind).to(device.PLACE), of_diffusers
    module = DiT.load(model.folder / "transformer", kind).to(device.PLACE)
    return "native network", module, native


def compiled(module: Any) -> Any:
    """Inductor with its own CUDA graphs, static shapes."""
    return torch.compile(module, mode="reduce-overhead", dynamic=False)


def quantized(kind: str, module: Any) -> Any:
    """Linears of blocks by torchao, activations quantized by token, then compiled."""
    quantization = import_module("torchao.quantization")
    config = getattr(quantization, f"{kind}DynamicActivation{kind}WeightConfig")
    quantization.quantize_(module, config())
    return compiled(module)


def peers(dtype: str) -> dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]]:
    """How a module is changed by each peer, and the packages that takes."""
    found: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
        "eager": (lambda module: module, ()),
        "torch.compile": (compiled, ()),
    }
    if dtype == "bfloat16":
        found["torchao int8"] = (partial(quantized, "Int8"), ("torchao",))
        found["torchao fp8"] = (partial(quantized, "Float8"), ("torchao",))
    return found


def peer(name: str, model: BenchModel, dtype: str, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Any], Network | None]:
    """Columns of a peer and its call, which is None where it cannot run; the columns say why."""
    change, packages = peers(dtype)[name]
    columns: dict[str, Any] = {"backend": name, "dtype": dtype, "reason": absent(*packages)}
    if columns["reason"] is not None:
        return columns, None
    begin = time.perf_counter()
    try:
        with torch.inference_mode(), no_longer_than(COMPILE_SECONDS):
            network_name, module, called = network(model, dtype)
            call = called(change(module))
            call(*inputs)
    except (RuntimeError, OSError, AttributeError, ValueError) as error:  # of foreign compilers
        torch.compiler.reset()
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"
        return columns | {"reason": reason}, None
    torch.cuda.synchronize()
    return columns | {"network": network_name, "compile_s": time.perf_counter() - begin}, call


# ---------------------------------------------------------------- one evaluation
def denoiser() -> Iterator[list[dict[str, Any]]]:
    """One guided evaluation of every model, ours with the solver step; a table each."""
    for name, dtype in DENOISERS:
        yield denoiser_rows(MODELS[name], dtype)


def denoiser_rows(model: BenchModel, dtype: str) -> list[dict[str, Any]]:
    """Rows of one model, a guided pair, timed together."""
    inputs = tuple(tensor.to(device.PLACE) for tensor in model.inputs(2))
    name, module, called = network(model, "float32")
    with torch.inference_mode():
        exact = called(module)(*inputs)
    del module
    table, rows = list[Row](), list[dict[str, Any]]()
    for told, hoist, precision in OURS_STEADY if dtype == "bfloat16" else OURS_STEADY[:2]:
        try:
            steady = SteadyRow(model, dtype, hoist=hoist, precision=precision)
        except VivaceError as error:
            if precision is None:
                raise
            rows.append({"backend": told, "dtype": dtype, "reason": str(error)})
            continue
        columns = {"backend": told, "dtype": dtype, "network": "native", "compile_s": steady.compile_s}
        columns |= {"error": error_of(steady.prediction(model), exact), "host_waits": steady.waits()}
        if not columns["error"] <= LIMIT:
            raise BackendError(f"bench denoiser: {model.name} {dtype}: {told} errs by {columns['error']:.2g}")
        table.append(Row(columns, steady, steady.prepare))
    for each in peers(dtype):
        columns, call = peer(each, model, dtype, inputs)
        if call is None:
            rows.append(columns)
            continue
        with torch.inference_mode():
            columns["error"] = error_of(call(*inputs), exact)
        table.append(Row(columns, _without_gradients(call, inputs)))
    times = device.spans({row.columns["backend"]: (row.call, row.prepare) for row in table}, seconds=SECONDS)
    work = 2 * flops(model.opened.config, modulation=False)
    rows = [described(row.columns, times, work) for row in table] + rows
    return [{"op": "dit", "case": f"{model.name} x2", "tokens": model.tokens, **row} for row in rows]


def _without_gradients(call: Network, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return call(*inputs)

    return run


def described(columns: dict[str, Any], times: Mapping[str, Timing], work: float | None = None) -> dict[str, Any]:
    """A row of the report; ratios above 1: faster than the peer."""
    ms = times[columns["backend"]].median
    told = columns | {"ms": times[columns["backend"]].to_dict(), "seed": SEED}
    told |= {} if work is None else {"tflop_per_s": work / ms / 1e9}
    for column, name in (("over_eager", "eager"), ("over_compile", "torch.compile"), ("over_int8", "torchao int8")):
        told[column] = times[name].median / ms if name in times else None
    return told


def large() -> Iterator[list[dict[str, Any]]]:
    """One guided evaluation at 4,096 tokens."""
    yield denoiser_rows(LARGE, "bfloat16")


def int8_claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """int8 against torch.compile in bfloat16, for every case that was timed."""
    ours = [row for row in rows if row["backend"] == "vivace int8" and "DiT-XL/2" in row["case"]]
    how = "a row of a session against a call of the network, spans of calls, medians"
    return [
        Claim(
            f"gpu.int8_over_compile[{row['case']}]", ">=", OVER_COMPILE, row.get("reason") or how,
            row.get("over_compile"), n=row.get("ms", {}).get("rounds", 0),
        )
        for row in ours
    ]  # fmt: skip


# ---------------------------------------------------------------- whole pictures
def e2e() -> Iterator[list[dict[str, Any]]]:
    """Pictures of the bundled model at matched quality: fewest steps that reach the target, against 50 steps eager."""
    model = MODELS["emoji"]
    opened = model.opened
    labels = tuple(opened.prompts.find(prompt).id for prompt in cases_prompts())
    case = cases.Case(model, labels, float(opened.card["guidance_scale"]))
    reference = case.converged().cpu()
    table = [_picture(case, reference, *options) for options in OURS]
    rows = []
    for options in THEIRS:
        row, columns = _peer(case, reference, *options)
        if row is None:
            rows.append(columns)
        else:
            table.append(row)
    times = device.spans({row.columns["backend"]: (row.call, row.prepare) for row in table}, seconds=SECONDS)
    timed = [described(row.columns, times) for row in table]
    for each in timed:
        each["over_default"] = times["diffusers"].median / each["ms"]["median"] if "diffusers" in times else None
    yield [{"op": "e2e", "case": "emoji", "tokens": model.tokens, **each} for each in timed + rows]


# (name, executor, dtype, solver, steps; None: the fewest that reach the target)
OURS: tuple[tuple[str, str, str, str, int | None], ...] = (
    ("vivace, none", "eager", "float32", "ddim", cases.DEFAULT_STEPS),
    ("vivace, graphs", BACKEND, "float32", "ddim", cases.DEFAULT_STEPS),
    ("vivace, solver + graphs", BACKEND, "float32", "unipc", None),
    ("vivace, all", BACKEND, "bfloat16", "unipc", None),
)


def cases_prompts() -> tuple[str, ...]:
    """Prompts of the pictures whose mean quality is told."""
    from vivace.bench.solvers import PROMPTS

    return tuple(PROMPTS[:8])


def _picture(
    case: cases.Case, reference: Tensor, name: str, backend: str, dtype: str, solver: str, steps: int | None
) -> Row:
    begin = time.perf_counter()
    pipe = vivace.load(str(case.model.folder))
    session = pipe.compile(case.plan(solver, steps or 10), backend=backend, device=device.PLACE, dtype=dtype)
    seconds = time.perf_counter() - begin
    for count in (steps,) if steps else cases.STEPS:
        plan = case.plan(solver, count)
        decibels = cases.quality(cases.vivace_latents(case, session, plan).cpu(), reference)
        if decibels >= cases.TARGET:
            break
    columns = {"backend": name, "dtype": dtype, "solver": solver, "steps": count, "nfe": plan.nfe, "psnr": decibels}
    columns |= {"meets": decibels >= cases.TARGET, "compile_s": seconds, "executor": session.executor.name}
    noise, labels = case.noise[:1], itertools.cycle(CLASSES)
    return Row(columns, lambda: session(next(labels), plan=plan, latents=noise))


def _peer(
    case: cases.Case,
    reference: Tensor,
    name: str,
    dtype: str,
    solver: str,
    steps: int | None,
    packages: tuple[str, ...],
) -> tuple[Row | None, dict[str, Any]]:
    """A runtime in the loop of `diffusers`, and its columns; they say why where it cannot run."""
    columns: dict[str, Any] = {"backend": name, "dtype": dtype, "solver": solver, "reason": absent(*packages)}
    if columns["reason"] is not None:
        return None, columns
    begin = time.perf_counter()
    _, module, called = network(case.model, dtype)
    module, start = CHANGES[name](module)
    call, loop = called(module), scheduler(case.model.scheduler, solver, "leading" if solver == "ddim" else "trailing")
    noise, labels = case.noise.to(device.PLACE), torch.tensor(case.labels, device=device.PLACE)

    def picture(i: int, count: int) -> Tensor:
        with torch.inference_mode():
            start(count)
            return draw(call, loop, count, noise[i : i + 1], labels[i : i + 1], case.null, case.guidance)

    try:
        with no_longer_than(COMPILE_SECONDS):
            picture(0, 2)
    except (RuntimeError, OSError, AttributeError, ValueError) as error:  # of foreign compilers
        return None, columns | {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.200}"}
    columns["compile_s"] = time.perf_counter() - begin
    for count in (steps,) if steps else cases.STEPS:
        latents = torch.cat([picture(i, count).cpu().float() for i in range(len(labels))])
        columns |= {"steps": count, "nfe": count, "psnr": cases.quality(latents, reference)}
        if columns["psnr"] >= cases.TARGET:
            break
    columns["meets"] = columns["psnr"] >= cases.TARGET
    return Row(columns, lambda: picture(0, columns["steps"])), columns


def unchanged(module: Any) -> tuple[Any, Callable[[int], Any]]:
    """As it is."""
    return module, lambda steps: None


def cached(module: Any) -> tuple[Any, Callable[[int], Any]]:
    """cache-dit: the first block computed, the rest reused while its residual hardly changes."""
    from vivace.bench.peers.cachedit import THRESHOLD, WARM_UP

    cache_dit = import_module("cache_dit")

    def settings(steps: int) -> Any:
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=WARM_UP, residual_diff_threshold=THRESHOLD,
            num_inference_steps=steps,
        )  # fmt: skip

    cache_dit.enable_cache(module, cache_config=settings(1))
    return module, lambda steps: cache_dit.refresh_context(module, cache_config=settings(steps))


# How a module becomes that of a peer, and what is called with the number of steps before a picture.
CHANGES: Mapping[str, Callable[[Any], tuple[Any, Callable[[int], Any]]]] = {
    "diffusers": unchanged,
    "torch.compile": lambda module: (compiled(module), lambda steps: None),
    "cache-dit": cached,
}
# (name, dtype, solver, steps as in OURS, packages it takes)
THEIRS: tuple[tuple[str, str, str, int | None, tuple[str, ...]], ...] = (
    ("diffusers", "float32", "ddim", cases.DEFAULT_STEPS, ("diffusers",)),
    ("torch.compile", "bfloat16", "unipc", None, ("diffusers",)),
    ("cache-dit", "bfloat16", "unipc", None, ("diffusers", "cache_dit")),
)


SUITES: Mapping[str, Callable[[], Iterator[list[dict[str, Any]]]]] = {
    "products": gpu_products.products, "denoiser": denoiser, "large": large, "cached": gpu_cached.cached, "e2e": e2e,
}  # fmt: skip
CLAIMS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], list[Claim]]] = {
    "products": gpu_products.claims, "denoiser": int8_claims, "large": int8_claims,
}  # fmt: skip


def main(suite: str, out: Path | None) -> int:
    """Run a suite; print and write each table when it is there. Returns 1 where it cannot run."""
    if not device.present():
        print("bench on_gpu: torch sees no CUDA device", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    try:
        for table in SUITES[suite]():
            rows += [{"device": device.name(), "driver": device.driver(), **row} for row in table]
            for row in table:
                ms = f"{row['ms']['median']:9.3f} ms" if "ms" in row else row["reason"]
                print(f"{row['case']:12} {row['backend']:28} {row['dtype']:9} {ms}", flush=True)
            if out is not None:
                told = report(f"{suite} on a GPU", rows, CLAIMS.get(suite, lambda rows: [])(rows))
                out.write_text(json.dumps(told, indent=1) + "\n")
    except VivaceError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None))
