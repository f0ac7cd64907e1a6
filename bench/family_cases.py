"""What `bench solvers --model` and `--oracle` compare: methods, and the two problems that they are tuned and judged on.

A problem has two sets of samples that share neither names nor noise: calibrators see the first, figures are of the
second. A tuned method's tables are artefacts (see `artefacts`), keyed by all they depend on, its calibrator's text too.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vivace.bench import oracle, solvers_search
from vivace.bench.artefacts import Artefact
from vivace.engine import passes, search
from vivace.engine.calibrate.methods import METHODS, calibrate, calibrator_of, method_options
from vivace.engine.calibrate.problem import Problem
from vivace.engine.calibrate.table import CalibrationTable
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.plan import Plan
from vivace.engine.sample import sample
from vivace.engine.solvers import SOLVERS
from vivace.errors import ArgumentError

EVALUATIONS = (5, 6, 8, 10, 12, 15, 20)
GUIDANCE = (1.0, 4.0, 7.5)
CONVERGED = 400  # evaluations of UniPC-3 that stand for the oracle's solution
TABLE, PLAN = "table.safetensors", "plan.json"
SEARCHERS = ("objective", "refine", "spaces", "survey")  # modules of the search
SEARCH = {"trials": 24, "rounds": 2}


@dataclass(frozen=True)
class Tuned:
    """A table: method in `METHODS`, options of its calibrator; each: one for every number of steps, not one for all."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    each: bool = False


@dataclass(frozen=True)
class Case:
    """A method: solver, its options, passes behind guidance, the table that solver or last pass takes.

    searched: options of a search of the whole plan, `engine.search`. grid: in place of the problem's. ode: it ends at
    the solution of the ODE, so that it has an error to it.
    """

    name: str
    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    tuned: Tuned | None = None
    searched: Mapping[str, Any] | None = None
    grid: str | None = None
    ode: bool = True

    @property
    def ready(self) -> bool:
        """All that it is made of is in this release."""
        there = self.solver in SOLVERS and all(name in passes.__all__ for name, _ in self.passes)
        return there and (self.tuned is None or self.tuned.method in METHODS)

    def plan(self, setup: Setup, guidance: float, steps: int, *, neutral: bool = False) -> Plan:
        """The plan of so many steps; neutral: without its table."""
        if self.searched is not None:
            return Plan.load(setup.searched(self, guidance, steps).get() / PLAN)
        problem, options, adds = setup.problem("judge", guidance), dict(self.options), [*self.passes]
        if self.tuned is not None and not neutral:
            table = setup.table(self, guidance, steps)
            if METHODS[self.tuned.method].taken == "solver":
                options["table"] = table
            else:
                name, args = adds.pop()
                adds.append((name, {**args, "table": table}))
        elif self.tuned is not None and METHODS[self.tuned.method].taken != "solver":
            adds.pop()
        plan = problem.plan(self.solver, steps, **self.places(setup), **options)
        for name, args in adds:
            plan = getattr(passes, name)(plan, **args)
        return plan

    def places(self, setup: Setup) -> dict[str, str]:
        """grid and final of `make_plan`, as far as they are not its defaults."""
        return {**setup.places, **({} if self.grid is None else {"grid": self.grid})}

    def within(self, setup: Setup, guidance: float, evaluations: int) -> Plan:
        """Its plan of the most steps that needs at most so many evaluations. Raises ArgumentError."""
        if self.searched is not None:
            return self.plan(setup, guidance, evaluations)
        alike = self.tuned is not None and (self.tuned.each or METHODS[self.tuned.method].taken == "solver")
        most = evaluations if alike else evaluations + evaluations // 2  # some passes leave evaluations out
        for steps in range(most, 0, -1):
            if self.plan(setup, guidance, steps, neutral=alike).nfe <= evaluations:
                return self.plan(setup, guidance, steps)
        raise ArgumentError(f"bench solvers: {self.name} has no plan with at most {evaluations} evaluations")


def of(name: str, solver: str, **options: Any) -> Case:
    """A solver with plain options."""
    return Case(name, solver, options)


