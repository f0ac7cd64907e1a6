"""How few evaluations reach the error of 20 steps of DPM-Solver++(2M) on the bundled model, with searched plans.

A plan is searched once, on names and noise of its own, and kept: with the code in `plans`, by the name of its artefact,
or as that artefact. Errors are measured here, on names and noise that no search saw. An evaluation under guidance is a
pair of branches. The error is the mean over samples of the distance to the converged latent of the same noise over that
latent's length; a plan reaches the baseline when its error is not above it and its mean PSNR not below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vivace.bench.artefacts import Artefact
from vivace.bench.harness import Claim
from vivace.engine.calibrate.problem import Problem
from vivace.engine.plan import Plan
from vivace.engine.search import search_timesteps, search_usf
from vivace.engine.search.objective import converged
from vivace.metrics.quality import latent_drift, psnr

NAME, BOUND = "solvers.emoji.nfe_for_dpmpp2m_20_error", 12.0
MODEL, MAIN = "emoji", 4.0  # guidance that the claim is about
FORMAT = 1  # raise it when searches change
NAMES, JUDGED, QUICK = 32, 32, 16  # names of each set; samples that judge
SEEDS = {"tune": 1001, "judge": 2002}
SEARCHED: Mapping[float, tuple[int, ...]] = {4.0: (7, 8, 10), 1.0: (8,), 7.5: (8, 10, 12)}  # evaluations by guidance
TIMED = 10  # steps of the solver whose timesteps alone are searched
BUDGET = {"samples": 16, "judged": 8, "trials": 48, "rounds": 1}
COUNTS = {"tune": BUDGET["samples"] + BUDGET["judged"], "judge": JUDGED}
KEPT = Path(__file__).resolve().parent / "plans"
PLAN, LATENTS = "plan.json", "latents.safetensors"
BASELINE, BEST_GRID = 20, "logsnr"  # steps of DPM-Solver++(2M); its best named grid with them at guidance 4
PLAIN = (("dpmpp_2m", 8), ("dpmpp_2m", 10), ("unipc", 10), ("dpmpp_2m", 12), ("unipc", 12))


@cache
def _pipe() -> Any:
    from vivace.models.pipe import load

    return load(MODEL)


@cache
def names() -> Mapping[str, tuple[int, ...]]:
    """Class ids to search on and to judge by, none in both."""
    from vivace.models.quantized.calibrate import default_prompts

    drawn = list(dict.fromkeys(default_prompts(_pipe(), 4 * NAMES, SEEDS["judge"])))
    return {"judge": tuple(drawn[:NAMES]), "tune": tuple(drawn[NAMES : 2 * NAMES])}


@cache
def problem(role: str, guidance: float) -> Problem:
    """The model with the names and the noise of a role, "tune" or "judge"."""
    return Problem.of_pipe(_pipe(), names()[role], guidance=guidance, seed=SEEDS[role])


def searched(guidance: float, evaluations: int, solver: str = "usf") -> Artefact:
    """The plan of a search: of every decision, or with another solver of its timesteps."""
    tuned = problem("tune", guidance)
    key = {
        "format": FORMAT, "fingerprint": tuned.fingerprint, "guidance": guidance, "evaluations": evaluations,
        "solver": solver, "names": list(tuned.prompts), "seed": tuned.seed, "budget": BUDGET,
    }  # fmt: skip

    def make(folder: Path) -> None:
        budget: dict[str, Any] = {**BUDGET, "reference": _latents("tune", guidance)}
        if solver == "usf":
            found = search_usf(tuned, evaluations, **budget)
        else:
            found = search_timesteps(tuned, solver, evaluations, **budget)
        found.plan.save(folder / PLAN)

    return Artefact(f"searched-{solver}-{evaluations}-{MODEL}", key, make)


def kept(artefact: Artefact) -> Path:
    """The file of a searched plan that comes with the code, whether it is there or not."""
    return KEPT / f"{artefact.path.name}.json"


def plan_of(guidance: float, evaluations: int, solver: str = "usf") -> Plan:
    """The searched plan: kept, or of its artefact, which is made now when it is not there."""
    artefact = searched(guidance, evaluations, solver)
    file = kept(artefact)
    return Plan.load(file if file.is_file() else artefact.get() / PLAN)


def reference(role: str, guidance: float) -> Artefact:
    """Converged latents of a role's samples."""
    mine, count = problem(role, guidance), COUNTS[role]
    key = {
        "format": FORMAT, "fingerprint": mine.fingerprint, "guidance": guidance, "names": list(mine.prompts),
        "seed": mine.seed, "samples": count,
    }  # fmt: skip

    def make(folder: Path) -> None:
        save_file({"latents": converged(mine, range(count)).contiguous().cpu()}, folder / LATENTS)

    return Artefact(f"{role}-{MODEL}", key, make)


