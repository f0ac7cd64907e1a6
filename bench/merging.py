"""Does merging tokens save time on this machine? One attention of known sizes, and rows of whole networks.

An attention is timed as a block runs it: projections, softmax, output; merged, with the means before it and the copies
behind it, by a new map (similarities, sorting) or one that is kept. Rows are one evaluation of one branch. Weights are
random, so pictures are none; what is told of rows is the drift of the latents. Times are processor time.

    OMP_NUM_THREADS=1 python -m vivace.bench.merging [attention | PixArt | SD-UNet] [--rounds N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vivace
from vivace.bench.caching_large import SCHEDULER, SEED, TEXT, Loop, unet
from vivace.bench.harness import Candidate, Timing, ratio_of_medians
from vivace.engine.executors import make_executor
from vivace.engine.passes import apply_merge
from vivace.engine.planning import make_plan
from vivace.engine.session import Session
from vivace.models.tokens.merge import Merged, MergeMap, best_pairs, drawn_per_cell, left_of

SHARES = (0.25, 0.5, 0.75)
# (grid, width, heads) of attentions: the two finest of Stable Diffusion 1 at 512 x 512, and PixArt's
SIZES = {
    "SD 64x64": ((64, 64), 320, 8),
    "SD 32x32": ((32, 32), 640, 8),
    "PixArt 32x32": ((32, 32), 1152, 16),
}
BLOCKS = 6  # of PixArt's 28


def in_turn(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, Timing]:
    """Processor time of every candidate, one call a round, in turn; what else runs on the machine counts little."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds + 1):
        for name in names:
            candidates[name].prepare(1)
            begin = time.process_time()
            candidates[name].call()
            if number:  # the first round warms up
                times[name].append((time.process_time() - begin) * 1e3)
        names.append(names.pop(0))  # no candidate always follows the same one
    return {name: Timing(tuple(values)) for name, values in times.items()}


def attention_rows(rounds: int) -> Iterator[str]:
    """An attention of each size, plain and merged: ms, and times of the plain one."""
    from diffusers.models.attention_processor import Attention

    for name, (grid, width, heads) in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(SEED)
            module = Attention(width, heads=heads, dim_head=width // heads, bias=True).to(dtype).eval()
            hidden = torch.randn(1, grid[0] * grid[1], width, dtype=dtype)
            calls = {"plain": Candidate(partial(module, hidden))}
            for share in SHARES:
                made = _map(hidden, grid, share)
                calls[f"{share:g} new map"] = Candidate(partial(_fresh, module, hidden, grid, share))
                calls[f"{share:g} kept"] = Candidate(partial(_merged, module, hidden, made))
            with torch.inference_mode():
                times = in_turn(calls, rounds)
            for key, timing in times.items():
                ratio, (low, high) = ratio_of_medians([timing], [times["plain"]], SEED)
                kind = str(dtype).removeprefix("torch.")
                yield f"{name} {kind} {key}: {timing.median:.1f} ms, {ratio:.2f} [{low:.2f}, {high:.2f}] of plain"


def _map(hidden: Tensor, grid: tuple[int, int], share: float) -> Merged:
    place, origin = best_pairs(hidden[0], drawn_per_cell(grid, 2, SEED, 0, 0), left_of(grid, 2, share))
    return Merged(MergeMap(place[None], origin[None]))


def _merged(module: Any, hidden: Tensor, made: Merged) -> Tensor:
    return made.unmerge(module(made.merge(hidden)))


def _fresh(module: Any, hidden: Tensor, grid: tuple[int, int], share: float) -> Tensor:
    return _merged(module, hidden, _map(hidden, grid, share))


def pixart(size: int) -> Any:
    """A PixArt of BLOCKS blocks with random weights, bfloat16, for latents of that size."""
    import diffusers

    sizes = {"sample_size": size, "num_layers": BLOCKS, "caption_channels": TEXT[1], "interpolation_scale": 1}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        kind: Any = diffusers.PixArtTransformer2DModel
        made = kind(**sizes, use_additional_conditions=False)
    return torch.nn.Module.to(made, torch.bfloat16).eval().requires_grad_(False)


def network_rows(case: str, size: int, rounds: int) -> Iterator[str]:
    """Rows of a network with our ops inside: plain, merged before attentions, and before MLPs too."""
    network = unet({"sample_size": size}) if case == "SD-UNet" else pixart(size)
    pipe: Any = vivace.load(network, scheduler=SCHEDULER | {"prediction_type": "epsilon"})
    prompt: dict[str, Any] = {"encoder_hidden_states": torch.randn(1, *TEXT).bfloat16()}
    if case == "PixArt":
        nothing = {"resolution": None, "aspect_ratio": None}
        prompt |= {"encoder_attention_mask": torch.ones(1, TEXT[0]), "added_cond_kwargs": nothing}
    plain = make_plan(pipe.spec.schedule, "ddim", 1, prediction=pipe.spec.prediction).bind(pipe.spec)
    plans = {"plain": plain, "0.5": apply_merge(plain, 0.5)}
    if case == "PixArt":
        plans |= {"0.75": apply_merge(plain, 0.75), "0.5, MLPs too": apply_merge(plain, 0.5, sites=("attn", "mlp"))}
    denoiser = pipe._denoiser(pipe._placed(torch.device("cpu"), None))
    session = Session(
        denoiser, list(plans.values()), make_executor("cpu", denoiser), shape=pipe.spec.latent_shape, probed=False
    )
    loops = {name: Loop(session, plan, prompt) for name, plan in plans.items()}
    times = in_turn({name: Candidate(loop, loop.prepare) for name, loop in loops.items()}, rounds)
    exact = loops["plain"].latents
    for name, timing in times.items():
        ratio, (low, high) = ratio_of_medians([timing], [times["plain"]], SEED)
        latents = loops[name].latents
        assert latents is not None and exact is not None
        drift = float((latents - exact).norm() / exact.norm())
        told = f"{timing.median:.0f} ms, {ratio:.2f} [{low:.2f}, {high:.2f}], drift {drift:.3f}"
        yield f"{case} {size}x{size} {name}: {told}"


def main() -> None:
    """Prints the figures of docs/tokens_merge.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="attention", choices=("attention", "PixArt", "SD-UNet"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="edge of the latent")
    chosen = parser.parse_args()
    rows = attention_rows(chosen.rounds)
    if chosen.case != "attention":
        rows = network_rows(chosen.case, chosen.size, chosen.rounds)
    for line in rows:
        print(line, flush=True)


if __name__ == "__main__":
    main()
