"""One evaluation of a denoiser with everything kept that its sites gave, and what it would predict with other values.

A tape holds the cells of a row in slabs of its own. A row that gives the values of another row again predicts

    out(r, j) = network with the values of evaluation j in the place of its own

and the slope of its prediction towards them is (out at values F_r + e (F_j - F_r)  -  out(r)) / e with a small e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivace.engine.caching import CachePlan, Cell, Use
from vivace.engine.denoiser import Denoiser
from vivace.engine.kept import Kept, KeptMemory, Sample, Turn
from vivace.engine.plan import Action, Variant

INNER = ("attn", "cross_attn", "mlp")
TRUNK = "residual"
STEP = 0.125  # e: small against the bend of the last norm, large against float32's rounding

Place = tuple[str, tuple[int, int]]  # a site and its blocks


def places_of(denoiser: Denoiser) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """What can be kept of the inside of blocks, and of the trunk as a whole; either may be empty."""
    blocks = denoiser.spec.blocks
    inner = tuple(
        (site, (block, block + 1))
        for block in range(blocks)
        for site in INNER
        if site in denoiser.sites and denoiser.why_not_kept(site, (block, block + 1)) is None
    )
    whole = TRUNK in denoiser.sites and denoiser.why_not_kept(TRUNK, (0, blocks)) is None
    return inner, ((TRUNK, (0, blocks)),) if whole else ()


@dataclass(eq=False)
class Tape:
    """An evaluation of n pictures: what the network read and predicted, and what every cell gave.

    outs: [n, ...] by branch; kept: of a group of places the memory that holds their values.
    """

    x: Tensor
    timesteps: tuple[float, ...]
    conditions: tuple[Any, ...]
    variant: Variant
    outs: tuple[Tensor, ...]
    kept: dict[tuple[Place, ...], Kept]

    def values(self, places: tuple[Place, ...], place: Place, branch: str) -> Tensor:
        """What a place gave, float32 [n, all its parts]."""
        kept = self.kept[places]
        cell = _cell(self.variant, place, branch)
        found = [(part, *held) for (known, part), held in kept.places.items() if known == cell]
        parts = [slab.values[list(lanes), 0].flatten(1) for _, slab, lanes in sorted(found, key=lambda item: item[0])]
        return torch.cat(parts, 1).float()

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(kept.nbytes for kept in self.kept.values())


def record(
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Sequence[float],
    conditions: Sequence[Any],
    variant: Variant,
    groups: Sequence[tuple[Place, ...]],
) -> Tape:
    """The evaluation with its values, one forward for each group of places."""
    kept, outs = {}, ()
    for places in groups:
        kept[places] = _memory(variant, places, len(x))
        turns = _turns(kept[places], variant, places, Action.COMPUTE)
        outs = denoiser.evaluate(x, timesteps, conditions, variant, turns)
    return Tape(x, tuple(timesteps), tuple(conditions), variant, tuple(out.clone() for out in outs), kept)


def slope(denoiser: Denoiser, tape: Tape, other: Tape, places: tuple[Place, ...], step: float = STEP) -> Tensor:
    """Of every branch, how the prediction moves when `places` give the values of `other`: [branches, n, ...].

    step: e of the difference quotient; 1 is the whole way.
    """
    outs = _blended(denoiser, tape, other, places, step)
    return torch.stack([(out - own) / step for out, own in zip(outs, tape.outs, strict=True)])


def _blended(denoiser: Denoiser, tape: Tape, other: Tape, places: tuple[Place, ...], step: float) -> tuple[Tensor, ...]:
    """Predictions of the row of `tape` at values on the way to those of `other`."""
    kept, given = tape.kept[places], other.kept[places]
    assert kept.places.keys() == given.places.keys(), "rows of the same branches keep the same cells"
    own = {key: slab.values for key, slab in kept.memory.slabs.items()}
    try:
        for key, slab in kept.memory.slabs.items():
            slab.values = torch.lerp(own[key], given.memory.slabs[key].values, step)
        turns = _turns(kept, tape.variant, places, Action.REUSE)
        return denoiser.evaluate(tape.x, tape.timesteps, tape.conditions, tape.variant, turns)
    finally:
        for key, slab in kept.memory.slabs.items():
            slab.values = own[key]


def pull_back(denoiser: Denoiser, tape: Tape, against: Sequence[Tensor]) -> Tensor:
    """The gradient of sum over branches of <against_b, prediction_b> in x: [K, n, ...] for K sets [K, n, ...]."""
    found: Tensor = torch.zeros_like(against[0])
    with torch.inference_mode(False):
        for leaf, out, rows in _graphs(denoiser, tape):
            for k in range(len(found)):
                wanted = torch.stack([against[branch][k, n] for branch, n in rows]).to(out)
                (gradient,) = torch.autograd.grad(out, leaf, wanted, retain_graph=k + 1 < len(found))
                if len(gradient) == found.shape[1]:  # one row a picture in, all branches out
                    found[k] += gradient
                else:
                    for position, (_, n) in enumerate(rows):
                        found[k, n] += gradient[position]
    return found


def _graphs(denoiser: Denoiser, tape: Tape) -> list[tuple[Tensor, Tensor, list[tuple[int, int]]]]:
    """Forwards with their graphs: (network input, output [rows, ...], (branch number, picture) of its rows)."""
    from vivace.models.class_denoiser import ClassDenoiser
    from vivace.models.pipelines.network import NetworkDenoiser

    names, made = tape.variant.branches, []
    if isinstance(denoiser, ClassDenoiser):

        def whole(network: Any, x: Tensor, t: Tensor, labels: Tensor) -> None:
            with torch.enable_grad():
                leaf = x.detach().clone().requires_grad_(True)
                out = torch.cat(network(leaf, t, labels))
            made.append((leaf, out, [(b, n) for b in range(len(names)) for n in range(len(x))]))

        denoiser.run_with(tape.x, tape.timesteps, tape.conditions, tape.variant, names, whole)
        return made
    assert isinstance(denoiser, NetworkDenoiser)
    latent = denoiser.manner.latent

    def runner(network: Any, rows: Sequence[tuple[str, int]]) -> Callable[..., Any]:
        def run(**given: Any) -> Any:
            with torch.enable_grad():
                leaf = given[latent].detach().clone().requires_grad_(True)
                result = network(**{**given, latent: leaf})
                out = result if isinstance(result, Tensor) else result[0]
                out = out[tuple(slice(0, size) for size in leaf.shape)]  # learned variances left out
                signed = out if denoiser.manner.sign == 1.0 else -out
            made.append((leaf, signed, [(names.index(branch), n) for branch, n in rows]))
            return result

        return run

    denoiser.run_with(tape.x, tape.timesteps, tape.conditions, tape.variant, runner)
    return made


def _memory(variant: Variant, places: Sequence[Place], pictures: int) -> Kept:
    """Memory of a row: every place of every branch, one plane in float32."""
    cells = {_cell(variant, place, branch): 1 for place in places for branch in variant.branches}
    return Kept(KeptMemory(), CachePlan((), cells, dict.fromkeys(cells)), pictures)


def _cell(variant: Variant, place: Place, branch: str) -> Cell:
    return Cell(variant.model, place[0], *place[1], branch)


def _turns(kept: Kept, variant: Variant, places: Sequence[Place], action: Action) -> tuple[Turn, ...]:
    """All places computed and kept, or given again."""
    terms = 0 if action == Action.COMPUTE else 1
    samples = tuple(Sample(kept, picture, (1.0,) * terms) for picture in range(kept.pictures))
    return tuple(
        Turn(Use(site, blocks, action, variant.branches, 0, 1, terms, None), variant.model, samples)
        for site, blocks in places
    )
