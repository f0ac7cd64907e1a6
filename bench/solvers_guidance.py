"""What guidance costs and what can be left of it: branch evaluations removed against PSNR to full guidance, on emoji.

The plan is that of the model's card. Weights and settings are tuned on names and a seed of their own; what is shown was
measured on others. Removed: of all branch evaluations that full guidance makes, counted by what the network was handed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.bench.artefacts import Artefact
from vivace.bench.harness import Claim
from vivace.engine.calibrate.linear_ag import calibrate_linear_ag
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.passes import apply_adaptive_guidance, apply_linear_ag, freeze
from vivace.engine.plan import Plan
from vivace.engine.request import Request
from vivace.metrics.quality import psnr

CLAIM, BOUND, DECIBELS, MARGIN = "solvers.emoji.guidance_branch_evals_removed_at_35db", 0.25, 35.0, 0.5
SEEDS = {"tune": 31, "judge": 32}
NAMES, TUNED, JUDGED, QUICK = 16, 32, 48, 16
EVERY = (2, 3, 4, 5)  # full guidance in every second, third, ... evaluation
THRESHOLDS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.993)
ESTIMATED = ((0.6, 1), (0.6, 2), (0.6, 3), (0.8, 2), (0.8, 3), (0.9, 3))  # threshold, rows that estimate in a row
GUIDANCE = (2.0, 4.0)  # the card's, and a strong one
TOGETHER = 16  # samples in a batch
CHOSEN = "chosen.json"
EQUAL = 60.0  # dB that a picture counts as at most: one whose guard never fired is equal


@cache
def problem(part: str, guidance: float) -> Problem:
    """The model with the names and the seed of "tune" or "judge"."""
    from vivace.models.pipe import load
    from vivace.models.quantized.calibrate import default_prompts

    pipe = load("emoji")
    drawn = list(dict.fromkeys(default_prompts(pipe, 4 * NAMES, SEEDS["judge"])))
    names = drawn[:NAMES] if part == "judge" else drawn[NAMES : 2 * NAMES]
    return Problem.of_pipe(pipe, names, guidance=guidance, seed=SEEDS[part])


def base(guidance: float) -> Plan:
    """The card's plan, guided in every row."""
    return problem("judge", guidance).plan("unipc", 20)


def tables(guidance: float) -> Artefact:
    """Weights for every setting of `EVERY`, fitted on the names and the seed of "tune", and what was chosen there."""
    asked = problem("tune", guidance)
    key = {"fingerprint": asked.fingerprint, "guidance": guidance, "prompts": list(asked.prompts), "seed": asked.seed}
    key |= {"samples": TUNED, "every": list(EVERY), "plan": base(guidance).hash, "bound": DECIBELS + MARGIN}

    def make(folder: Path) -> None:
        chosen = None
        for every in EVERY:
            made = calibrate_linear_ag(asked, samples=TUNED, every=every)
            made.save(folder / f"{every}.safetensors")
            plan = apply_linear_ag(base(guidance), made)
            if measured(guidance, "tune", plan, range(TUNED, TUNED + QUICK))["psnr"] >= DECIBELS + MARGIN:
                chosen = every
        (folder / CHOSEN).write_text(json.dumps(chosen), encoding="utf-8")

    return Artefact("linear-ag", key, make)


def table(guidance: float, every: int) -> CalibrationTable:
    """One of them."""
    return CalibrationTable.load(tables(guidance).get() / f"{every}.safetensors")


def adaptive(guidance: float) -> Artefact:
    """The (threshold, rows in a row) of `ESTIMATED` that removes most on "tune" with `MARGIN` to spare."""
    asked = problem("tune", guidance)
    key = {"fingerprint": asked.fingerprint, "guidance": guidance, "prompts": list(asked.prompts), "seed": asked.seed}
    key |= {"settings": [list(setting) for setting in ESTIMATED], "plan": base(guidance).hash}
    key |= {"bound": DECIBELS + MARGIN}

    def make(folder: Path) -> None:
        found = [(measured(guidance, "tune", _adaptive(guidance, s), range(QUICK)), s) for s in ESTIMATED]
        good = [(each["share"], s) for each, s in found if each["psnr"] >= DECIBELS + MARGIN]
        (folder / CHOSEN).write_text(json.dumps(max(good)[1] if good else None), encoding="utf-8")

    return Artefact("adaptive-guidance", key, make)


def chosen_of(artefact: Artefact) -> Any:
    """The setting that was chosen on "tune": of linear_ag on unseen pictures of the names it was fitted on."""
    return json.loads((artefact.get() / CHOSEN).read_text(encoding="utf-8"))


