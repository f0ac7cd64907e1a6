"""Inputs that `solver_step` is tested and timed on: every kind of source, scale and destination, and awkward shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vivace.kernels.philox_normal import NORMAL_TOLERANCE
from vivace.kernels.solver_step.table import NET, NOISE, NONE, ONE, OUT, SOURCES, TENSOR, Output, Row, build_table
from vivace.kernels.spec import Call, Case

DTYPES = ("float32", "bfloat16", "float16")

# A golden row: VP, lam = (-2, -1, 0.2) -> 1.5, x0 form, UniPC-3 bh2 with the corrector merged in.
LAM = 0.2
ALPHA, SIGMA = math.sqrt(1.0 / (1.0 + math.exp(-2.0 * LAM))), math.sqrt(1.0 / (1.0 + math.exp(2.0 * LAM)))
UNIPC3 = (0.34376876, 1.72571233, -1.65397096, 0.63826689)  # of x, m0 (newest), m1, m2


def guided_row(scale: float = 4.0) -> Sequence[Output]:
    """Guidance, eps -> x0, UniPC-3 and the network's next input: slots 0 = x, 1 = m0 (written), 2 = m1, 3 = m2."""
    a, b0, b1, b2 = UNIPC3
    x, cond, uncond = (0, NONE), (OUT, NONE), (OUT + 1, NONE)
    m0 = [(*x, 1.0 / ALPHA), (*cond, -SIGMA / ALPHA * scale), (*uncond, -SIGMA / ALPHA * (1.0 - scale))]
    step = [(*x, a), (2, NONE, b1), (3, NONE, b2)]
    return (Output(1, m0), Output(0, step, prev=(b0,)), Output(NET, [], prev=(0.0, 0.9)))


def euler_row(step: float = -0.25) -> Sequence[Output]:
    """x <- x + step * out, the smallest row in use."""
    return (Output(0, [(0, NONE, 1.0), (OUT, NONE, step)]),)


def wide_row() -> Sequence[Output]:
    """12 sources by 4 outputs, no coefficient 0."""
    sources = [*range(8), OUT, OUT + 1, TENSOR, ONE]
    number = [[math.sin(1.0 + 5.0 * k + j) for j in range(SOURCES)] for k in range(4)]
    terms = [[(source, NONE, c) for source, c in zip(sources, row, strict=True)] for row in number]
    return tuple(Output(k, terms[k], prev=(0.5, -0.25, 0.125)[:k]) for k in range(4))


def scaled_row() -> Sequence[Output]:
    """Coefficients per element from the side-car, and a request mask in slot 3: x <- mask * x + (1 - mask) * slot 2."""
    blend = [(0, 3, 0.7), (2, NONE, 0.3), (2, 3, -0.3), (OUT, TENSOR, -0.5), (TENSOR + 1, NONE, 1.5)]
    return (Output(0, blend), Output(1, [(OUT, TENSOR, 1.0), (TENSOR + 1, 3, 2.0)]))


def bias_row() -> Sequence[Output]:
    """A constant, a bias per element, and an output without terms (it is 0)."""
    return (Output(0, [(0, NONE, 0.5), (ONE, NONE, 0.125), (ONE, TENSOR, -2.0)]), Output(1, []))


def noise_row() -> Sequence[Output]:
    """Two draws in one row, one of them scaled by a mask; their coefficients add up to less than 1."""
    return (Output(0, [(0, NONE, 0.8), (OUT, NONE, -0.2), (NOISE, NONE, 0.6), (NOISE + 5, 3, 0.07)]),)


def unread_row() -> Sequence[Output]:
    """Slot 2 has coefficient 0 everywhere; slot 3 has it in output 0 only, so NaN there reaches output 1 only."""
    terms = [[(0, NONE, 0.5), (2, NONE, 0.0), (3, NONE, c)] for c in (0.0, 1.0)]
    return (Output(0, terms[0]), Output(1, terms[1], low=-1.0, high=1.0))


def adjusted_row() -> Sequence[Output]:
    """Limits and a factor of the sample on x0; x and the network's input read the result."""
    x0 = [(0, NONE, 1.0 / ALPHA), (OUT, NONE, -SIGMA / ALPHA)]
    step = Output(0, [(0, NONE, 0.4)], prev=(0.6,))
    return (Output(1, x0, adjusted=True), step, Output(NET, [], prev=(0.0, 0.9), low=-0.5, high=0.75))


CLAMP = (Output(0, [(0, NONE, 1.0), (OUT, NONE, 2.0)], low=-0.5, high=0.75), Output(NET, [], prev=(1.0,)))
SWAP = (Output(1, [(0, NONE, 0.9), (1, NONE, 0.1)]), Output(0, [(1, NONE, 1.1), (OUT, NONE, 0.5)]))


def fill_unread(pool: Tensor) -> None:
    """NaN in slot 2 and in one element of slot 3."""
    pool[2] = math.nan
    pool[3].flatten(1)[:, 3] = math.nan


def strided(out: Tensor) -> Tensor:
    """The same values with a gap between samples."""
    return torch.stack((out, torch.full_like(out, math.nan)), dim=1)[:, 0]


def scattered(out: Tensor) -> Tensor:
    """The same values, no sample contiguous."""
    return out.transpose(1, -1).contiguous().transpose(1, -1)


