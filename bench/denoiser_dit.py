"""One evaluation of the native DiT in a session against the same network in every runtime, side by side.

A row of ours is what a session does in its steady state: the network on hoisted modulation vectors, and the solver
step. The peers compute everything at every call, as graphs of a single forward do; beside the hoisted row stands one
that also computes the modulation in the loop, so that both comparisons are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import vivace
from vivace.bench.harness import Candidate, Claim, Timing, interleave, ratio_of_medians
from vivace.bench.int8_weights import WEIGHTS, int8_weights
from vivace.bench.models import MODELS, BenchModel, flops
from vivace.bench.peers import Peer, absent, prepared, reference, runtime
from vivace.bench.roofline import gemm_peak
from vivace.engine.passes import apply_guidance, apply_precision
from vivace.engine.planning import make_plan
from vivace.errors import BackendError
from vivace.kernels.spec import error_of, missing

SEED = 7
BACKEND = "cpu"  # our compiled executor
ROWS = 64  # of the plan that is stepped through, again and again
GUIDANCE = 4.0
SECONDS = {True: 14.0, False: 40.0}  # of timed rounds, quick or not
PEERS = ("eager", "inductor", "onnx_runtime", "open_vino")
BASE, LARGE = "DiT-B/2", "DiT-XL/2"
CLOCKED = 12  # rows whose stages are timed
LIMIT = 0.15  # error against eager float32 above which nothing is timed


class SteadyRow:
    """A session that steps one request through a plan of many rows: one call is one row. batch 2: a guided pair.

    dtype: of the network; "int8": its quantized blocks, the rest in bfloat16.
    """

    def __init__(self, model: BenchModel, dtype: str, batch: int, *, hoist: bool = True) -> None:
        begin = time.perf_counter()
        int8 = dtype == "int8"
        pipe = vivace.load(str(model.folder), quantized=int8_weights(model).get() / WEIGHTS if int8 else None)
        plan = make_plan(pipe.spec.schedule, "ddim", ROWS, prediction=pipe.spec.prediction)
        plan = apply_guidance(plan, GUIDANCE) if batch == 2 else plan
        if int8:
            plan, dtype = apply_precision(plan, "int8"), "bfloat16"
        threads = torch.get_num_threads()
        self.session = pipe.compile(plan, backend=BACKEND, dtype=dtype, threads=threads, hoist=hoist)
        self.model, self.batch, self.state = model, batch, None
        self.label = int(model.inputs(1)[2][0])
        self.prepare(1)
        self()
        self.compile_s = time.perf_counter() - begin

    def prepare(self, calls: int) -> None:
        """A fresh request unless the one in flight has so many rows left."""
        if self.state is None or len(self.state.plan.steps) - self.state.row < calls:
            if self.state is not None:
                self.session.abort(self.state)
            self.state = self.session.begin(vivace.Request(self.label))

    def __call__(self) -> None:
        """The next row: network and solver step."""
        if self.state.done:  # a network so small that a span holds more rows than the plan
            self.prepare(1)
        self.session.step([self.state])

    def error(self) -> float:
        """Of the network's prediction against eager float32."""
        return error_of(self.prediction(), reference(self.model, self.batch))

    def prediction(self) -> torch.Tensor:
        """What the network predicts for the model's inputs, float32 [batch, C, H, W]."""
        x, t, _ = self.model.inputs(1, self.session.denoiser.dtype)
        variant = self.session.plans[0].steps[0].variant
        condition = self.session.denoiser.encode(self.label)
        outs = self.session.executor.evaluate(x, t.tolist(), [condition], variant)
        return torch.cat([out.float() for out in outs])


@dataclass(frozen=True)
class Ours:
    """A row of ours: its name in the table, and whether modulation leaves the loop."""

    name: str
    hoist: bool


HOISTED, WHOLE = Ours("vivace", True), Ours("vivace, nothing hoisted", False)


