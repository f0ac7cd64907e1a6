"""Does time follow active tokens? A DiT-XL/2 at 256 and 1024 tokens and a network of SD3's size, random weights.

Timed is the loop of a request from its first row to its last. Ideal is the share of work that is active: linears and
queries of active tokens, text tokens always; keys and values of the others are kept, so their work is spared too.
Random weights have no pictures; what is told of them is the drift of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

import vivace
from vivace.bench.caching_large import Loop
from vivace.bench.harness import Candidate, Claim, Timing, in_turn, ratio_of_medians
from vivace.bench.models import MODELS
from vivace.bench.tokens_cases import KEEPS, active_share
from vivace.engine.passes import apply_mask, apply_tokens
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.errors import BackendError
from vivace.kernels.spec import missing
from vivace.metrics import latent_drift

SEED = 7
GAP, GAP_BOUND = "tokens.time_vs_ideal_gap", 0.08
EDIT, EDIT_BOUND = "tokens.masked_edit_speedup", 2.2
LEAST = 64  # active tokens from which time has to follow
DIT, SD3 = "DiT-XL/2", "SD3"
LATENTS = {256: (4, 32, 32), 1024: (4, 64, 64)}  # of a DiT, by tokens
STEPS = {True: 4, False: 10}  # quick or not
ROUNDS = {True: 3, False: 7}
EDIT_STEPS = 20
EDITED = 0.25  # of the picture
TEXT = 154  # tokens of SD3's prompt


def plans(spec: Any, shape: Sequence[int], steps: int, keeps: Sequence[float]) -> dict[float, Plan]:
    """By share kept: one evaluation of all tokens, then rows of active ones."""
    plain = make_plan(spec.schedule, "ddim", steps, prediction=spec.prediction)
    made = {1.0: plain} | {keep: apply_tokens(plain, keep, first=1, last=0) for keep in keeps}
    return {keep: plan.bind(spec, tuple(shape)) for keep, plan in made.items()}


def rows_of(
    case: str, session: Any, prompt: Any, made: Mapping[float, Plan], text: int, rounds: int
) -> list[dict[str, Any]]:
    """Times all plans in the same rounds, and says by how far time stays behind the tokens that were spared."""
    loops = {str(keep): Loop(session, plan, prompt) for keep, plan in made.items()}
    times = in_turn({name: Candidate(loop, loop.prepare) for name, loop in loops.items()}, seconds=0.0, least=rounds)
    exact = loops["1.0"].latents
    rows = []
    for keep, plan in made.items():
        loop, share = loops[str(keep)], active_share(plan, text)
        assert plan.binding is not None and loop.latents is not None and exact is not None
        ratio, interval = ratio_of_medians([times[str(keep)]], [times["1.0"]], SEED)
        active = min(step.variant.keep for step in plan.steps if step.variant is not None)
        rows.append({
            "op": "tokens large", "case": case, "backend": session.executor.name, "keep": keep,
            "tokens": plan.binding.tokens, "active": int(active), "solver": "ddim", "steps": plan.nfe,
            "dtype": str(session.denoiser.dtype).removeprefix("torch."), "ms": times[str(keep)].to_dict(),
            "share": share, "time_ratio": ratio, "gap": ratio - share,
            "gap_interval": [end - share for end in interval],
            "drift": float(latent_drift(loop.latents, exact).mean()), "threads": torch.get_num_threads(), "seed": SEED,
        })  # fmt: skip
    return rows


def dit_rows(quick: bool, tokens: int, name: str = DIT) -> list[dict[str, Any]]:
    """The native DiT, compiled, bfloat16, one picture, one branch."""
    model = MODELS[name]
    pipe: Any = vivace.load(str(model.folder))
    made = plans(pipe.spec, LATENTS[tokens], STEPS[quick], KEEPS)
    session = pipe.compile(list(made.values()), backend="cpu", dtype="bfloat16", threads=torch.get_num_threads())
    return rows_of(f"{name}, {tokens} tokens", session, int(model.inputs(1)[2][0]), made, 0, ROUNDS[quick])


def sd3(sizes: Mapping[str, Any]) -> Any:
    """A network of SD3's architecture with random weights, bfloat16. sizes: arguments of its class; () is SD3's."""
    import diffusers

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        kind: Any = diffusers.SD3Transformer2DModel
        published: dict[str, Any] = {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
        }  # fmt: skip
        old = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            made = kind(**{"sample_size": 64, **published, **sizes})
        finally:
            torch.set_default_dtype(old)
    return made.eval().requires_grad_(False)


def sd3_rows(quick: bool, sizes: Mapping[str, Any] | None = None, rounds: int | None = None) -> list[dict[str, Any]]:
    """SD3's architecture with our ops inside, bfloat16, one picture, one branch, 1024 tokens."""
    network = sd3(sizes or {})
    config = network.config
    pipe: Any = vivace.load(network, scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    draw = torch.Generator().manual_seed(SEED)
    prompt = {
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, generator=draw).bfloat16(),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draw).bfloat16(),
    }
    made = plans(pipe.spec, pipe.spec.latent_shape, STEPS[quick], KEEPS)
    session = pipe.compile(list(made.values()), backend="cpu", dtype="bfloat16", threads=torch.get_num_threads())
    return rows_of(SD3, session, prompt, made, TEXT, rounds or ROUNDS[quick])


