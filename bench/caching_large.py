"""Does time follow work? A DiT-XL/2 and a UNet of Stable Diffusion's size, random weights, cached and not.

Timed is the loop of a request, from its first row to its last: what begins and ends it is the same with and without a
cache. Work of the DiT is counted from its sizes, that of the UNet by torch's counter of operations in an eager run,
since its blocks are not alike. Random weights have no pictures; what is told of them is the drift of the latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vivace
from vivace.bench.caching_cases import costs, each
from vivace.bench.harness import Candidate, Claim, Timing, in_turn, ratio_of_medians
from vivace.bench.models import MODELS, SCHEDULER
from vivace.engine import planners
from vivace.engine.caching import computed_share
from vivace.engine.passes import apply_block_cache
from vivace.engine.plan import Plan
from vivace.engine.planning import make_plan
from vivace.kernels.spec import missing
from vivace.metrics import latent_drift

SEED = 7
NAME, BOUND = "caching.time_vs_compute_gap", 0.05
DIT, UNET = "DiT-XL/2", "SD-UNet"
STEPS = {True: 4, False: 12}  # quick or not
ROUNDS = {True: 3, False: 9}
SIZE, TEXT = 32, (77, 768)  # of the UNet's latents and its prompt
METHODS = {
    DIT: (
        *each("Fora", interval=(2,), last=(0,)),
        *each("TaylorSeer", interval=(2,), order=(1,), first=(1,), last=(0,)),
    ),
    UNET: (*each("DeepCache", interval=(2, 3)), *each("FasterDiffusion", noise=(0.0,))),
}


class Loop:
    """The rows of requests for one plan: `prepare` begins them, a call runs one to its last row."""

    def __init__(self, session: Any, plan: Plan, prompt: Any, **given: Any) -> None:
        self.session, self.plan, self.prompt, self.given = session, plan, prompt, given
        self.begun: list[Any] = []
        self.latents: Tensor | None = None

    def prepare(self, calls: int) -> None:
        """Begin as many requests as calls follow."""
        while len(self.begun) < calls:
            request = vivace.Request(self.prompt, plan=self.plan, seed=SEED, **self.given)
            self.begun.append(self.session.begin(request))

    def __call__(self) -> None:
        state = self.begun.pop()
        while not state.done:
            self.session.step([state])
        self.latents = self.session.finish(state).latents


def plans(spec: Any, steps: int, methods: Sequence[Any], *, masked: bool) -> dict[str, Plan]:
    """The plain plan and the cached ones, by what they are. masked: one by a step mask, every other evaluation."""
    plan = make_plan(spec.schedule, "ddim", steps, prediction=spec.prediction).bind(spec)
    found = {"none": plan}
    for method in methods:
        planner: Any = getattr(planners, method.name)(**method.options)
        found[f"{method.name}, {method.told}"] = apply_block_cache(plan, planner)
    if masked:
        mask = [1, *itertools.islice(itertools.cycle((0, 1)), steps - 1)]
        found[f"StepMask, {mask}"] = apply_block_cache(plan, planners.StepMask(mask, first_blocks=1))
    return found


def rows_of(
    case: str, session: Any, prompt: Any, made: Mapping[str, Plan], shares: Mapping[str, float], rounds: int
) -> list[dict[str, Any]]:
    """Times all plans in the same rounds, and says by how far time stays behind the work that was spared."""
    loops = {name: Loop(session, plan, prompt) for name, plan in made.items()}
    times = in_turn({name: Candidate(loop, loop.prepare) for name, loop in loops.items()}, seconds=0.0, least=rounds)
    exact = loops["none"].latents
    return [
        described(case, session, name, plan, times, shares[name]) | {"drift": _drift(loops[name].latents, exact)}
        for name, plan in made.items()
    ]


def described(
    case: str, session: Any, name: str, plan: Plan, times: Mapping[str, Timing], share: float
) -> dict[str, Any]:
    """Columns of a plan."""
    method, _, setting = name.partition(", ")
    ratio, interval = ratio_of_medians([times[name]], [times["none"]], SEED)
    return {
        "op": "caching large", "case": case, "backend": session.executor.name, "method": method, "setting": setting,
        "solver": "ddim", "steps": plan.nfe, "dtype": str(session.denoiser.dtype).removeprefix("torch."),
        "ms": times[name].to_dict(), "share": share, "time_ratio": ratio, "gap": ratio - share,
        "gap_interval": [end - share for end in interval],
        "threads": torch.get_num_threads(), "seed": SEED,
    }  # fmt: skip


def _drift(latents: Tensor | None, exact: Tensor | None) -> float:
    """Relative distance of the last picture's latents to the uncached ones."""
    assert latents is not None and exact is not None
    return float(latent_drift(latents, exact).mean())


