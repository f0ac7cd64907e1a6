"""Caches of Vivace beside those of cache-dit and of `diffusers` itself, same model, same noises, same rounds.

Every way to draw has a PSNR to the converged solution and a time. At a level of PSNR a side is as fast as its fastest
row that reaches it. Theirs may be any row, plain ones among them; ours must be one with a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vivace.bench.caching_cases import (
    DDIM,
    NONE,
    UNIPC,
    Base,
    Method,
    decibels,
    described,
    draw,
    each,
    planned,
    session,
)
from vivace.bench.e2e import CLASSES, emoji_case
from vivace.bench.e2e_cases import Case, peer_picture
from vivace.bench.harness import Candidate, Claim, Timing, in_turn, ratio_of_medians
from vivace.bench.peers import Ready, absent, caches
from vivace.bench.peers.caches import SETTINGS, Setting
from vivace.kernels.spec import missing

SEED = 7
NAME, BOUND = "caching.speedup_vs_best_peer_at_equal_psnr", 1.2
LEVELS = {True: (30.0, 32.0, 34.0, 35.0), False: (30.0, 32.0, 34.0, 36.0, 38.0)}  # dB, quick or not
SPACING = "linspace"
SECONDS = {True: 8.0, False: 60.0}  # of timed rounds, quick or not
PICTURES = {True: 4, False: 8}
PLACES = {True: (UNIPC,), False: (UNIPC, Base("unipc", 12), DDIM)}  # runs that caches are put on
# Of the plain network of diffusers, besides.
FEWER = {True: (8, 12), False: (6, 8, 10, 12, 16)}
OURS: Mapping[bool, tuple[Method, ...]] = {
    True: (
        *each("OptimalCache", budget=(0.5, 0.31)),
        *each("TaylorSeer", interval=(2, 3), order=(2, 2), first=(1, 1)),
    ),
    False: (
        *each("OptimalCache", budget=(0.65, 0.5, 0.41, 0.31)),
        *each("TaylorSeer", interval=(2, 3, 4), order=(2, 2, 1), first=(1, 1, 1)),
        *each("FirstBlockCache", threshold=(0.1, 0.2, 0.3)),
    ),
}


@dataclass(eq=False)
class Side:
    """A way to draw one picture: its columns, the call that draws label 0, its times."""

    columns: dict[str, Any]
    call: Callable[[], Any]
    times: Timing | None = None

    @property
    def ms(self) -> float:
        """Median of a picture."""
        assert self.times is not None
        return self.times.median


def peer_sides(case: Case, count: int, base: Base, settings: Sequence[Setting], dtype: str) -> list[Side]:
    """Rows of other libraries, judged by `count` pictures."""
    sides = []
    for setting in settings:

        def calibrate(call: Any, base: Base = base) -> None:
            peer_picture(case, call, lambda steps: None, base.solver, SPACING, base.steps)()

        ready = caches.make(case.model, dtype, setting, base.steps, calibrate)
        sides.append(_peer(case, count, base, setting, dtype, ready))
    return sides


def _peer(case: Case, count: int, base: Base, setting: Setting, dtype: str, ready: Ready) -> Side:
    def picture(i: int) -> Callable[[], Any]:
        return peer_picture(case, ready.call, ready.begin, base.solver, SPACING, base.steps, i)

    latents = torch.cat([picture(i)() for i in range(count)])
    columns = {
        "op": "caching peers", "case": case.model.name, "backend": setting.backend, "method": setting.method,
        "setting": setting.told, "solver": base.solver, "steps": base.steps, "dtype": dtype, "share": None,
        "pictures": len(latents), "guidance": case.guidance, "threads": torch.get_num_threads(), "seed": SEED,
        "psnr": float(decibels(latents, case.converged()[:count]).mean()), "peer_versions": ready.versions,
    }  # fmt: skip
    return Side(columns, picture(0))


def our_sides(case: Case, count: int, base: Base, methods: Sequence[Method], dtype: str) -> list[Side]:
    """Rows of ours, compiled, judged by the same pictures; the plain plan first."""
    few = replace(case, labels=case.labels[:count])
    run, sides, noise = session(case.model.name, dtype, "cpu"), list[Side](), case.noise[:1]
    labels = itertools.cycle(CLASSES)
    for method in (NONE, *methods):
        plan = planned(case, base, method)
        drawn = draw(few, run, plan)
        columns = described(case.model, base, method, drawn) | {
            "op": "caching peers", "dtype": dtype, "guidance": case.guidance, "seed": SEED,
            "psnr": float(decibels(drawn.latents, case.converged()[:count]).mean()),
        }  # fmt: skip
        sides.append(Side(columns, lambda plan=plan: run(next(labels) % case.null, plan=plan, latents=noise)))
    return sides


def measure(sides: Sequence[Side], seconds: float) -> None:
    """Times all sides in the same rounds; every row also says its time over that of the plain run it stands on."""
    times = in_turn({str(i): Candidate(side.call) for i, side in enumerate(sides)}, seconds=seconds)
    for i, side in enumerate(sides):
        side.times = times[str(i)]
    for side in sides:
        mine = side.columns
        whole = [
            other.ms
            for other in sides
            if other.columns["method"] == "none"
            and (other.columns["backend"] == "vivace") == (mine["backend"] == "vivace")
            and all(other.columns[name] == mine[name] for name in ("solver", "steps", "dtype"))
        ]
        assert side.times is not None
        mine |= {"ms": side.times.to_dict(), "time_ratio": side.ms / whole[0] if whole else None}


def fastest(sides: Sequence[Side], level: float) -> Side | None:
    """The fastest of those that reach a level of PSNR."""
    return min((side for side in sides if side.columns["psnr"] >= level), key=lambda side: side.ms, default=None)


def all_sides(case: Case, quick: bool, dtype: str) -> tuple[list[Side], list[Side]]:
    """(ours, theirs)."""
    ours, theirs, count = list[Side](), list[Side](), min(PICTURES[quick], len(case.labels))
    for base in PLACES[quick]:
        settings = [SETTINGS[i] for i in caches.QUICK] if quick else list(SETTINGS)
        theirs += peer_sides(case, count, base, settings, dtype)
        ours += our_sides(case, count, base, OURS[quick], dtype)
    for steps in FEWER[quick]:
        if all(base != Base("unipc", steps) for base in PLACES[quick]):
            theirs += peer_sides(case, count, Base("unipc", steps), SETTINGS[:1], dtype)
    return ours, theirs


def peers_claim(quick: bool) -> tuple[list[dict[str, Any]], Claim]:
    """Time of the best of the other libraries over ours at equal PSNR, the least of some levels."""
    if (reason := missing("cpu") or absent("diffusers") or caches.why_not(SETTINGS[-1])) is not None:
        return [], Claim(NAME, ">=", BOUND, reason)
    ours, theirs = all_sides(emoji_case(), quick, "float32")
    measure([*ours, *theirs], SECONDS[quick])
    cached = [side for side in ours if side.columns["method"] != "none"]
    found = []
    for level in LEVELS[quick]:
        mine, rival = fastest(cached, level), fastest(theirs, level)
        if rival is not None and mine is not None and mine.times is not None and rival.times is not None:
            found.append((level, mine, rival, *ratio_of_medians([rival.times], [mine.times], SEED)))
    rows = [side.columns for side in (*ours, *theirs)]
    missed = [level for level in LEVELS[quick] if fastest(theirs, level) is not None and fastest(cached, level) is None]
    if not found or missed:
        why = (
            f"at {missed[0]:g} dB no cached plan of ours"
            if missed
            else f"no row of theirs reaches {LEVELS[quick][0]:g} dB"
        )
        return rows, Claim(NAME, ">=", BOUND, f"cannot be measured: {why}")
    _, mine, _, value, interval = min(found, key=lambda item: item[3])
    how = "emoji, float32, medians of interleaved pictures, PSNR to the converged solution; the least of: " + "; ".join(
        f"{level:g} dB: {_told(theirs_)} over {_told(ours_)} = {ratio:.2f}" for level, ours_, theirs_, ratio, _ in found
    )
    assert mine.times is not None
    return rows, Claim(NAME, ">=", BOUND, how, value, (interval[0], interval[1]), len(mine.times.ms))


def _told(side: Side) -> str:
    row = side.columns
    setting = "" if row["setting"] == "-" else f" ({row['setting']})"
    return (
        f"{row['backend']} {row['method']}{setting} on {row['solver']} {row['steps']}, {row['psnr']:.1f} dB, "
        f"{side.ms:.0f} ms"
    )


CLAIMS: Mapping[str, Callable[[bool], tuple[list[dict[str, Any]], Claim]]] = {NAME: peers_claim}