def _latents(role: str, guidance: float) -> Tensor:
    return load_file(reference(role, guidance).get() / LATENTS)["latents"]


def artefacts() -> Iterator[Artefact]:
    """What claims and rows need, the claim's first."""
    plans = [searched(guidance, count) for guidance, counts in SEARCHED.items() for count in counts]
    missing = [made for made in (*plans, searched(MAIN, TIMED, "dpmpp_2m")) if not kept(made).is_file()]
    yield from (reference("judge", guidance) for guidance in SEARCHED)
    if find_spec("optuna") is not None:
        yield from missing


def rows(guidance: float, quick: bool) -> list[dict[str, Any]]:
    """Baselines, plain rules and searched plans at one guidance; the first row is the baseline, searched ones last."""
    judge, samples = problem("judge", guidance), range(QUICK if quick else JUDGED)
    want = _latents("judge", guidance)[: len(samples)]

    def row(name: str, evaluations: int, plan: Plan) -> dict[str, Any]:
        made = {"solver": name, "on": MODEL, "guidance": guidance, "evaluations": evaluations, "nfe": plan.nfe}
        return made | _quality(judge.run(plan, samples).cpu(), want)

    made = [row("dpmpp_2m", BASELINE, judge.plan("dpmpp_2m", BASELINE))]
    made.append(row(f"dpmpp_2m {BEST_GRID}", BASELINE, judge.plan("dpmpp_2m", BASELINE, grid=BEST_GRID)))
    if not quick:
        made += [row(name, steps, judge.plan(name, steps)) for name, steps in PLAIN]
        if guidance == MAIN:
            timed = plan_of(guidance, TIMED, "dpmpp_2m")
            made.append(row("dpmpp_2m, timesteps searched", TIMED, timed))
    for evaluations in SEARCHED[guidance]:
        made.append(row("usf", evaluations, plan_of(guidance, evaluations)))
    return made


def _quality(latents: Tensor, want: Tensor) -> dict[str, float]:
    got, there = latents.float().numpy(), want.float().numpy()
    return {"error": float(latent_drift(got, there).mean()), "psnr": float(psnr(got, there).mean())}


def reached(made: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the shortest searched plan that is as good as the first row; the first row when none is."""
    error, decibels = made[0]["error"], made[0]["psnr"]
    good = [row for row in made if row["solver"] == "usf" and row["error"] <= error and row["psnr"] >= decibels]
    return min(good, key=lambda row: int(row["nfe"]), default=made[0])


def nfe_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Evaluations of the shortest searched plan that reaches 20 steps of DPM-Solver++(2M)."""
    ready = all(kept(made).is_file() or made.ready for made in (searched(MAIN, count) for count in SEARCHED[MAIN]))
    if find_spec("optuna") is None and not ready:
        return [], Claim(NAME, "<=", BOUND, "optuna is not installed (pip install 'vivace[search]')")
    made = {guidance: rows(guidance, quick) for guidance in ((MAIN,) if quick else SEARCHED)}
    mine, samples = made[MAIN], QUICK if quick else JUDGED
    shown = [
        f"{row['solver']} {row['nfe']}: {row['error']:.4f}, {row['psnr']:.2f} dB" for row in (*mine[:2], reached(mine))
    ]
    how = f"guidance {MAIN:g}, {samples} samples of names and noise no search saw; {'; '.join(shown)}"
    for guidance, found in made.items():
        how += "" if guidance == MAIN else f"; guidance {guidance:g}: {reached(found)['nfe']}"
    value = float(reached(mine)["nfe"])
    return [row for found in made.values() for row in found], Claim(NAME, "<=", BOUND, how, value, None, samples)