def dit_rows(quick: bool, name: str = DIT) -> list[dict[str, Any]]:
    """The native DiT, compiled, bfloat16, one picture, one branch."""
    model = MODELS[name]
    pipe: Any = vivace.load(str(model.folder))
    made = plans(pipe.spec, STEPS[quick], METHODS[DIT], masked=True)
    session = pipe.compile(made["none"], backend="cpu", dtype="bfloat16", threads=torch.get_num_threads())
    shares = {key: computed_share(plan, costs(model.opened.config)) for key, plan in made.items()}
    return rows_of(name, session, int(model.inputs(1)[2][0]), made, shares, ROUNDS[quick])


def unet(sizes: Mapping[str, Any]) -> Any:
    """A UNet of diffusers with random weights, bfloat16. sizes: arguments of its class; () is Stable Diffusion 1's."""
    import diffusers

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        kind: Any = diffusers.UNet2DConditionModel
        made = kind(**{"sample_size": SIZE, "cross_attention_dim": TEXT[1], **sizes})
    return torch.nn.Module.to(made, torch.bfloat16).eval().requires_grad_(False)


def unet_rows(quick: bool, sizes: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """A UNet with our ops inside, bfloat16, one picture, one branch."""
    pipe: Any = vivace.load(unet(sizes or {}), scheduler=SCHEDULER | {"prediction_type": "epsilon"})
    text = torch.randn(1, *TEXT, generator=torch.Generator().manual_seed(SEED))
    prompt = {"encoder_hidden_states": text.bfloat16()}
    made = plans(pipe.spec, STEPS[quick], METHODS[UNET], masked=False)  # a UNet keeps no residuals
    options: dict[str, Any] = {"dtype": "bfloat16", "threads": torch.get_num_threads()}
    eager = pipe.compile(made["none"], backend="eager", **options)
    counted = {key: _operations(eager, plan, prompt) for key, plan in made.items()}
    session = pipe.compile(made["none"], backend="cpu", **options)
    shares = {key: count / counted["none"] for key, count in counted.items()}
    return rows_of(UNET, session, prompt, made, shares, ROUNDS[quick])


def _operations(session: Any, plan: Plan, prompt: Any) -> int:
    """Multiplications and additions of the rows of a request."""
    loop = Loop(session, plan, prompt)
    loop.prepare(1)
    with FlopCounterMode(display=False) as counter:
        loop()
    return int(counter.get_total_flops())


@cache
def _measured(quick: bool) -> tuple[dict[str, Any], ...]:
    rows = dit_rows(quick)
    return tuple(rows if quick else rows + unet_rows(quick))


def gap_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """By how far time stays behind the share of work, the largest of all cached plans."""
    if (reason := missing("cpu")) is not None:
        return [], Claim(NAME, "<=", BOUND, reason)
    rows = list(_measured(quick))
    cached = [row for row in rows if row["method"] != "none"]
    worst = max(cached, key=lambda row: float(row["gap"]))
    how = "time of the loop over that of the uncached one, less the share of operations computed, the largest of: "
    how += "; ".join(
        f"{row['case']} {row['method']} ({row['setting']}) {row['time_ratio']:.3f} at {row['share']:.3f}"
        for row in cached
    )
    how += f"; {worst['dtype']}, one picture, {worst['threads']} threads, medians of interleaved loops"
    if quick:
        how += f"; the UNet ({UNET}) is in the full run only"
    return rows, Claim(NAME, "<=", BOUND, how, float(worst["gap"]), tuple(worst["gap_interval"]), worst["ms"]["rounds"])


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {NAME: gap_claim}