def then(case: Case, name: str, passed: str, **arguments: Any) -> Case:
    """A case and a pass behind it."""
    return Case(name, case.solver, case.options, (*case.passes, (passed, arguments)), grid=case.grid, ode=case.ode)


def aligned(case: Case) -> Case:
    """A solver that is fed other timesteps."""
    tuned = Tuned("time_alignment", {"solver": case.solver, "samples": 8, "evaluations": 60}, each=True)
    return Case(f"{case.name} + alignment", case.solver, {}, (("apply_time_alignment", {}),), tuned)


TWO_M, UNIPC = of("dpmpp_2m", "dpmpp_2m"), of("unipc 2", "unipc")
IPNDM = of("ipndm 4", "ipndm")
IIA_WHOLE = Tuned("iia", {"base": "dpmpp_2m", "target": "trajectory", "evaluations": 60}, each=True)
V3 = Tuned("dpm_solver_v3", {"nodes": 24, "samples": 64, "share": "channel"})
KNOWN: tuple[Case, ...] = (
    of("ddim", "ddim"),
    of("heun", "heun"),
    of("dpm_solver 2", "dpm_solver", order=2),
    of("dpm_solver 2 singlestep", "dpm_solver", order=2, variant="singlestep"),
    of("dpm_solver 3", "dpm_solver", order=3),
    of("dpm_solver 3 singlestep", "dpm_solver", order=3, variant="singlestep"),
    of("dpmpp_2s", "dpmpp_2s"),
    TWO_M,
    of("dpmpp_3m", "dpmpp_3m"),
    of("deis tab 3", "deis", order=3),
    IPNDM,
    UNIPC,
    of("unipc 3", "unipc", order=3),
    of("unipc 3 bh1", "unipc", order=3, variant="bh1"),
    *(Case(f"{case.name} {grid}", case.solver, grid=grid) for case in (TWO_M, UNIPC) for grid in ("karras", "logsnr")),
    Case("dpmpp_2m_sde", "dpmpp_2m_sde", ode=False),
)
RULES: tuple[Case, ...] = (
    of("ghvb 1.8", "ghvb", order=2),
    of("ghvb 3.8", "ghvb", order=4),
    then(IPNDM, "ipndm 4 + HB", "apply_momentum", beta=0.9),
    then(TWO_M, "dpmpp_2m + HB", "apply_momentum", beta=0.8),
    then(TWO_M, "dpmpp_2m + Nesterov", "apply_momentum", beta=0.8, kind="nesterov"),
    then(of("ddim", "ddim"), "ddim + DualFast", "apply_dualfast"),
    then(TWO_M, "dpmpp_2m + DualFast", "apply_dualfast"),
    then(UNIPC, "unipc 2 + DualFast", "apply_dualfast"),
    of("gradient_estimation", "gradient_estimation"),
    of("bdia 0.5", "bdia", gamma=0.5),
    then(TWO_M, "dpmpp_2m + AFS", "apply_afs"),
    Case("dpmpp_2m + Restart", "dpmpp_2m", {}, (("apply_restart", {"levels": [[3, 1, 0.5, 2.0]]}),), ode=False),
)
TUNED: tuple[Case, ...] = (
    Case("dpm_solver_v3", "dpm_solver_v3", {}, tuned=V3),
    Case("dpm_solver_v3 2 half", "dpm_solver_v3", {"order": 2, "corrector": "noisy"}, tuned=V3),
    Case("dc_solver unipc 2", "dc_solver", tuned=Tuned("dc_solver")),
    Case("dc_solver dpmpp 2", "dc_solver", tuned=Tuned("dc_solver", {"base": "dpmpp"})),
    *(
        Case(f"iia {base}", "iia", {"base": base}, tuned=Tuned("iia", {"base": base}, each=True))
        for base in ("ddim", "heun", "dpmpp_2m")
    ),
    Case("iia dpmpp_2m trajectory", "iia", {"base": "dpmpp_2m"}, tuned=IIA_WHOLE),
    *(aligned(case) for case in (of("ddim", "ddim"), TWO_M, UNIPC)),
    Case(
        "dpmpp_2m + score calibration", "dpmpp_2m", {}, (("apply_score_calibration", {}),),
        Tuned("score_calibration", {"steps": 20, "samples": 512}),
    ),
    Case(
        "dpmpp_2m + teleport", "dpmpp_2m", {}, (("apply_teleport", {"share": 0.2}),),
        Tuned("teleport", {"samples": 256, "rank": 32}),
    ),
)  # fmt: skip
SEARCHED: tuple[Case, ...] = (
    Case("usf", "usf", searched=SEARCH),
    Case("dpmpp_2m + timesteps", "dpmpp_2m", searched=SEARCH),
)
CASES: tuple[Case, ...] = (*KNOWN, *RULES, *TUNED, *SEARCHED)


