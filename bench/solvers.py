"""Methods against evaluations: error on two oracles and on the bundled model, at guidance 1 and 4; orders and parity.

Oracles: one narrow Gaussian and a seven-mode mixture, denoisers in closed form, float64, levels even in lam over
[-4, 4]; guidance combines the denoiser of a class with that of all data. The error is the root mean square of the
final state to the converged one (exact for the Gaussian without guidance), in units of its own root mean square. On the
model: PSNR to the converged same-noise latents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.bench import oracle, solvers_guidance, solvers_search
from vivace.bench.harness import Claim, report
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.engine.sample import sample
from vivace.errors import ArgumentError

EVALUATIONS = (5, 6, 8, 10, 12, 15, 20)
GUIDANCE = (1.0, 4.0)
SAMPLES = 256  # starts of an oracle's error
CONVERGED = 400  # rows of UniPC-3 that stand for the solution where there is no closed form
PROMPTS = ("red heart", "pizza", "rocket", "cat face", "evergreen tree", "fire", "rainbow", "dog face")
PARITY = (2000, 160)  # random configurations in full, quick

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("ddim", {}),
    "heun": ("heun", {}),
    "dpm_solver 2": ("dpm_solver", {"order": 2}),
    "dpm_solver 3": ("dpm_solver", {"order": 3}),
    "dpmpp_2s": ("dpmpp_2s", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_3m": ("dpmpp_3m", {}),
    "dpmpp_3m published": ("dpmpp_3m", {"variant": "published"}),
    "deis rhoab 3": ("deis", {"variant": "rhoab", "order": 3}),
    "ipndm 4": ("ipndm", {}),
    "lms 4": ("lms", {}),
    "unipc 2 bh2": ("unipc", {}),
    "unipc 3 bh1": ("unipc", {"order": 3, "variant": "bh1"}),
    "unipc 3 bh2": ("unipc", {"order": 3}),
}


@dataclass(frozen=True)
class Oracle:
    """Closed-form data of a class and of everything, in D dimensions."""

    name: str
    cond: oracle.Data
    uncond: oracle.Data
    size: int

    def error(self, solver: str, options: Mapping[str, Any], guidance: float, evaluations: int) -> tuple[int, float]:
        """(evaluations used, relative error) of the most steps that need at most so many evaluations."""

        def plan_of(steps: int) -> Plan:
            return oracle.plan_on(oracle.even_grid(oracle.EDM, steps), solver, "eps", options)

        plan = at_most(plan_of, evaluations)
        got, want = self.run(plan, guidance), _solution(self, guidance)
        return plan.nfe, float(torch.sqrt(((got - want) ** 2).mean() / (want**2).mean()))

    def run(self, plan: Plan, guidance: float) -> Tensor:
        """Final states [SAMPLES, size] of `plan` from fixed noise."""
        cond, uncond = oracle.denoiser_for(self.cond, plan), oracle.denoiser_for(self.uncond, plan)
        if guidance == 1.0:
            return sample(cond, plan, self.noise())
        branches = {"cond": cond, "uncond": uncond}
        guided = apply_guidance(plan, guidance)
        return sample(lambda x, t, branch: branches[branch](x, t), guided, self.noise())

    def noise(self) -> Tensor:
        return torch.as_tensor(np.random.default_rng(11).normal(size=(SAMPLES, self.size)))

    def solution(self, guidance: float) -> Tensor:
        """Exact final states where known, else those of many rows."""
        grid = oracle.even_grid(oracle.EDM, CONVERGED)
        if guidance == 1.0 and isinstance(self.cond, oracle.Gaussian):
            start = math.hypot(*grid.level(0)) * self.noise()
            return self.cond.solve(start, grid.level(0), grid.level(grid.steps))
        return self.run(oracle.plan_on(grid, "unipc", "eps", {"order": 3}), guidance)


@cache
def _solution(problem: Oracle, guidance: float) -> Tensor:
    return problem.solution(guidance)


@cache
def oracles() -> tuple[Oracle, ...]:
    """The Gaussian against a wider one, and three of the seven modes against all seven."""
    narrow, seven = oracle.Gaussian.narrow(8), oracle.Mixture.seven()
    wide = oracle.Gaussian(torch.zeros_like(narrow.mean), narrow.variance + 1.0)
    few = oracle.Mixture(seven.means[:3], seven.weights[:3] / seven.weights[:3].sum(), seven.deviations[:3])
    return Oracle("gauss", narrow, wide, 8), Oracle("mixture", few, seven, 2)


def at_most(plan_of: Callable[[int], Plan], evaluations: int) -> Plan:
    """The plan of the most steps whose network evaluations are at most `evaluations`."""
    for steps in range(evaluations, 0, -1):
        plan = plan_of(steps)
        if plan.nfe <= evaluations:
            return plan
    raise ArgumentError(f"bench solvers: no plan with at most {evaluations} evaluations")


def oracle_rows(quick: bool, only: Sequence[str] = tuple(METHODS)) -> list[dict[str, Any]]:
    """One row per oracle, guidance, method and number of evaluations."""
    counts = (10, 20) if quick else EVALUATIONS
    rows = []
    for problem, guidance, name, count in itertools.product(oracles(), GUIDANCE, only, counts):
        nfe, error = problem.error(*METHODS[name], guidance, count)
        rows.append(
            {"solver": name, "on": problem.name, "guidance": guidance, "evaluations": count, "nfe": nfe, "error": error}
        )
    return rows


def emoji_rows(quick: bool) -> Iterator[dict[str, Any]]:
    """The same methods on the bundled model: PSNR in dB to the converged same-noise latents, uniform timesteps."""
    from vivace.metrics.reference import converged, quality_of
    from vivace.models.pipe import load

    pipe = load("emoji")
    prompts = PROMPTS[:2] if quick else PROMPTS
    for guidance in GUIDANCE:
        reference = converged(pipe, prompts, guidance=guidance)
        session = pipe.compile(_model_plan(pipe.spec, "ddim", {}, guidance, 5))
        for name, count in itertools.product(METHODS, (10,) if quick else EVALUATIONS):
            plan = _model_plan(pipe.spec, *METHODS[name], guidance, count)
            quality = quality_of(session, reference, plan=plan).mean()
            yield {
                "solver": name,
                "on": "emoji",
                "guidance": guidance,
                "evaluations": count,
                "nfe": plan.nfe,
                "error": quality["drift"],
                "psnr": quality["psnr"],
            }


def prepare() -> None:
    """Compute and keep the converged latents that the model's rows are judged by."""
    from vivace.metrics.reference import converged
    from vivace.models.pipe import load

    for guidance in GUIDANCE:
        converged(load("emoji"), PROMPTS, guidance=guidance)


