"""Which evaluations of a trajectory to calibrate on, and the states found there.

NDTC (normally distributed time calibration): evaluation k of n, counted from the clean end, with

    k = clamp(int(u n), 0, n - 1),   u ~ Normal(0.4, 0.4)

Source: Shang et al. 2023 (PTQ4DM), section 3.4, which prints Normal(mu <= T/2, sqrt(T/2)); mean and spread as fractions
of the trajectory are those of its code. That code compares the drawn number with a counter that runs from the noise
end, so that what it kept belonged to the mirrored time. Here a state carries the timestep it was fed at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivace.engine.noise import normals
from vivace.engine.plan import Plan, Rule, Step, Variant
from vivace.engine.request import Request, State
from vivace.engine.session import Session
from vivace.errors import ArgumentError

Progress = Callable[[str, int, int], None]  # (what, done, in all)

LAWS = ("ndtc", "uniform")
MEAN, SPREAD = 0.4, 0.4  # of the normal law, as fractions of the trajectory counted from its clean end
LAW_DRAW = 0x6C6177  # draw number of the law's normals: far from those that make pictures


@dataclass(frozen=True, slots=True)
class Point:
    """A state to keep: evaluation of the plan (0 = noise end), picture of the seed; added: not drawn by the law."""

    evaluation: int
    picture: int
    added: bool = False


@dataclass(frozen=True, eq=False)
class Sample:
    """A state of a trajectory and everything that belongs to it.

    x: what the network reads, [C, ...], float32 on the CPU; timestep: what it is fed with it; evaluation: its number
    among the plan's, 0 = noise end; row: its step in the plan; branches: evaluated there; picture: of the seed; prompt:
    its number in the list; added: not drawn by the law.
    """

    x: Tensor
    timestep: float
    evaluation: int
    row: int
    branches: tuple[str, ...]
    picture: int
    prompt: int
    added: bool


def draw_evaluations(law: str, count: int, evaluations: int, seed: int = 0) -> tuple[int, ...]:
    """`count` evaluations of a trajectory of `evaluations`, 0 = noise end, by a law; see the head of this file.

    law: "ndtc", or "uniform": evenly spread, no chance in it. Raises ArgumentError.
    """
    if law not in LAWS:
        raise ArgumentError(f"draw: law {law!r} is unknown; use {' or '.join(LAWS)}")
    if count < 1 or evaluations < 1:
        raise ArgumentError(f"draw: {count} samples of {evaluations} evaluations; need 1 or more of each")
    if law == "uniform":
        return tuple((2 * j + 1) * evaluations // (2 * count) for j in range(count))
    share = MEAN + SPREAD * normals(count, seed, draw=LAW_DRAW).astype(np.float64)
    from_clean = np.clip((share * evaluations).astype(np.int64), 0, evaluations - 1)
    return tuple(int(evaluations - 1 - k) for k in from_clean)


def group_edges(timesteps: Sequence[float], groups: int) -> tuple[float, ...]:
    """Timesteps between groups, ascending: the distinct timesteps of a plan in `groups` runs of nearly equal length.

    Group g holds edges[g - 1] <= t < edges[g]; group 0 is the clean end. No more groups than distinct timesteps.
    """
    known = sorted(set(timesteps))
    groups = min(groups, len(known))
    if groups < 1:
        raise ArgumentError(f"groups: {groups} timestep groups; need 1 or more")
    cuts = (g * len(known) // groups for g in range(1, groups))
    return tuple((known[cut - 1] + known[cut]) / 2 for cut in cuts)


def group_of(edges: Sequence[float], timestep: float) -> int:
    """The group of a timestep."""
    return bisect_right(edges, timestep)


def evaluations_of(plan: Plan) -> tuple[tuple[int, Step, Variant], ...]:
    """(row, step, variant) of the rows that evaluate the network."""
    return tuple((i, step, step.variant) for i, step in enumerate(plan.steps) if step.variant is not None)


def points_of(
    plan: Plan, law: str, samples: int, edges: Sequence[float], *, seed: int = 0, per_picture: int = 1
) -> tuple[Point, ...]:
    """Where to look: `samples` drawn by the law, dealt to pictures in order, and one for every group that got none.

    per_picture: so many states are taken from one trajectory, at different evaluations.
    """
    rows = evaluations_of(plan)
    drawn = sorted(draw_evaluations(law, samples, len(rows), seed))
    pictures = max(-(-samples // per_picture), max(drawn.count(evaluation) for evaluation in drawn))
    points = [Point(evaluation, j % pictures) for j, evaluation in enumerate(drawn)]
    members: dict[int, list[int]] = {}
    for evaluation, (_, step, _) in enumerate(rows):
        members.setdefault(group_of(edges, step.timestep), []).append(evaluation)
    for group in range(len(edges) + 1):
        inside = members[group]
        if not any(point.evaluation in inside for point in points):
            points.append(Point(inside[len(inside) // 2], group % pictures, added=True))
    return tuple(sorted(points, key=lambda point: (point.picture, point.evaluation)))


def full_precision(plan: Plan) -> Plan:
    """The plan with every rule's precision taken out: what its rows would be in the model's own."""
    steps = tuple(
        step if step.variant is None else replace(step, variant=replace(step.variant, rules=_plain(step.variant.rules)))
        for step in plan.steps
    )
    return replace(plan, steps=steps)


def _plain(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    bare = (replace(rule, precision=None) for rule in rules)
    return tuple(rule for rule in bare if rule != Rule(rule.blocks, rule.site, rule.branches))


@torch.inference_mode()
def collect(
    session: Session,
    plan: Plan,
    points: Sequence[Point],
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[Sample]:
    """The states at `points`, from runs of the plan: picture p is of prompt p mod the number of prompts.

    A run ends where nothing more is wanted of it. Samples are in the order of `points`, whatever the batch.
    """
    wanted: dict[int, set[int]] = {}
    for point in points:
        wanted.setdefault(point.picture, set()).add(point.evaluation)
    kept: dict[tuple[int, int], Tensor] = {}
    rows = evaluations_of(plan)
    number = {row: evaluation for evaluation, (row, _, _) in enumerate(rows)}
    pictures, done = sorted(wanted), 0
    total = sum(max(evaluations) + 1 for evaluations in wanted.values())
    for first in range(0, len(pictures), batch):
        running: dict[int, State] = {}
        try:
            for picture in pictures[first : first + batch]:
                prompt = prompts[picture % len(prompts)]
                running[picture] = session.begin(Request(prompt, plan=plan, seed=seed, index=picture))
            while running:
                for picture, state in list(running.items()):
                    evaluation = number.get(state.row)
                    if evaluation in wanted[picture]:
                        kept[picture, evaluation] = state.pool.net[state.lanes[0]].detach().cpu().float().clone()
                    if evaluation is not None and evaluation >= max(wanted[picture]):
                        session.abort(running.pop(picture))
                    done += evaluation is not None
                if running:
                    session.step(list(running.values()))
                if progress is not None:
                    progress("trajectories", done, total)
        finally:
            for state in running.values():
                session.abort(state)
    return [
        Sample(
            kept[point.picture, point.evaluation],
            rows[point.evaluation][1].timestep,
            point.evaluation,
            rows[point.evaluation][0],
            rows[point.evaluation][2].branches,
            point.picture,
            point.picture % len(prompts),
            point.added,
        )
        for point in points
    ]
