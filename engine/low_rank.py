"""Low-rank maps as plan data: slot <- sum_k gains[k] <basis[k], slot> basis[k], and where their tensors stand.

gains [r] and basis [r, *latent] are tensors of the side-car that serve no affine op, for those have the latent's shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vivace.engine.plan import Affine, Plan, TensorInfo, TensorRef, Transform, coefs
from vivace.errors import PlanError

KIND = "low_rank"
PARAMS = ("gains", "basis")


def keys_of(op: Transform) -> tuple[str, str]:
    """Keys of gains and basis. Raises PlanError when they are no tensors."""
    gains, basis = coefs(op)
    if not isinstance(gains, TensorRef) or not isinstance(basis, TensorRef):
        raise PlanError(f"{KIND} of {op.slot!r}: gains and basis are tensors of the side-car, got {gains}, {basis}")
    return gains.key, basis.key


def maps_of(plan: Plan) -> Iterator[tuple[str, str]]:
    """Keys of gains and basis of every such op."""
    for op in plan.ops():
        if isinstance(op, Transform) and op.kind == KIND:
            yield keys_of(op)


def shapes_of(plan: Plan, latent: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    """The shape that every tensor of low-rank maps must have, by key; latent None: what its basis says.

    Raises PlanError for a gain or basis of another shape than its map needs, or that an affine op reads too.
    """
    infos: Mapping[str, TensorInfo] = {info.key: info for info in plan.tensors}
    found: dict[str, tuple[int, ...]] = {}
    for gains, basis in maps_of(plan):
        rank = infos[gains].shape[:1]
        shape = infos[basis].shape[1:] or (1,) if latent is None else latent
        found |= {gains: rank, basis: (*rank, *shape)}
    for key, shape in found.items():
        if infos[key].shape != shape:
            raise PlanError(
                f"side-car tensor {key!r} has shape {infos[key].shape}; a {KIND} map needs gains [r] and a basis "
                f"[r, *latent], {shape} here"
            )
    if found:
        for op in plan.ops():
            shared = {coef.key for coef in coefs(op) if isinstance(op, Affine) and isinstance(coef, TensorRef)}
            if shared := shared & found.keys():
                raise PlanError(f"side-car tensor {min(shared)!r} is both of a {KIND} map and a coefficient; keep two")
    return found
