"""Pictures of an INT8 model beside the float32 ones of the same seeds, and what forecasts make of INT8's noise.

Rows: every evaluation in INT8; the first and the last one in bfloat16; INT8 in one share of the trajectory alone, from
the noise end to the clean one. Beside PSNR stands the Frechet distance to the data, ours over that of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vivace
from vivace.bench.harness import Claim
from vivace.bench.int8_weights import WEIGHTS, int8_weights
from vivace.bench.models import MODELS
from vivace.engine.forecast import forecast_weights, noise_gain
from vivace.engine.passes import apply_precision
from vivace.engine.plan import Plan
from vivace.kernels.spec import missing
from vivace.metrics import Features, frechet
from vivace.metrics.quality import Array, psnr
from vivace.metrics.reference import run
from vivace.models.pipe import default_plan

TARGET = 30.0  # dB
CLOSE = 0.05  # relative difference of Frechet distances that counts as none
STEPS, SHARES = 20, 4
TOGETHER = 16  # pictures in flight
PICTURES = {True: 48, False: 340}  # quick or not
AHEAD = (1, 2, 3, 4)  # evaluations that a forecast reaches


def plan_of(pipe: Any) -> Plan:
    """The card's solver and guidance, 20 steps, without any precision."""
    return default_plan(pipe.model, steps=STEPS)


def draw(session: Any, plan: Plan, count: int) -> Array:
    """Latents [count, C, H, W]: picture i is class i mod classes with seed i."""
    classes = session.denoiser.model.classes
    return run(session, [i % classes for i in range(count)], range(count), plan=plan, batch=TOGETHER)


def share_of(plan: Plan, share: int) -> Plan:
    """INT8 in evaluations [share n / SHARES, (share + 1) n / SHARES) alone."""
    edges = [round(plan.nfe * k / SHARES) for k in (share, share + 1)]
    turned = apply_precision(plan, "int8")
    steps = tuple(
        new if edges[0] <= i < edges[1] else old
        for i, (old, new) in enumerate(zip(plan.steps, turned.steps, strict=True))
    )
    return Plan(steps, plan.prediction, plan.init)


def quality_rows(count: int) -> list[dict[str, Any]]:
    """PSNR to float32 by the same seeds, and Frechet distances, of every way to place INT8 in the plan."""
    model = MODELS["emoji"]
    weights = int8_weights(model).get() / WEIGHTS
    exact, pipe = vivace.load("emoji"), vivace.load("emoji", quantized=weights)
    plan = plan_of(exact)
    reference = draw(exact.compile(plan, backend="cpu", dtype="float32"), plan, count)
    narrow = draw(exact.compile(plan, backend="cpu", dtype="bfloat16"), plan, count)
    session = pipe.compile(apply_precision(plan, "int8"), backend="cpu", dtype="bfloat16")
    ways: dict[str, Plan] = {
        "int8": apply_precision(plan, "int8"),
        "int8, first and last bf16": apply_precision(plan, "int8", first=1, last=1, high="bf16"),
        **{f"int8 in share {k + 1} of {SHARES}": share_of(plan, k) for k in range(SHARES)},
    }
    features = Features.load(model.folder)
    rows = [row("bfloat16", narrow, reference, features)]
    return rows + [row(name, draw(session, way, count), reference, features) for name, way in ways.items()]


def row(name: str, latents: Array, reference: Array, features: Features) -> dict[str, Any]:
    """One way against the float32 pictures."""
    decibels = psnr(latents, reference)
    distances = [float(frechet(each, features)) for each in (latents, reference)]
    return {
        "op": "int8 pictures", "case": "emoji", "way": name, "pictures": len(reference), "steps": STEPS, "seed": 0,
        "psnr": float(decibels.mean()), "psnr_p5": float(np.quantile(decibels, 0.05)),
        "frechet": distances[0], "frechet_float32": distances[1], "frechet_change": distances[0] / distances[1] - 1.0,
    }  # fmt: skip


