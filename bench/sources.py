"""Sources of steps and Picard iteration, as docs/solvers/{adaptive,time_shift,picard}.md show them.

    python -m vivace.bench.sources {adaptive,time_shift,picard} {gmm,emoji} [--samples N]

Prints one Markdown table. On the oracle samples run in float64 (the adaptive SDE in float32) and are judged against
the exact probability-flow solution, or as a distribution: energy distance E|a - b| - E|a - a'| / 2 - E|b - b'| / 2 to
exact samples. On the emoji model PSNR (range 2) is to converged pictures of the same noise, Frechet distances are to
these pictures. Evaluations are means over samples, rejected tries included. Times are medians of three, alternating.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace import load, make_plan, sample
from vivace.bench.oracle import Mixture, schedule_denoiser
from vivace.engine.denoiser import CallableDenoiser
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.executors.picard import PicardExecutor
from vivace.engine.noise import normals
from vivace.engine.noise_schedule import NoiseSchedule
from vivace.engine.passes import apply_guidance
from vivace.engine.plan import Plan
from vivace.engine.request import Request
from vivace.engine.session import Session
from vivace.engine.sources import AdaptiveODE, AdaptiveSDE, StepSource, TimeShift
from vivace.engine.verify import verify
from vivace.metrics.features import Features
from vivace.metrics.frechet import frechet
from vivace.metrics.quality import psnr

Row = Sequence[Any]
VP = NoiseSchedule.vp(np.linspace(1e-4, 2e-2, 1000))
DATA = Mixture.seven()
SEED, GUIDANCE = 4242, 2.0


def table(head: Row, rows: Iterator[Row]) -> None:
    """Print rows as they come."""
    print("| " + " | ".join(map(str, head)) + " |")
    print("|" + "---|" * len(head), flush=True)
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        print("| " + " | ".join(cells) + " |", flush=True)


# ---------------------------------------------------------------- the oracle
def oracle_noise(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise [count, 2]."""
    return torch.from_numpy(np.stack([normals((2,), SEED, picture=j) for j in range(count)])).to(dtype)