@cache
def _measured(quick: bool) -> tuple[dict[str, Any], ...]:
    rows = dit_rows(quick, 256)
    return tuple(rows if quick else rows + dit_rows(quick, 1024) + sd3_rows(quick, rounds=3))


def gap_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """By how far time stays behind the active share, the largest of all settings with enough active tokens."""
    if (reason := missing("cpu")) is not None:
        return [], Claim(GAP, "<=", GAP_BOUND, reason)
    rows = list(_measured(quick))
    counted = [row for row in rows if row["keep"] < 1.0 and row["active"] >= LEAST]
    worst = max(counted, key=lambda row: float(row["gap"]))
    how = "time of the loop over that with all tokens, less the active share of its work, the largest of: "
    how += "; ".join(f"{r['case']} keep {r['keep']:g} {r['time_ratio']:.3f} at {r['share']:.3f}" for r in counted)
    how += f"; {worst['dtype']}, one picture, {worst['steps']} rows of which the first has all tokens, "
    how += f"{worst['threads']} threads, medians of interleaved loops"
    if quick:
        how += f"; 1024 tokens and {SD3} are in the full run only"
    interval = tuple(worst["gap_interval"])
    return rows, Claim(GAP, "<=", GAP_BOUND, how, float(worst["gap"]), interval, worst["ms"]["rounds"])


# ---------------------------------------------------------------- editing a region
def edit_claim(quick: bool, name: str = DIT, steps: int = EDIT_STEPS) -> tuple[list[dict[str, Any]], Claim]:
    """Time of an edit that computes all tokens over one that computes those of the mask."""
    if (reason := missing("cpu")) is not None:
        return [], Claim(EDIT, ">=", EDIT_BOUND, reason)
    model = MODELS[name]
    pipe: Any = vivace.load(str(model.folder))
    channels, height, width = pipe.spec.latent_shape
    plan = apply_mask(make_plan(pipe.spec.schedule, "ddim", steps, prediction=pipe.spec.prediction))
    made = {"all": plan, "mask": apply_tokens(plan, EDITED, selector="mask", first=1, last=0)}
    made = {key: each.bind(pipe.spec) for key, each in made.items()}
    start = torch.randn(channels, height, width, generator=torch.Generator().manual_seed(SEED)).clamp(-1.0, 1.0)
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1.0
    session = pipe.compile(list(made.values()), backend="cpu", dtype="bfloat16", threads=torch.get_num_threads())
    prompt = int(model.inputs(1)[2][0])
    edits = {key: Loop(session, each, prompt, image=start, mask=mask) for key, each in made.items()}
    times = in_turn({key: Candidate(e, e.prepare) for key, e in edits.items()}, seconds=0.0, least=ROUNDS[quick])
    outside = (mask == 0).expand(channels, height, width)
    for key, edit in edits.items():
        if edit.latents is None or not torch.equal(edit.latents[0][outside], start[outside]):
            raise BackendError(f"bench tokens: {key}: outside of the mask the edit is not the picture it began with")
    ratio, interval = ratio_of_medians([times["all"]], [times["mask"]], SEED)
    rows = [_edited(name, key, each, times[key]) for key, each in made.items()]
    how = (
        f"{name}, {made['all'].binding.tokens if made['all'].binding else 0} tokens, a mask of {EDITED:.0%}, {steps} "
        f"rows of which the first has all tokens; outside of the mask the result has the bits of the picture; "
        f"bfloat16, {torch.get_num_threads()} threads, medians of interleaved loops"
    )
    return rows, Claim(EDIT, ">=", EDIT_BOUND, how, ratio, (interval[0], interval[1]), len(times["all"].ms))


def _edited(case: str, method: str, plan: Plan, times: Timing) -> dict[str, Any]:
    """Columns of an edit."""
    return {
        "op": "tokens edit", "case": case, "backend": "cpu", "method": method, "steps": plan.nfe, "dtype": "bfloat16",
        "ms": times.to_dict(), "share": active_share(plan), "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {GAP: gap_claim, EDIT: edit_claim}