def case_rows(
    name: str, dtype: str, batch: int, quick: bool, peers: Mapping[str, tuple[str, ...]], ours: tuple[Ours, ...]
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Rows of one model and batch, timed together. peers: dtypes by runtime. Refuses to time a wrong result of ours."""
    model, candidates, rows = MODELS[name], dict[str, Candidate](), list[dict[str, Any]]()
    for each in ours:
        row = SteadyRow(model, dtype, batch, hoist=each.hoist)
        error = row.error()
        if not error <= LIMIT:
            raise BackendError(f"bench denoiser: {name} {dtype}: {each.name} errs by {error:.2g}; nothing was timed")
        candidates[f"{each.name} {dtype}"] = Candidate(row, row.prepare)
        rows.append({"backend": each.name, "dtype": dtype, "error": error, "compile_s": row.compile_s})
    inputs = model.inputs(batch)
    for runtime_name, dtypes in peers.items():
        for each_dtype in dtypes:
            peer = prepared(runtime_name, model, each_dtype, batch, torch.get_num_threads())
            rows.append(peer.row())
            if peer.ready is not None:
                candidates[f"{peer.name} {each_dtype}"] = Candidate(_call(peer, inputs))
    times = interleave(candidates, seconds=SECONDS[quick])
    case = f"{name} x{batch}"
    return [_described(row, case, model, batch, times) for row in rows], times


def _call(peer: Peer, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    assert peer.ready is not None
    call = peer.ready.call
    return lambda: call(*inputs)


def _described(
    row: dict[str, Any], case: str, model: BenchModel, batch: int, times: Mapping[str, Timing]
) -> dict[str, Any]:
    own = times.get(f"{row['backend']} {row['dtype']}")
    done = batch * flops(model.opened.config, modulation=False)

    def over(peer: str, *dtypes: str) -> float | None:
        found = [times[key] for each in (row["dtype"], *dtypes) if (key := f"{peer} {each}") in times]
        return found[0].median / own.median if own is not None and found else None

    return {"op": "dit", "case": case} | row | {
        "ms": None if own is None else own.to_dict(),
        "percent_of_roofline": None if own is None else 1e5 * done / own.median / gemm_peak(row["dtype"].split()[0]),
        "over_eager": over("diffusers"), "over_compile": over("torch.compile"), "over_openvino": over("openvino"),
        "over_onnxruntime": over("onnxruntime", "int8 dynamic"),
        "tokens": model.tokens, "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


# ---------------------------------------------------------------- claims
def against(name: str, bound: float, peer: str, quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of a runtime over ours, DiT-B/2, bfloat16, one row of batch 1."""
    if (reason := _cannot() or runtime(peer).why_not("bfloat16")) is not None:
        return [], Claim(name, ">=", bound, reason)
    rows, times = case_rows(BASE, "bfloat16", 1, quick, {peer: ("bfloat16",)}, (HOISTED, WHOLE))
    theirs = times.get(f"{runtime(peer).NAME} bfloat16")
    if theirs is None:
        return rows, Claim(name, ">=", bound, str(rows[-1]["reason"]))
    own, whole = times["vivace bfloat16"], times["vivace, nothing hoisted bfloat16"]
    value, interval = ratio_of_medians([theirs], [own], SEED)
    how = (
        f"{rows[0]['case']}, bfloat16, {torch.get_num_threads()} threads: a row of a session in its steady state "
        f"(modulation hoisted, solver step included; error {rows[0]['error']:.2g}) against {runtime(peer).NAME}, which "
        f"computes everything (error {rows[-1]['error']:.2g}); without hoisting {theirs.median / whole.median:.2f}; "
        "medians of interleaved rounds"
    )
    return rows, Claim(name, ">=", bound, how, value, (interval[0], interval[1]), len(own.ms))


def hoisting_gain(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of a row that computes its modulation over one that was given it."""
    name = "denoiser.hoisting_gain_dit_b"
    if (reason := _cannot()) is not None:
        return [], Claim(name, ">=", 1.02, reason)
    rows, times = case_rows(BASE, "bfloat16", 1, quick, {}, (HOISTED, WHOLE))
    own, whole = times["vivace bfloat16"], times["vivace, nothing hoisted bfloat16"]
    value, interval = ratio_of_medians([whole], [own], SEED)
    how = (
        f"{rows[0]['case']}, bfloat16, {torch.get_num_threads()} threads: the same compiled row with embeddings and "
        "modulation computed in it, over one with vectors made before the loop; medians of interleaved rounds"
    )
    return rows, Claim(name, ">=", 1.02, how, value, (interval[0], interval[1]), len(own.ms))


def non_gemm_share(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """(norms + rest) / (linears + norms + rest) of a DiT-XL/2's row in C++; attention is not counted on either side."""
    name = "denoiser.non_gemm_share_xl"
    if (reason := _cannot()) is not None:
        return [], Claim(name, "<=", 0.12, reason)
    stages = [clocked_stages(MODELS[LARGE])]
    for _ in range(CLOCKED if quick else 4 * CLOCKED):
        stages.append(stages[0].again())
    shares = torch.tensor([stage.share for stage in stages[1:]], dtype=torch.float64)
    middle = sorted(stages[1:], key=lambda stage: stage.share)[len(shares) // 2]
    value, low, high = (float(torch.quantile(shares, q)) for q in (0.5, 0.025, 0.975))
    ms = {stage: round(ns / 1e6, 3) for stage, ns in middle.nanoseconds.items()}
    row = {"op": "stages", "backend": "vivace", "case": f"{LARGE} x1", "dtype": "bfloat16", "stages_ms": ms}
    how = (
        f"{LARGE} x1, bfloat16, {torch.get_num_threads()} threads, stage clock of the C++ row: "
        + ", ".join(f"{stage} {each:g} ms" for stage, each in ms.items())
        + "; gates, residuals and GELU are done inside the linears; median of rows"
    )
    return [row], Claim(name, "<=", 0.12, how, value, (low, high), len(shares))


@dataclass(frozen=True)
class Stages:
    """Nanoseconds of one row by kind of stage; `again` runs another."""

    nanoseconds: dict[str, int]
    again: Callable[[], Stages]

    @property
    def share(self) -> float:
        """Of what is neither a linear nor attention."""
        linear, norm, rest = (self.nanoseconds[name] for name in ("linear", "norm", "rest"))
        return (norm + rest) / (linear + norm + rest)


def clocked_stages(model: BenchModel) -> Stages:
    """The stages of one bfloat16 row, modulation given."""
    from vivace.engine.compiled import Bucket
    from vivace.models.compiled.cpp_row import CLOCKED, CppRow
    from vivace.models.compiled.hoist import modulation_table

    network = vivace.load(str(model.folder), dtype="bfloat16").model.module
    x, t, labels = model.inputs(1, network.dtype)
    table = modulation_table(network, t.tolist(), labels.tolist())
    row = CppRow(network)
    row.reserve(1, Bucket(model.tokens, 1))

    def once() -> Stages:
        row.run(x, (0,), [table], [[(0, 0)]], clock=True)
        return Stages(dict(zip(CLOCKED, row.clocked, strict=True)), once)

    return once()


def _cannot() -> str | None:
    return missing("cpu") or absent("diffusers")


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    "denoiser.dit_b_bf16_vs_inductor": lambda quick: against(
        "denoiser.dit_b_bf16_vs_inductor", 1.12, "inductor", quick
    ),
    "denoiser.dit_b_bf16_vs_openvino_bf16": lambda quick: against(
        "denoiser.dit_b_bf16_vs_openvino_bf16", 1.03, "open_vino", quick
    ),
    "denoiser.non_gemm_share_xl": non_gemm_share,
    "denoiser.hoisting_gain_dit_b": hoisting_gain,
}


def full_rows() -> list[dict[str, Any]]:
    """DiT-B/2 alone and as a guided pair in both dtypes against every runtime; DiT-XL/2 in bfloat16."""
    if _cannot() is not None:
        return []
    everything = {name: runtime(name).DTYPES for name in PEERS}
    rows = []
    for batch in (1, 2):
        for dtype in ("float32", "bfloat16"):
            own = {name: tuple(d for d in dtypes if d == dtype) for name, dtypes in everything.items()}
            rows += case_rows(BASE, dtype, batch, False, own, (HOISTED, WHOLE))[0]
    large = {"eager": ("bfloat16",), "open_vino": ("bfloat16",)}
    return rows + case_rows(LARGE, "bfloat16", 1, False, large, (HOISTED, WHOLE))[0]