def _model_plan(spec: Any, solver: str, options: Mapping[str, Any], guidance: float, evaluations: int) -> Plan:
    def plan_of(steps: int) -> Plan:
        return make_plan(spec.schedule, solver, steps, prediction=spec.prediction, **options)

    plan = at_most(plan_of, evaluations)
    return plan if guidance == 1.0 else apply_guidance(plan, guidance)


# ---------------------------------------------------------------- claims
def order_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Largest distance of a measured order from theory."""
    table = oracle.order_table()
    rows = [
        {"solver": f"{name} {options or ''}".strip(), "on": "gauss", "order": theory, "measured": measured}
        for name, options, theory, measured in table
    ]
    name, options, theory, measured = max(table, key=lambda row: abs(row[3] - row[2]))
    how = (
        f"{len(table)} deterministic solvers and variants, Gaussian of variances 0.3-1.5, {oracle.STEPS} steps even in "
        f"lam over [-4, 4], float64; worst: {name} {options}, {measured:.3f} for {theory}"
    )
    return rows, Claim("solvers.order_worst_gap", "<=", 0.25, how, abs(measured - theory), None, len(table))


def ratio_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Error of DDIM over that of UniPC-3 at 20 evaluations on the Gaussian."""
    problem = oracles()[0]
    names = ("ddim", "unipc 3 bh2")
    errors = [problem.error(*METHODS[name], 1.0, 20) for name in names]
    rows = [
        {"solver": name, "on": "gauss", "guidance": 1.0, "evaluations": 20, "nfe": nfe, "error": error}
        for name, (nfe, error) in zip(names, errors, strict=True)
    ]
    how = f"error {errors[0][1]:.3g} over {errors[1][1]:.3g}, {SAMPLES} starts, float64, exact solution; deterministic"
    value = errors[0][1] / errors[1][1]
    return rows, Claim("solvers.gauss.unipc3_vs_ddim_error_ratio_at_20", ">=", 5.0, how, value, None, SAMPLES)


@cache
def _parity(count: int) -> dict[str, Any]:
    from vivace.bench.diffusers_parity import parity_report

    return parity_report(count, seed=0)


def agree_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Share of random scheduler configurations that diffusers runs and our plan reproduces."""
    return _parity_claim("solvers.from_diffusers_agree_fraction", ">=", 0.98, quick, "agree")


def deviate_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Number of those whose plan runs and differs."""
    return _parity_claim("solvers.from_diffusers_deviate", "<=", 0.0, quick, "deviate")