# ---------------------------------------------------------------- problems
@dataclass(frozen=True)
class Setup:
    """A problem with its two sets. name: "emoji" or "gmm"; places: grid and final; counts: samples to tune on, to judge
    by, and to judge by in quick mode; budget: samples that plans are searched on and that choose among them."""

    name: str
    places: Mapping[str, str] = field(default_factory=dict, hash=False)
    counts: tuple[int, int, int] = (16, 16, 8)
    budget: tuple[int, int] = (8, 4)

    def problem(self, role: str, guidance: float) -> Problem:
        """The problem with the samples of a role: "tune" or "judge"."""
        return _problem(self.name, role, guidance)

    def samples(self, quick: bool) -> range:
        """Numbers of the judged samples."""
        return range(self.counts[2 if quick else 1])

    def run(self, plan: Plan, guidance: float, samples: Sequence[int]) -> Tensor:
        """Final states [n, ...] of the judged samples."""
        problem = self.problem("judge", guidance)
        if self.name == "gmm":  # one call: a batch of any size
            with torch.inference_mode():
                return sample(_mixtures(problem.prediction), plan, problem.noise(samples), seed=problem.seed)
        return problem.run(plan, samples).cpu()

    def converged(self, guidance: float, samples: Sequence[int]) -> Tensor:
        """Where the ODE ends from the noise of the judged samples."""
        return _converged(self, guidance)[: len(samples)]

    def table(self, case: Case, guidance: float, steps: int) -> CalibrationTable:
        """The table of a tuned case, made now when it is not there."""
        return CalibrationTable.load(self.artefact(case, guidance, steps).get() / TABLE)

    def artefact(self, case: Case, guidance: float, steps: int) -> Artefact:
        """Where a case's table is kept, and how it is made."""
        assert case.tuned is not None
        problem, method = self.problem("tune", guidance), case.tuned.method
        has, given = method_options(method), dict(case.tuned.options)
        if "steps" in has:
            given.setdefault("steps", steps if case.tuned.each else list(EVALUATIONS))
        more = {**case.places(self), "samples": self.counts[0]}
        given |= {name: value for name, value in more.items() if name in has and name not in given}
        if "rank" in given:
            given["rank"] = min(given["rank"], math.prod(problem.shape))
        key = {
            "method": method, "options": given, "guidance": guidance, "fingerprint": problem.fingerprint,
            "problem": self.name, "prompts": list(problem.prompts), "seed": problem.seed, "code": _code(method),
        }  # fmt: skip

        def make(folder: Path) -> None:
            calibrate(method, problem, resume=None, **given).save(folder / TABLE)

        return Artefact(f"table-{method}", key, make)

    def searched(self, case: Case, guidance: float, evaluations: int) -> Artefact:
        """Where a searched plan is kept, and how it is found; on the model those of `solvers_search`, no others."""
        if self.name == "emoji":
            known = {solver: counts for solver, counts in _searched(guidance) if evaluations in counts}
            if case.solver not in known:
                there = [(g, counts) for g in GUIDANCE for name, counts in _searched(g) if name == case.solver]
                told = "; ".join(f"{', '.join(map(str, counts))} at guidance {g:g}" for g, counts in there)
                raise ArgumentError(f"bench solvers: on emoji there are plans for {told} only")
            return solvers_search.searched(guidance, evaluations, case.solver)
        samples, judged = self.budget
        problem = self.problem("tune", guidance)
        options = {"samples": samples, "judged": judged, **(case.searched or {})}
        key = {
            "solver": case.solver, "options": options, "guidance": guidance, "problem": self.name, "seed": problem.seed,
            "evaluations": evaluations,
            "code": _text_hash(import_module(f"{search.__name__}.{part}") for part in SEARCHERS),
        }  # fmt: skip

        def make(folder: Path) -> None:
            if case.solver == "usf":
                found = search.search_usf(problem, evaluations, **options)
            else:
                found = search.search_timesteps(problem, case.solver, evaluations, **options)
            found.plan.save(folder / PLAN)

        return Artefact("family-searched", key, make)


