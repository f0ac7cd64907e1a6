"""Time at matched quality: a picture by vivace, by `diffusers` with its defaults, and by every runtime at its best.

First the quality: a way to draw must reach 30 dB to the converged same-noise solution, in the mean over fixed labels
and noises. The grid says how few steps of which solver do; every runtime then runs its best solver at its fewest steps,
on the same noise, with full guidance. Then the time, all rows in the same interleaved rounds. A model with random
weights has no solution worth reaching: there the reference is the float32 eager run at the same steps, and pictures of
few steps are timed and scaled to all.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.bench import e2e_cases as cases
from vivace.bench import e2e_int8
from vivace.bench.e2e_cases import DEFAULT_STEPS, TARGET, Case
from vivace.bench.harness import Candidate, Claim, Timing, interleave, of_claims, ratio_of_medians, report
from vivace.bench.memory import Growth
from vivace.bench.models import MODELS, flops
from vivace.bench.peers import Peer, absent, prepared, runtime
from vivace.bench.peers.eager import network
from vivace.bench.roofline import gemm_peak
from vivace.bench.solvers import PROMPTS
from vivace.errors import BackendError
from vivace.kernels.spec import missing

SEED = 7
BACKEND = "cpu"  # our compiled executor
# More than a session keeps hoisted results of: every timed picture of ours computes its own, as a new prompt would.
CLASSES = range(0, 340, 17)
SOLVERS = ("ddim", "dpmpp_2m", "unipc")
PEERS = ("eager", "inductor", "cachedit", "onnx_runtime", "open_vino")
SECONDS = {True: 12.0, False: 60.0}  # of timed rounds, quick or not
LATER = ("guidance", "tokens")  # factors that this release has not
RANDOM_LABELS, RANDOM_GUIDANCE, RANDOM_STEPS, TIMED_STEPS = (207, 980), 4.0, 12, 2


@dataclass(frozen=True)
class Factor:
    """A row of ours: which of the factors are on."""

    name: str
    solver: bool = False
    compiled: bool = False
    hoist: bool = False
    dtype: str = "float32"


FACTORS = (
    Factor("none"),
    Factor("solver", solver=True),
    Factor("fusion", compiled=True),
    Factor("fusion + hoisting", compiled=True, hoist=True),
    Factor("precision", dtype="bfloat16"),
    Factor("solver + fusion", solver=True, compiled=True),
    Factor("solver + fusion + hoisting", solver=True, compiled=True, hoist=True),
    Factor("all", solver=True, compiled=True, hoist=True, dtype="bfloat16"),
    Factor("all, int8", solver=True, compiled=True, hoist=True, dtype="int8"),
)
ALL = next(factor for factor in FACTORS if factor.name == "all")


@dataclass
class Row:
    """A way to draw a picture: its columns, the call that draws label 0, and by how much its time is multiplied."""

    columns: dict[str, Any]
    call: Callable[[], Any] | None = None
    scale: float = 1.0
    times: Timing | None = field(default=None)

    @property
    def key(self) -> str:
        """Names it among the candidates."""
        return f"{self.columns['backend']} {self.columns['dtype']} {self.columns['factor']}"

    @property
    def ms(self) -> float:
        """Median of a whole picture."""
        assert self.times is not None
        return self.times.median * self.scale


def emoji_case() -> Case:
    """The bundled model, some of its prompts and the guidance of its card."""
    model = MODELS["emoji"]
    labels = tuple(model.opened.prompts.find(prompt).id for prompt in PROMPTS)
    return Case(model, labels, float(model.opened.card["guidance_scale"]))


def random_case() -> Case:
    """A DiT-B/2 with random weights."""
    return Case(MODELS["DiT-B/2"], RANDOM_LABELS, RANDOM_GUIDANCE)


# ---------------------------------------------------------------- rows
def columns(case: Case, factor: str, backend: str, dtype: str, solver: str, steps: int) -> dict[str, Any]:
    """What every row says before it is timed."""
    return {
        "op": "e2e", "case": case.model.name, "backend": backend, "factor": factor, "dtype": dtype, "solver": solver,
        "steps": steps, "nfe": steps, "tokens": case.model.tokens, "guidance": case.guidance,
        "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


def default_row(case: Case, reference: Tensor | None, timed: int | None = None) -> Row:
    """diffusers with its defaults. `timed`: steps of the timed picture, None: all."""
    with Growth() as growth:
        default = cases.Default(case)
        default(0, timed or DEFAULT_STEPS)
    row = columns(case, "default", "diffusers", "float32", "ddim", DEFAULT_STEPS)
    row |= {"compile_s": default.seconds, "peak_mb": growth.megabytes}
    if reference is not None:
        latents = torch.cat([default(i, DEFAULT_STEPS) for i in range(len(case.labels))])
        row |= judged(cases.quality(latents, reference))
    return Row(row, lambda: default(0, timed or DEFAULT_STEPS), DEFAULT_STEPS / (timed or DEFAULT_STEPS))


def vivace_row(case: Case, factor: Factor, best: Mapping[str, Any], reference: Tensor | None, timed: int | None) -> Row:
    """One of ours; reference None: the eager float32 run of the same plan."""
    solver, steps = (best["solver"], best["steps"]) if factor.solver else ("ddim", DEFAULT_STEPS)
    backend = BACKEND if factor.compiled else "eager"
    try:
        with Growth() as growth:
            begin = time.perf_counter()
            planned = partial(cases.planned, case, factor.dtype, solver)
            session = cases.compile_vivace(case, planned(steps), backend, factor.dtype, hoist=factor.hoist)
            seconds = time.perf_counter() - begin
            session(case.labels[0], plan=planned(timed or steps))
    except BackendError as error:
        row = columns(case, factor.name, "vivace", factor.dtype, solver, steps)
        return Row(row | {"reason": str(error)})

    def latents(count: int) -> Tensor:
        return cases.vivace_latents(case, session, planned(count))

    if reference is None:
        decibels = cases.quality(latents(steps), cases.eager_vivace(case, solver, steps))
    elif factor.solver:
        steps, decibels = cases.settle(latents, steps, reference)
    else:
        decibels = cases.quality(latents(steps), reference)
    plan, noise, labels = planned(timed or steps), case.noise[:1], itertools.cycle(CLASSES)
    row = columns(case, factor.name, "vivace", factor.dtype, solver, steps) | judged(decibels)
    row |= {"compile_s": seconds, "peak_mb": growth.megabytes, "executor": session.executor.name}
    return Row(row, lambda: session(next(labels), plan=plan, latents=noise), steps / (timed or steps))


def peer_row(
    case: Case, name: str, dtype: str, best: Mapping[str, Any], reference: Tensor | None, timed: int | None
) -> Row:
    """A runtime with the best solver of diffusers; reference None: the eager float32 run of the same loop."""
    with Growth() as growth:
        peer: Peer = prepared(name, case.model, dtype, 2, torch.get_num_threads())
    solver, spacing, steps = best["solver"], best["spacing"], best["steps"]
    row = columns(case, "peer", peer.name, dtype, solver, steps) | peer.row()
    if peer.ready is None:
        return Row(row)
    ready = peer.ready

    def latents(count: int) -> Tensor:
        return cases.peer_latents(case, ready.call, ready.begin, solver, spacing, count)

    if reference is None:
        decibels = cases.quality(latents(steps), cases.eager_diffusers(case, solver, spacing, steps))
    else:
        steps, decibels = cases.settle(latents, steps, reference)
    row |= {"steps": steps, "nfe": steps, "spacing": spacing, "peak_mb": growth.megabytes} | judged(decibels)
    call = cases.peer_picture(case, ready.call, ready.begin, solver, spacing, timed or steps)
    return Row(row, call, steps / (timed or steps))


def judged(decibels: float) -> dict[str, Any]:
    """The columns of quality."""
    return {"psnr": decibels, "meets": decibels >= TARGET}


def later_rows(case: Case) -> list[Row]:
    """Factors that are not in this release, so that their place in the table is known."""
    return [Row(columns(case, name, "vivace", "bfloat16", "", 0) | {"reason": "not in this release"}) for name in LATER]


# ---------------------------------------------------------------- a table
def table(
    case: Case, quick: bool, *, reference: Tensor | None, best: Mapping[str, Any], timed: int | None
) -> list[Row]:
    """All rows of a model, timed together. best: {"vivace": grid row, "diffusers": grid row}."""
    rows = [default_row(case, reference, timed)]
    for name in PEERS:
        for dtype in runtime(name).DTYPES:
            rows.append(peer_row(case, name, dtype, best["diffusers"], reference, timed))
    rows += [vivace_row(case, factor, best["vivace"], reference, timed) for factor in FACTORS]
    measure(rows, quick)
    return rows + later_rows(case)


def measure(rows: Sequence[Row], quick: bool) -> None:
    """Times what can be called, in the same rounds, and fills in times, ratios and share of the roofline."""
    there = [row for row in rows if row.call is not None]
    candidates = {row.key: Candidate(row.call) for row in there if row.call is not None}
    times = interleave(candidates, seconds=SECONDS[quick], least=5 if quick else 3)
    for row in there:
        row.times = times[row.key]
    default = next((row for row in there if row.columns["factor"] == "default"), None)
    rival = best_peer(there)
    for row in there:
        spread = {name: value * row.scale for name, value in times[row.key].to_dict().items() if name != "rounds"}
        done = flops(MODELS[row.columns["case"]].opened.config, modulation=False) * 2 * row.columns["nfe"]
        row.columns |= {
            "ms": spread | {"rounds": len(times[row.key].ms)},
            "over_default": None if default is None else default.ms / row.ms,
            "over_best_peer": None if rival is None else rival.ms / row.ms,
            "percent_of_roofline": 100 * done / (row.ms * 1e-3) / gemm_peak(row.columns["dtype"].split()[0]),
        }  # fmt: skip


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest runtime among those that reach the target."""
    peers = [row for row in rows if row.columns["factor"] == "peer" and row.columns["meets"]]
    return min(peers, key=lambda row: row.ms, default=None)