def oracle_run(planned: Plan | StepSource, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """Samples, and evaluations of a sample on average."""
    spent = torch.zeros(())
    inner = schedule_denoiser(DATA, VP, "eps")

    def counted(x: Tensor, t: Tensor) -> Tensor:
        spent.add_(len(x))
        return inner(x, t)

    return sample(counted, planned, oracle_noise(count, dtype), seed=SEED).double(), float(spent) / count


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance of two sets of points, without the pairs of a point with itself."""

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2.0 * torch.cdist(a, b).mean() - within(a) - within(b))


def exact(count: int) -> Tensor:
    """Exact samples of the mixture."""
    generator = torch.Generator().manual_seed(SEED)
    kind = torch.multinomial(DATA.weights, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return DATA.means[kind] + DATA.deviations[kind, None] * noise


def adaptive_gmm(count: int) -> None:
    """ODE: error against the exact solution; SDE: energy distance."""
    alpha, sigma = VP.alpha(VP.noise_end), VP.sigma(VP.noise_end)
    want = DATA.solve(oracle_noise(count), (alpha, sigma), (VP.alpha(0.0), VP.sigma(0.0)))
    want = DATA.x0(want, VP.alpha(0.0), VP.sigma(0.0))

    def judged(name: str, planned: Plan | StepSource) -> Row:
        x, spent = oracle_run(planned, count)
        return name, spent, float((x - want).square().mean().sqrt())

    def ode() -> Iterator[Row]:
        for order, form in ((2, "eps"), (3, "eps"), (2, "x0"), (3, "x0")):
            for rtol in (0.2, 0.05, 0.01):
                source = AdaptiveODE(VP, "eps", order=order, form=form, rtol=rtol, atol=0.156 * rtol)
                yield judged(f"adaptive, order {order}, {form}, rtol {rtol}", source)
        for steps in (10, 25, 50, 100):
            yield judged(f"unipc, {steps} steps, logsnr", make_plan(VP, "unipc", steps, grid="logsnr"))

    table(("ODE", "evaluations", "rms error"), ode())
    print()
    judge = exact(20_000)

    def sde() -> Iterator[Row]:
        for rtol in (0.5, 0.2, 0.05):
            x, spent = oracle_run(AdaptiveSDE(VP, "eps", rtol=rtol, atol=0.39 * rtol), count, torch.float32)
            yield f"adaptive, rtol {rtol}, atol {0.39 * rtol:.3g}", spent, energy(x, judge)
        for name in ("ddpm", "dpmpp_2m_sde"):
            for steps in (25, 50, 100):
                x, spent = oracle_run(make_plan(VP, name, steps), count, torch.float32)
                yield f"{name}, {steps} steps, uniform", spent, energy(x, judge)
        yield "exact samples", 0, energy(exact(20_000 + count)[-count:], judge)

    table(("SDE", "evaluations", "energy distance"), sde())


def time_shift_gmm(count: int) -> None:
    """Two elements have no variance to speak of: what the method does where it has no ground."""
    judge = exact(20_000)

    def rows() -> Iterator[Row]:
        for window in (0, 30, 80):
            x, _ = oracle_run(TimeShift(VP, "eps", "ddim", 10, window=window), count)
            yield window, energy(x, judge)

    table(("window (DDIM, 10 steps, cutoff 300)", "energy distance"), rows())


def picard_gmm(count: int) -> None:
    """Iterations by tolerance."""
    noise = oracle_noise(count)

    def rows() -> Iterator[Row]:
        for solver, steps in (("ddim", 100), ("ddpm", 100), ("dpmpp_2m", 20)):
            plan = make_plan(VP, solver, steps)
            want = sample(schedule_denoiser(DATA, VP, "eps"), plan, noise, seed=SEED)
            for tolerance, window in ((0.1, None), (0.1, 16), (1e-3, None), (0.0, None)):
                wrapped = CallableDenoiser(schedule_denoiser(DATA, VP, "eps"), "eps", (2,), noise)
                executor = PicardExecutor(EagerExecutor(wrapped), tolerance=tolerance, window=window)
                made: Any = {"shape": (2,), "state_dtype": torch.float64, "probed": False, "expand": verify}
                result = Session(wrapped, [plan], executor, **made)(n=count, latents=noise, seed=SEED)
                told, gap = result.receipt.details["picard"], float((result.latents - want).square().mean().sqrt())
                yield f"{solver} {steps}", tolerance, told["window"], told["iterations"], told["evaluations"], gap

    table(("plan", "tolerance", "window", "iterations", "evaluations", "rms to sequential"), rows())


# ---------------------------------------------------------------- the emoji model
class Emoji:
    """Pictures of different names, one seed each."""

    def __init__(self, count: int) -> None:
        self.pipe = load("emoji")
        self.names = [entry.name for entry in self.pipe.model.prompts.names[:: 1000 // count]][:count]
        self.schedule, self.prediction = self.pipe.spec.schedule, self.pipe.spec.prediction
        self.session = self.pipe.compile(self.plan("ddim", 2))
        self.features = Features.load(self.pipe.model.path.parent)

    def plan(self, solver: str, steps: int, **options: Any) -> Plan:
        """A plan at the card's guidance."""
        return apply_guidance(make_plan(self.schedule, solver, steps, prediction=self.prediction, **options), GUIDANCE)

    def run(self, planned: Plan | StepSource) -> tuple[Tensor, float, list[dict[str, Any]]]:
        """Latents, mean evaluations, what receipts say of the source."""
        states = [self.session.begin(Request(name, planned, seed=SEED, index=j)) for j, name in enumerate(self.names)]
        while running := [state for state in states if not state.done]:
            self.session.step(running)
        results = [self.session.finish(state) for state in states]
        spent = sum(result.receipt.nfe for result in results) / len(results)
        told = [result.receipt.details.get("source", {}) for result in results]
        return torch.cat([result.latents for result in results]), spent, told

    def converged(self) -> Tensor:
        """Of the same noise."""
        return self.run(self.plan("unipc", 120, order=3, grid="karras"))[0]

    def frechet(self, x: Tensor, want: Tensor) -> float:
        """To pictures of the same names."""
        return frechet(x, self.features, want)


def adaptive_emoji(count: int) -> None:
    """PSNR of the ODE, Frechet distance of the SDE."""
    emoji = Emoji(count)
    want = emoji.converged()

    def ode() -> Iterator[Row]:
        for order, form in ((2, "eps"), (3, "eps"), (2, "x0"), (3, "x0")):
            for rtol in (0.2, 0.05):
                options: Any = {"order": order, "form": form, "rtol": rtol, "atol": 0.156 * rtol, "guidance": GUIDANCE}
                x, spent, told = emoji.run(AdaptiveODE(emoji.schedule, emoji.prediction, **options))
                rejected = sum(one["rejected"][0] for one in told) / count
                yield f"adaptive, order {order}, {form}, rtol {rtol}", spent, rejected, float(psnr(x, want).mean())
        plans = [("unipc", 20, "uniform"), ("unipc", 40, "uniform"), ("dpmpp_2m", 20, "uniform")]
        plans += [("dpmpp_2m", 40, "uniform"), ("unipc", 20, "logsnr"), ("unipc", 34, "logsnr")]
        for solver, steps, grid in plans:
            x, spent, _ = emoji.run(emoji.plan(solver, steps, grid=grid))
            yield f"{solver}, {steps} steps, {grid}", spent, 0, float(psnr(x, want).mean())
        first = AdaptiveODE(emoji.schedule, emoji.prediction, guidance=GUIDANCE)
        x, spent, _ = emoji.run(emoji.session(emoji.names[0], plan=first, seed=SEED).plan)
        yield "the plan of picture 0 for all", spent, 0, float(psnr(x, want).mean())

    table(("ODE", "evaluations", "rejected tries", "PSNR in dB"), ode())
    print()

    def sde() -> Iterator[Row]:
        for rtol in (0.5, 0.2):
            options: Any = {"rtol": rtol, "atol": 0.39 * rtol, "guidance": GUIDANCE}
            x, spent, told = emoji.run(AdaptiveSDE(emoji.schedule, emoji.prediction, **options))
            rejected = sum(one["rejected"][0] for one in told) / count
            yield f"adaptive, rtol {rtol}, atol {0.39 * rtol:.3g}", spent, rejected, emoji.frechet(x, want)
        for solver, steps in (("ddpm", 25), ("ddpm", 50), ("ddpm", 100), ("dpmpp_2m_sde", 25)):
            x, spent, _ = emoji.run(emoji.plan(solver, steps))
            yield f"{solver}, {steps} steps, uniform", spent, 0, emoji.frechet(x, want)

    table(("SDE", "evaluations", "rejected tries", "Frechet distance"), sde())


def time_shift_emoji(count: int) -> None:
    """DDIM and a multistep solver with and without shifts."""
    emoji = Emoji(count)
    want = emoji.converged()

    def rows() -> Iterator[Row]:
        for solver, steps in (("ddim", 10), ("ddim", 20)):
            for window, cutoff in ((0, 0), (30, 300), (30, 700), (100, 300), (100, 700)):
                options: Any = {"window": window, "cutoff": cutoff, "guidance": GUIDANCE}
                x, _, told = emoji.run(TimeShift(emoji.schedule, emoji.prediction, solver, steps, **options))
                shifted = sum(one["shifted"][0] for one in told) / count
                quality = float(psnr(x, want).mean()), emoji.frechet(x, want)
                yield f"{solver} {steps}", window or "-", cutoff or "-", shifted, *quality

    table(("solver, steps", "window", "cutoff", "rows shifted", "PSNR in dB", "Frechet distance"), rows())


def picard_emoji(count: int) -> None:
    """Iterations, evaluations, and the time of one request of `count` pictures."""
    emoji = Emoji(count)
    pipe, prompt = emoji.pipe, emoji.names[0]

    def timed(*runs: Callable[[], Any]) -> list[float]:
        spent: list[list[float]] = [[] for _ in runs]
        for _ in range(4):
            for run, times in zip(runs, spent, strict=True):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        return [statistics.median(times[1:]) for times in spent]

    def rows() -> Iterator[Row]:
        for solver, steps in (("ddim", 50), ("ddpm", 50), ("unipc", 20)):
            plan = emoji.plan(solver, steps)
            for tolerance, window in ((0.1, None), (0.1, 8), (0.01, None), (0.01, 8)):
                session = pipe.compile(plan, backend="picard", tolerance=tolerance, window=window)
                ways = [partial(s, prompt, n=count, seed=SEED, plan=plan) for s in (emoji.session, session)]
                want, result = (way() for way in ways)
                told, close = result.receipt.details["picard"], float(psnr(result.latents, want.latents).mean())
                one, other = timed(*ways)
                done = told["iterations"], told["evaluations"], close, other / one
                yield f"{solver} {steps}", tolerance, told["window"], *done

    head = ("plan", "tolerance", "window", "iterations", "evaluations", "PSNR to sequential", "time / sequential")
    table(head, rows())


def main() -> None:
    """Print the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("adaptive", "time_shift", "picard"))
    parser.add_argument("on", choices=("gmm", "emoji"))
    parser.add_argument("--samples", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    globals()[f"{given.what}_{given.on}"](given.samples)


if __name__ == "__main__":
    main()