def _adaptive(guidance: float, setting: Sequence[float]) -> Plan:
    threshold, most = setting
    return apply_adaptive_guidance(base(guidance), threshold, estimate=int(most))


def run(asked: Problem, plan: Plan, samples: Sequence[int]) -> tuple[Tensor, list[Any]]:
    """(latents [n, ...], receipts) of samples of a problem."""
    made: list[Any] = []
    session = asked.session
    for first in range(0, len(samples), TOGETHER):
        part = samples[first : first + TOGETHER]
        prompts = [asked.prompts[j % len(asked.prompts)] for j in part]
        states = [
            session.begin(Request(prompt, plan, seed=asked.seed, index=j))
            for prompt, j in zip(prompts, part, strict=True)
        ]
        while not states[0].done:
            session.step(states)
        made += [session.finish(state) for state in states]
    return torch.stack([result.latents[0] for result in made]), [result.receipt for result in made]


def settings(guidance: float) -> Iterator[tuple[str, Any, Plan]]:
    """(method, setting, plan) of everything that leaves evaluations out."""
    plan = base(guidance)
    for threshold in THRESHOLDS:
        yield "adaptive_guidance", threshold, apply_adaptive_guidance(plan, threshold)
    for setting in ESTIMATED:
        yield "adaptive_guidance, estimate", f"{setting[0]:g} x {setting[1]}", _adaptive(guidance, setting)
    for every in EVERY:
        rows = [i for i in range(2, plan.nfe) if i % every]
        yield "last difference", every, apply_linear_ag(plan, rows=rows)
    for every in EVERY:
        yield "linear_ag", every, apply_linear_ag(plan, table(guidance, every))


def measured(guidance: float, part: str, plan: Plan, samples: Sequence[int]) -> dict[str, Any]:
    """Share removed and PSNR of a plan to full guidance, means over samples."""
    asked = problem(part, guidance)
    latents, receipts = run(asked, plan, samples)
    done = sum(receipt.branch_evals for receipt in receipts)
    full = base(guidance).branch_evals * len(receipts)
    values = np.minimum(psnr(latents, _full(guidance, part, tuple(samples))), EQUAL)
    return {"share": 1.0 - done / full, "psnr": float(values.mean()), "receipts": receipts}


@cache
def _full(guidance: float, part: str, samples: tuple[int, ...]) -> Tensor:
    return run(problem(part, guidance), base(guidance), samples)[0]


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per guidance, method and setting; frozen: the rows that most pictures of "tune" decided for."""
    samples = range(QUICK if quick else JUDGED)
    for guidance in GUIDANCE[:1] if quick else GUIDANCE:
        for method, setting, plan in settings(guidance):
            found = measured(guidance, "judge", plan, samples)
            told = {"on": "emoji", "guidance": guidance, "setting": setting}
            yield {**told, "method": method, "share": found["share"], "psnr": found["psnr"]}
            if method == "adaptive_guidance":
                traces = [r.decisions for r in measured(guidance, "tune", plan, samples)["receipts"]]
                found = measured(guidance, "judge", freeze(plan, traces), samples)
                yield {**told, "method": "frozen", "share": found["share"], "psnr": found["psnr"]}


def guidance_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Share of branch evaluations that the guard removed with the setting chosen on "tune"; beside it linear_ag."""
    guidance, samples = GUIDANCE[0], range(QUICK if quick else JUDGED)
    guard, every = chosen_of(adaptive(guidance)), chosen_of(tables(guidance))
    made, told = [], {"on": "emoji", "guidance": guidance}
    if guard is not None:
        found = measured(guidance, "judge", _adaptive(guidance, guard), samples)
        row = {"method": "adaptive_guidance, estimate", "setting": f"{guard[0]:g} x {guard[1]}"}
        made.append({**told, **row, "share": found["share"], "psnr": found["psnr"]})
    if every is not None:
        found = measured(guidance, "judge", apply_linear_ag(base(guidance), table(guidance, every)), samples)
        made.append({**told, "method": "linear_ag", "setting": every, "share": found["share"], "psnr": found["psnr"]})
    first = made[0] if guard is not None else {"share": 0.0, "psnr": 0.0}
    others = "; ".join(f"{row['method']} {row['share']:.1%} at {row['psnr']:.1f} dB" for row in made)
    how = (
        f"run-time guard on the cosine, last difference while it fires, setting {guard} chosen on other names; unipc "
        f"20 steps, guidance {guidance:g} (the card's), {len(samples)} pictures of {NAMES} names: {others}; below "
        f"{DECIBELS:g} dB counts as 0"
    )
    value = first["share"] if first["psnr"] >= DECIBELS else 0.0
    return made, Claim(CLAIM, ">=", BOUND, how, value, None, len(samples))
