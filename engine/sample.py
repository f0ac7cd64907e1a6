"""`vivace.sample`: any callable through a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vivace.engine.denoiser import CallableDenoiser
from vivace.engine.executors.eager import EagerExecutor
from vivace.engine.plan import Plan
from vivace.engine.request import Request
from vivace.engine.session import Session
from vivace.engine.sources.base import StepSource
from vivace.engine.verify import verify
from vivace.errors import ArgumentError, DtypeError, ShapeError


def sample(
    denoiser: Callable[..., Tensor],
    plan: Plan | StepSource,
    noise: Tensor,
    *,
    seed: int | Sequence[int] = 0,
    x_init: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    slots: dict[str, Tensor] | None = None,
    plans: list[Plan] | None = None,
) -> Tensor:
    """x0 = plan(denoiser, noise): run every row of `plan`, or follow a source of steps, on a batch.

    Args:
        denoiser: called as denoiser(x, t), or denoiser(x, t, branch="cond" | "uncond") in rows of several branches;
            x: [B, ...] scaled by the row's `x_scale`, t: [B] timesteps in the dtype of x; returns `plan.prediction`.
        noise: unit normal [B, ...], float; the plan's `init` makes the first state of it. float64 runs in float64
            throughout; other dtypes keep the state in float32 and feed the network in theirs.
        seed: of stochastic rows: an int makes sample j picture j, a sequence makes each sample picture 0 of its own.
        x_init: [B, ...], replaces the first state.
        inputs: numbers and tensors ([B, ...] or the latent's shape) that the plan reads, by name.
        slots: is given what the plan's other results hold, [B, ...] by name.
        plans: is given the plan that every sample took.
    Returns: [B, ...] on the device of `noise`, float64 for float64 noise, else float32.
    Raises: ArgumentError, ShapeError, DtypeError, PlanError, UnsupportedError.
    """
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        raise DtypeError(f"sample: noise is {getattr(noise, 'dtype', type(noise).__name__)}; a float tensor is needed")
    if noise.dim() < 1 or (x_init is not None and x_init.shape != noise.shape):
        got = tuple(noise.shape) if x_init is None else (tuple(noise.shape), tuple(x_init.shape))
        raise ShapeError(f"sample: noise (and x_init) {got}; needs one shape [B, ...]")
    if noise.dim() == 1:
        start = None if x_init is None else x_init[:, None]
        column = _columns(denoiser)
        wide: dict[str, Tensor] = {}
        given = {name: _column(value, batch=noise.shape) for name, value in (inputs or {}).items()}
        found = sample(column, plan, noise[:, None], seed=seed, x_init=start, inputs=given, slots=wide, plans=plans)
        if slots is not None:
            slots.update({name: value[:, 0] for name, value in wide.items()})
        return found[:, 0]
    batch = noise.shape[0]
    state_dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    if batch == 0:
        return noise.to(state_dtype, copy=True)
    tensors = dict(inputs or {})
    if x_init is not None:
        tensors["x_init"] = x_init
    wrapped = CallableDenoiser(denoiser, plan.prediction, tuple(noise.shape[1:]), noise)
    executor = EagerExecutor(wrapped)
    session = Session(
        wrapped, [plan], executor, shape=tuple(noise.shape[1:]), state_dtype=state_dtype, probed=False, expand=verify
    )
    requests = _requests(seed, noise, tensors)
    states = [session.begin(request) for request in requests]
    while running := [state for state in states if not state.done]:
        session.step(running)
    finished = [session.finish(state) for state in states]
    if slots is not None:
        slots.update({name: torch.cat([result.slots[name] for result in finished]) for name in finished[0].slots})
    if plans is not None:
        plans += [result.plans[j % len(result.plans)] for result in finished for j in range(len(result.latents))]
    return torch.cat([result.latents for result in finished])


def _requests(seed: int | Sequence[int], noise: Tensor, inputs: dict[str, Any]) -> list[Request]:
    """One request for all samples, or one a sample where each has a seed. Raises ArgumentError."""
    batch = len(noise)
    if isinstance(seed, int):
        return [Request(n=batch, seed=seed, latents=noise, inputs=inputs)]
    if len(seed) != batch:
        raise ArgumentError(f"sample: {len(seed)} seeds for {batch} samples; give one, or one a sample")
    return [
        Request(seed=int(s), latents=noise[j : j + 1], inputs=_of_sample(inputs, noise, j)) for j, s in enumerate(seed)
    ]


def _columns(denoiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A denoiser of scalars [B] as one of columns [B, 1]."""
    return lambda x, t, **branch: denoiser(x[:, 0], t, **branch)[:, None]


def _column(value: Any, batch: torch.Size) -> Any:
    """A tensor of scalars [B] as one of columns [B, 1]; anything else as it is."""
    return value[:, None] if isinstance(value, Tensor) and value.shape == batch else value


def _of_sample(inputs: Mapping[str, Any], noise: Tensor, j: int) -> dict[str, Any]:
    """Inputs of sample j: tensors with a batch axis are cut, the rest is shared."""

    def cut(value: Any) -> Any:
        return value[j : j + 1] if isinstance(value, Tensor) and value.shape == noise.shape else value

    return {name: cut(value) for name, value in inputs.items()}