# ---------------------------------------------------------------- forecasts of noisy values
def noise_rows(pictures: int) -> list[dict[str, Any]]:
    """Variance of INT8's error in order-1 forecasts, over that in a computed value, and what is predicted.

    The trajectory is float32's; at every evaluation of it the network runs in float32 and in INT8 on the same latent.
    e_i: the difference of the conditional predictions. A forecast k ahead holds sum_j w_j e_(i - j); reuse holds e_i.
    """
    weights = int8_weights(MODELS["emoji"]).get() / WEIGHTS
    exact, pipe = vivace.load("emoji"), vivace.load("emoji", quantized=weights)
    plan = plan_of(exact)
    float32 = exact.compile(plan, backend="cpu", dtype="float32")
    int8 = pipe.compile(apply_precision(plan, "int8"), backend="cpu", dtype="bfloat16")
    errors = torch.stack([_errors(float32, int8, i) for i in range(pictures)])  # [pictures, evaluations, C, H, W]
    newest, older = errors[:, 1:], errors[:, :-1]
    r = float((newest * older).mean() / errors.square().mean())
    found = []
    for k in AHEAD:
        one, other = forecast_weights(1, k)
        gain = float((one * newest + other * older).square().mean() / errors.square().mean())
        found.append({
            "op": "int8 noise", "case": "emoji", "order": 1, "ahead": k, "gain": gain, "pictures": pictures,
            "independent": noise_gain(1, k), "correlated": noise_gain(1, k) + 2 * r * one * other, "correlation": r,
        })  # fmt: skip
    return found


def _errors(float32: Any, int8: Any, picture: int) -> Tensor:
    """INT8's error at every evaluation of one float32 trajectory, [evaluations, C, H, W]."""
    state, errors = float32.begin(vivace.Request(picture * 7, seed=picture)), list[Tensor]()
    while not state.done:
        step, lane = state.plan.steps[state.row], list(state.lanes)
        x = state.pool.net[lane]
        outs = []
        for session in (float32, int8):
            variant = session.plans[0].steps[state.row].variant
            dtype = session.denoiser.dtype
            made = session.executor.evaluate(x.to(dtype), [step.timestep], [state.condition], variant)
            outs.append(made[0].float().clone())
        errors.append((outs[1] - outs[0])[0])
        float32.step([state])
    float32.abort(state)
    return torch.stack(errors)


# ---------------------------------------------------------------- claims
@cache
def measured(quick: bool) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """All rows of pictures, and that of INT8 in every evaluation."""
    rows = tuple(quality_rows(PICTURES[quick]))
    return rows, next(row for row in rows if row["way"] == "int8")


def psnr_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """PSNR of the INT8 pictures to the float32 ones of the same seeds."""
    name = "e2e.emoji_int8_psnr_db"
    if (reason := missing("cpu")) is not None:
        return [], Claim(name, ">=", TARGET, reason)
    rows, whole = measured(quick)
    how = f"{_setting(whole)}, mean; 5 % of the pictures are below {whole['psnr_p5']:.1f} dB; " + "; ".join(
        f"{row['way']} {row['psnr']:.1f} dB" for row in rows if row is not whole
    )
    found = Claim(name, ">=", TARGET, how, whole["psnr"], None, whole["pictures"])
    return [*rows, *noise_rows(2 if quick else 8)], found


def frechet_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """By how much INT8 changes the Frechet distance of the pictures to the data."""
    name = "e2e.emoji_int8_frechet_change"
    if (reason := missing("cpu")) is not None:
        return [], Claim(name, "<=", CLOSE, reason)
    rows, whole = measured(quick)
    how = f"{_setting(whole)}: {whole['frechet']:.4g} against {whole['frechet_float32']:.4g}, relative"
    return list(rows), Claim(name, "<=", CLOSE, how, abs(whole["frechet_change"]), None, whole["pictures"])


def _setting(whole: dict[str, Any]) -> str:
    return (
        f"emoji, {STEPS} steps of the card's solver with its guidance, {whole['pictures']} pictures: INT8 in every "
        "evaluation against float32 from the same seeds, data range 2"
    )


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    "e2e.emoji_int8_psnr_db": psnr_claim,
    "e2e.emoji_int8_frechet_change": frechet_claim,
}