def emoji_table(quick: bool) -> list[dict[str, Any]]:
    """The grid and the table of the bundled model."""
    case = emoji_case()
    reference = case.converged()
    ours = list(cases.vivace_grid(case, reference, SOLVERS))
    theirs = list(cases.peer_grid(case, reference, network(case.model.transformer())))
    best = {"vivace": cases.fewest(ours), "diffusers": cases.fewest(theirs)}
    unreached = [name for name, row in best.items() if row is None]
    if unreached:
        raise BackendError(f"bench e2e: no solver of {', '.join(unreached)} reaches {TARGET:g} dB; nothing was timed")
    rows = table(case, quick, reference=reference, best=best, timed=None)
    return [*ours, *theirs, *(row.columns for row in rows)]


def random_table(quick: bool) -> list[dict[str, Any]]:
    """The table of the DiT-B/2 with random weights; every solver runs as many steps as the best did on the other."""
    best = {"solver": "unipc", "spacing": "linspace", "steps": RANDOM_STEPS}
    both = {"vivace": best, "diffusers": best}
    return [row.columns for row in table(random_case(), quick, reference=None, best=both, timed=TIMED_STEPS)]


# ---------------------------------------------------------------- claims
def vs_diffusers_default(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of `diffusers` with its defaults over ours at the quality target, float precision alone."""
    name = "e2e.vs_diffusers_default"
    if (reason := _cannot()) is not None:
        return [], Claim(name, ">=", 5.0, reason)
    case = emoji_case()
    reference = case.converged()
    grid = list(cases.vivace_grid(case, reference, SOLVERS[1:]))
    best = cases.fewest(grid)
    if best is None:
        raise BackendError(f"bench e2e: no solver reaches {TARGET:g} dB; nothing was timed")
    rows = [default_row(case, reference), vivace_row(case, ALL, best, reference, None)]
    default, ours = rows
    if ours.call is None or not ours.columns["meets"]:
        why = ours.columns.get("reason") or f"{ours.columns['psnr']:.1f} dB, below {TARGET:g}"
        return [*grid, *(row.columns for row in rows)], Claim(name, ">=", 5.0, f"cannot be measured: {why}")
    measure(rows, quick)
    assert default.times is not None and ours.times is not None
    value, interval = ratio_of_medians([default.times], [ours.times], SEED)
    how = (
        f"emoji, DiTPipeline with {DEFAULT_STEPS} DDIM steps, float32, eager ({default.columns['psnr']:.1f} dB) over "
        f"{ours.columns['solver']} with {ours.columns['steps']}, {ours.columns['dtype']}, compiled "
        f"({ours.columns['psnr']:.1f} dB); PSNR to the converged solution of the same noise, mean of "
        f"{len(case.labels)}; guidance {case.guidance:g} in every row; medians of interleaved pictures"
    )
    found = Claim(name, ">=", 5.0, how, value, (interval[0], interval[1]), len(ours.times.ms))
    return [*grid, *(row.columns for row in rows)], found


def recompiles(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Artefacts compiled after the first picture while prompt, seed, scale, solver and number of steps change."""
    name = "e2e.recompiles_on_number_change"
    if (reason := missing("cpu")) is not None:
        return [], Claim(name, "<=", 0.0, reason)
    case = emoji_case()
    try:
        session = cases.compile_vivace(case, case.plan("unipc", 6), BACKEND, "float32")
    except BackendError as error:
        return [], Claim(name, "<=", 0.0, str(error))
    first, second = case.labels[:2]
    calls: dict[str, dict[str, Any]] = {
        "first": {}, "prompt": {"prompt": second}, "seed": {"seed": 3}, "guidance scale": {"guidance_scale": 3.5},
        "solver": {"plan": case.plan("dpmpp_2m", 6)}, "steps": {"plan": case.plan("unipc", 9)},
        "all of them": {"prompt": second, "seed": 4, "guidance_scale": 1.5, "plan": case.plan("ddim", 7)},
    }  # fmt: skip
    rows = []
    for changed, arguments in calls.items():
        receipt = session(**{"prompt": first, **arguments}).receipt
        rows.append({"op": "recompiles", "case": "emoji", "changed": changed, "compiles": receipt.compiles})
    value = float(rows[-1]["compiles"] - rows[0]["compiles"])
    how = f"receipts of one session, {rows[0]['compiles']} artefacts for the first picture; {', '.join(calls)}"
    return rows, Claim(name, "<=", 0.0, how, value, None, len(rows))


def _cannot() -> str | None:
    return absent("diffusers") or missing("cpu")


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    "e2e.vs_diffusers_default": vs_diffusers_default,
    "e2e.recompiles_on_number_change": recompiles,
    **e2e_int8.CLAIMS,
}


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All rows and claims; with `claim`, that one and the rows behind it."""
    rows, claims = of_claims("e2e", CLAIMS, op, claim, quick)
    if claim is None and _cannot() is None:
        rows += emoji_table(quick)
        if not quick:
            rows += random_table(quick)
    return report("e2e", rows, claims)