def _parity_claim(name: str, op: str, bound: float, quick: bool, field: str) -> tuple[list[dict[str, Any]], Claim]:
    from importlib.util import find_spec

    if find_spec("diffusers") is None:
        return [], Claim(name, op, bound, "diffusers is not installed (make bench-setup)")
    found = _parity(PARITY[1] if quick else PARITY[0])
    runs = found["runnable"]
    value = found["agree_fraction"] if field == "agree" else float(found["deviate"])
    how = (
        f"{runs} random configurations that diffusers runs: {found['agree']} agree, {found['refused']} refused, "
        f"{found['deviate']} deviate; limits 1e-9 (float64), 1e-5 (float32), or 16 times the scheduler's own rounding"
    )
    row = {"on": "diffusers", **{key: found[key] for key in ("agree", "refused", "deviate")}}
    return [row], Claim(name, op, bound, how, value, None, runs)


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {
    "solvers.order_worst_gap": order_claim,
    "solvers.gauss.unipc3_vs_ddim_error_ratio_at_20": ratio_claim,
    "solvers.from_diffusers_agree_fraction": agree_claim,
    "solvers.from_diffusers_deviate": deviate_claim,
    solvers_search.NAME: solvers_search.nfe_claim,
    solvers_guidance.CLAIM: solvers_guidance.guidance_claim,
}


def run(op: str | None = None, claim: str | None = None, quick: bool = False) -> dict[str, Any]:
    """All rows and claims; with `claim`, that one and the rows behind it."""
    if op is not None:
        raise ArgumentError("bench solvers: --op belongs to the suite kernels; drop it")
    if claim is not None and claim not in CLAIMS:
        raise ArgumentError(f"bench solvers: claim {claim!r} is not here; use one of {', '.join(CLAIMS)}")
    rows: list[dict[str, Any]] = [] if claim else [*oracle_rows(quick), *emoji_rows(quick)]
    claims = []
    for name in CLAIMS if claim is None else [claim]:
        more, measured = CLAIMS[name](quick)
        rows += more
        claims.append(measured)
    return report("solvers", rows, claims)


# ---------------------------------------------------------------- plots
def plot(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Error against evaluations (log-log), a panel per problem and guidance; and the orders. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [(on, guidance) for on in ("gauss", "mixture", "emoji") for guidance in GUIDANCE]
    figure, axes = pyplot.subplots(3, 2, figsize=(11, 13), sharex=True)
    for axis, (on, guidance) in zip(axes.flat, cases, strict=True):
        for i, name in enumerate(METHODS):
            mine = [r for r in data["rows"] if (r.get("solver"), r["on"], r.get("guidance")) == (name, on, guidance)]
            points = sorted((row["nfe"], row["error"]) for row in mine)
            axis.loglog(*zip(*points, strict=True), marker="ovs^DPX"[i % 7], ms=3, lw=1, label=name) if points else None
        axis.set_title(f"{on}, guidance {guidance:g}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.set_xticks(EVALUATIONS, [str(count) for count in EVALUATIONS])
        axis.minorticks_off()
    axes[0, 1].legend(fontsize=7, ncols=2)
    figure.supxlabel("network evaluations")
    figure.supylabel("relative error")
    return [_save(figure, folder / "solvers.png"), plot_orders(folder / "orders.png")]


def plot_orders(path: Path, steps: Sequence[int] = (10, 20, 40, 80, 160, 320)) -> Path:
    """Largest error along the trajectory against steps on the Gaussian, with lines of slope 1 to 4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 9), sharex=True, sharey=True)
    for axis, order in zip(axes.flat, (1, 2, 3, 4), strict=True):
        for i, (name, options, theory, multistep) in enumerate(o for o in oracle.ORDERS if o[2] == order):
            errors = [oracle.error_at(name, options, theory if multistep else 1, count) for count in steps]
            short = " ".join(str(v) for k, v in options.items() if k != "lower_order_final")
            axis.loglog(steps, errors, marker="ovs^DPX"[i % 7], ms=3, lw=1, label=f"{name} {short}".strip())
        axis.loglog(steps, [3.0 * (steps[0] / 10 * 5 / count) ** order for count in steps], "k--", lw=1)
        axis.set_title(f"order {order} in theory (dashed: slope {order})", fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.set_ylim(1e-13, 10)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=6)
    figure.supxlabel("steps")
    figure.supylabel("largest error along the trajectory, standard deviations")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    return path