def _searched(guidance: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(solver, evaluations) for which there are searched plans of the model."""
    yield "usf", solvers_search.SEARCHED[guidance]
    if guidance == solvers_search.MAIN:
        yield "dpmpp_2m", (solvers_search.TIMED,)


EMOJI = Setup("emoji")
GMM = Setup("gmm", {"grid": "logsnr", "final": "sigma_min"}, (256, 1024, 256), (64, 32))
SETUPS: Mapping[str, Setup] = {"emoji": EMOJI, "gmm": GMM}
VP = NoiseSchedule.vp(np.linspace(1e-4, 0.02, 1000))


@cache
def _problem(name: str, role: str, guidance: float) -> Problem:
    if name == "gmm":
        seed = solvers_search.SEEDS[role]
        return Problem.of_callable(_mixtures("eps"), VP, "eps", (2,), guidance=guidance, seed=seed)
    return solvers_search.problem(role, guidance)


@cache
def _mixtures(prediction: str) -> Callable[..., Tensor]:
    """Three of the seven modes as the class, all seven without a class."""
    seven = oracle.Mixture.seven()
    few = oracle.Mixture(seven.means[:3], seven.weights[:3] / seven.weights[:3].sum(), seven.deviations[:3])
    branches = {
        "cond": oracle.schedule_denoiser(few, VP, prediction),
        "uncond": oracle.schedule_denoiser(seven, VP, prediction),
    }

    def denoiser(x: Tensor, t: Tensor, branch: str = "cond") -> Tensor:
        return branches[branch](x, t.clamp(0.0, VP.noise_end * VP.timestep_scale))  # rounding may leave the schedule

    return denoiser


@cache
def _converged(setup: Setup, guidance: float) -> Tensor:
    """Of all judged samples, kept."""
    if setup.name == "emoji":
        return load_file(solvers_search.reference("judge", guidance).get() / solvers_search.LATENTS)["latents"]
    problem, samples = setup.problem("judge", guidance), setup.samples(False)
    plan = problem.plan("unipc", CONVERGED, order=3, **setup.places)
    key = {"plan": plan.hash, "problem": setup.name, "seed": problem.seed, "samples": len(samples)}

    def make(folder: Path) -> None:
        np.save(folder / "latents.npy", setup.run(plan, guidance, samples).numpy())

    return torch.from_numpy(np.load(Artefact("family-converged", key, make).get() / "latents.npy"))


def _code(method: str) -> str:
    """Of a method's calibrator, and of the solver or pass that takes its table."""
    taken = METHODS[method].taken
    used = (calibrator_of(method), SOLVERS[method] if taken == "solver" else getattr(passes, taken))
    return _text_hash(import_module(function.__module__) for function in used)


def _text_hash(modules: Iterable[Any]) -> str:
    """SHA-256 of the text of modules."""
    return sha256("".join(inspect.getsource(module) for module in modules).encode()).hexdigest()[:16]


def cases(only: Sequence[str] = ()) -> Iterator[Case]:
    """The cases that this release has; only: of these names."""
    return (case for case in CASES if case.ready and (not only or case.name in only))


def points(quick: bool) -> Iterator[tuple[float, int]]:
    """(guidance, evaluations) of the table."""
    return itertools.product(GUIDANCE, (5, 10, 20) if quick else EVALUATIONS)
