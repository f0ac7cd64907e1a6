"""What a pack is held to: one request run eagerly, its latents after every row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vivace.engine.liveness import live_after
from vivace.engine.noise import normals
from vivace.engine.plan import Plan
from vivace.engine.request import Request, State
from vivace.engine.session import Session
from vivace.engine.token_rows import focused
from vivace.engine.tokens import Tokens
from vivace.kernels.select_tokens import lowest

N, SEED = 2, 7
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Goldens:
    """request: {"prompt", "n", "seed", "guidance_scale"}; arrays: see `run_goldens`."""

    request: Mapping[str, Any]
    arrays: Arrays = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {"request": json.dumps(dict(self.request), sort_keys=True)}


def run_goldens(
    session: Session,
    plan: Plan,
    prompt: Any,
    conditions: Callable[[Any], Mapping[str, Any]],
    after: Arrays | None = None,
) -> Goldens:
    """Two pictures of a prompt through a bound plan, and what every row leaves.

    Args:
        session: eager, of the network whose graphs are exported; conditions: tensors [1, ...] of an encoded prompt by
            name, empty where prompts are classes.
        after: goldens of another run of the same request, whose slots and tokens every row starts from; None: the rows
            follow each other.
    Returns: float32 arrays "noise" [2, *latent] (draw 0); "row.<i>" [2, *latent], slot x after row i; "row.<i>.<slot>",
        other slots that later rows read; "latents". int32 "row.<i>.tokens" [2, M], computed in token rows. uint8
        "pictures" [2, H, W, 3] where the model decodes. "condition.*"; "input.*" that the plan needs.
    """
    shape = session.pool.shape if plan.binding is None else plan.binding.latent_shape
    arrays: Arrays = {"noise": _drawn(shape, SEED)}
    needed = [ref.name for ref in plan.inputs if ref.default is None]
    for number, name in enumerate(needed):
        made = _drawn(shape, SEED + 1 + number)
        arrays[f"input.{name}"] = _mask(made) if name == "mask" else made
    inputs = {name: torch.from_numpy(arrays[f"input.{name}"]) for name in needed}
    image, mask = inputs.pop("start", None), inputs.pop("mask", None)
    state = session.begin(Request(prompt, plan, N, 0, SEED, image=image, mask=mask, inputs=dict[str, Any](inputs)))
    live = live_after(plan)
    try:
        arrays |= {f"condition.{name}": value for name, value in conditions(state.condition).items()}
        if after is not None and state.tokens is not None:
            state.tokens = Chosen.of(state.tokens, after)
        while not state.done:
            if after is not None and state.row:
                _restore(state, after)
            session.step([state])
            arrays |= _left(state, live[state.row])
        result = session.finish(state)
    except BaseException:
        session.abort(state)
        raise
    arrays["latents"] = result.latents.float().cpu().numpy()
    if result.images:
        arrays["pictures"] = np.stack([np.asarray(image.convert("RGB")) for image in result.images])
    return Goldens({"prompt": prompt, "n": N, "seed": SEED, "guidance_scale": None}, arrays)


def relative_errors(found: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> list[float]:
    """max |a - b| / max |b| of slot x after every row."""
    rows = [f"row.{i}" for i in range(sum(re.fullmatch(r"row\.\d+", name) is not None for name in wanted))]
    pairs = [(found[name].astype(np.float64), wanted[name].astype(np.float64)) for name in rows]
    return [float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-30)) for a, b in pairs]


class Chosen(Tokens):
    """The tokens of a request whose rows compute those of other goldens."""

    told: Arrays

    @classmethod
    def of(cls, tokens: Tokens, told: Arrays) -> Chosen:
        """The same state, told which tokens."""
        made = cls.__new__(cls)
        made.__dict__ |= tokens.__dict__ | {"told": told}
        return made

    def scores(self, number: int) -> Tensor:
        """Scores [n, N] by which exactly those tokens are chosen: the others around them."""
        row = self._row(number)
        made = torch.zeros((len(self.pictures), self.count))
        for scores, ids in zip(made, torch.from_numpy(self.told[f"row.{number}.tokens"]).long(), strict=True):
            others = torch.ones(self.count, dtype=torch.bool).index_fill(0, ids, False).nonzero()[:, 0]
            scores[ids] = 1.0
            scores[others[lowest(self.count, len(ids), row.drop_high) :]] = 2.0
        return made.to(self.ages.device)

    def factors(self, number: int) -> None:
        """Waiting does not count."""


def _left(state: State, live: Set[str]) -> Arrays:
    """What the last row left for later ones."""
    row, slots = state.row - 1, state.entry.lowered.slots
    lanes = list(state.lanes)
    names = {name: "" if name == "x" else f".{name}" for name in sorted(live) if not name.startswith("input:")}
    found = {f"row.{row}{told}": state.pool.state[slots[n], lanes].float().cpu().numpy() for n, told in names.items()}
    variant = state.plan.steps[row].variant
    if state.tokens is not None and variant is not None and focused(variant) and state.tokens.ids is not None:
        found[f"row.{row}.tokens"] = state.tokens.ids.int().cpu().numpy().copy()
    return found


def _restore(state: State, arrays: Arrays) -> None:
    """Let the row before have left what it left in another run."""
    slots, lanes, prefix = state.entry.lowered.slots, list(state.lanes), f"row.{state.row - 1}"
    for name in arrays:
        if name == prefix or (name.startswith(f"{prefix}.") and not name.endswith(".tokens")):
            slot = name.removeprefix(prefix).lstrip(".") or "x"
            given = torch.from_numpy(arrays[name]).to(state.pool.device, state.pool.dtype)
            state.pool.state[slots[slot], lanes] = given
    step = state.plan.steps[state.row]
    fed = state.pool.state[slots[step.x], lanes] * step.x_scale
    state.pool.net[lanes] = fed.to(state.pool.net_dtype)


def _drawn(shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    return np.stack([normals(shape, seed, picture=j) for j in range(N)])


def _mask(like: NDArray[Any]) -> NDArray[Any]:
    """1 in a corner that an eighth of the elements are in, 0 elsewhere."""
    mask = np.zeros_like(like)
    rows, columns = (max(1, size // 3) for size in like.shape[-2:])
    mask[..., :rows, :columns] = 1.0
    return mask