def make(
    dtype: str,
    device: str,
    *,
    table: Sequence[Row],
    rows: Sequence[int] = (0, 0),
    index: Sequence[int] = (2, 0),
    shape: tuple[int, ...] = (4, 7, 9),
    slots: int = 4,
    branches: int = 1,
    tensors: int = 0,
    layout: Callable[[Tensor], Tensor] | None = None,
    edit: Callable[[Tensor], None] | None = None,
    classes: int = 0,
    patch: Sequence[int] = (),
) -> Call:
    """One call on unit normals; outs and network input in `dtype`, the pool in float32, or float64 with them.

    classes: tokens of `patch` are of so many; the last sample is of one, the rows of the table from its own on.
    """
    generator = torch.Generator().manual_seed(len(rows) + 16 * math.prod(shape))
    state = torch.float64 if dtype == "float64" else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    lanes = 3 + max(index, default=0)
    pool = normal(slots, lanes, *shape)
    if edit is not None:
        edit(pool)
    pool = pool.to(device, state)
    outs = [normal(len(rows), *shape).to(device, getattr(torch, dtype)) for _ in range(branches)]
    net = torch.zeros(lanes, *shape, device=device, dtype=getattr(torch, dtype))
    built = build_table(table, dtype if dtype == "float64" else "float32").to(device)
    adjust = torch.tensor([[-1.5, 1.5, 1 / 1.5], [-math.inf, math.inf, 0.8], [-0.5, 0.5, 2.0]])
    arguments: dict[str, Any] = {"net": net, "tensors": [normal(*shape).to(device, state) for _ in range(tensors)]}
    if built.facts.noise:
        arguments |= {"seeds": [(1 << 64) - 3 - b * (1 << 40) for b in range(len(rows))], "pictures": [5] * len(rows)}
    if built.facts.adjusted:
        arguments["adjust"] = adjust[torch.arange(len(rows)) % len(adjust)].to(device, state)
    if classes:
        tokens = math.prod(size // edge for size, edge in zip(shape[len(shape) - len(patch) :], patch, strict=True))
        mine = torch.randint(classes, (len(rows), tokens), generator=generator, dtype=torch.uint8)
        mine[-1:] = 1
        arguments |= {"classes": mine.to(device), "patch": tuple(patch)}
    outs = outs if layout is None else [layout(out) for out in outs]
    places = (torch.tensor(values, dtype=torch.int64) for values in (rows, index))
    return Call((pool, outs, built, *places), arguments, writes=(pool, net))


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a guided sampling loop runs."""

    def case(name: str, tolerance: float | None = None, **arguments: Any) -> Case:
        return Case(name, partial(make, **arguments), DTYPES, tolerance)

    guided, noise = guided_row(), NORMAL_TOLERANCE
    by_class = (guided, euler_row(), CLAMP, (Output(3, [(2, NONE, 2.0), (OUT + 1, NONE, 1.0)]),))
    mixed = (guided, euler_row(), SWAP, (Output(3, [(2, NONE, 2.0)]),), noise_row())
    return (
        case("guided unipc-3", table=(guided,), branches=2),
        case("12 sources x 4 outputs", table=(wide_row(),), slots=8, branches=2, tensors=1),
        case("clamp", table=(CLAMP,)),
        case("scale tensors", table=(scaled_row(),), tensors=2),
        case("bias", table=(bias_row(),), tensors=1),
        case("noise", noise, table=(noise_row(),)),
        case("mixed rows", noise, table=mixed, rows=(3, 0, 4, 2, 1), index=(1, 4, 2, 0, 5), branches=2),
        case("adjusted", table=(adjusted_row(), guided), rows=(0, 1, 0, 0), index=(1, 4, 2, 0), branches=2),
        case("in place", table=(SWAP,)),
        case("token classes", table=by_class, branches=2, classes=4, patch=(2, 3), shape=(4, 6, 9)),
        case("token classes of a video", table=by_class, branches=2, classes=4, patch=(1, 2, 1), shape=(3, 3, 4, 5)),
        case("token classes of packed tokens", table=by_class, branches=2, classes=4, patch=(1, 8), shape=(12, 8)),
        case("token classes of frames", table=by_class, branches=2, classes=3, patch=(1, 3, 2, 2), shape=(2, 3, 4, 6)),
        case("token classes, noise", noise, table=(noise_row(), SWAP), classes=2, patch=(1, 1), shape=(1, 33, 67)),
        case("token classes, adjusted", table=(adjusted_row(), guided), branches=2, classes=2, patch=(1, 3)),
        case("token classes, mixed rows", table=by_class, rows=(1, 0), branches=2, classes=3, patch=(7, 9)),
        case("token classes in place", table=(SWAP, CLAMP), classes=2, patch=(7, 1)),
        case("size 1", table=(euler_row(),), shape=(1,)),
        case("size 123", table=(guided,), shape=(123,), branches=2),
        case("size 4097", noise, table=(noise_row(),), rows=(0,), index=(1,), shape=(4097,)),
        case("empty batch", table=(guided,), rows=(), index=(), branches=2),
        case("empty sample", table=(guided,), shape=(0, 3), branches=2),
        case("outs with a gap between samples", table=(guided,), branches=2, layout=strided),
        case("outs not contiguous", table=(guided,), branches=2, layout=scattered),
        case("unread NaN", table=(unread_row(),), edit=fill_unread),
    )
