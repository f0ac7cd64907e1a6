"""Counter-based unit normals: any element of any draw of any picture, found without those before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vivace.kernels.spec import Call, Case, OpSpec, choose, load, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NORMAL_TOLERANCE", "philox_normal"]

# Absolute error granted to implementations that do not repeat the definition's float32 operations.
NORMAL_TOLERANCE = 4e-6


def philox_normal(
    shape: Sequence[int],
    seeds: Any,
    pictures: Any,
    draw: int = 0,
    *,
    device: Any = "cpu",
    backend: str | None = None,
) -> Tensor:
    """n[b, i] = Box-Muller of philox4x32-10(counter (i >> 2, pictures[b], draw), key seeds[b]), word i & 3.

    Args:
        shape: of one sample; element i is the flat, row-major index in it.
        seeds: 64-bit request seeds [B]: ints, or int64 (bit pattern) tensor or array; pictures: picture numbers [B].
        draw: which draw of the request, as in the slot `noise:<draw>`; 0 <= draw < 2^32.
        device: of the result.
        backend: "reference" | "cpu" | "triton" | "auto"; None: VIVACE_BACKEND, then "auto".
    Returns: float32 [B, *shape]. The integer words are exact everywhere; normals have the bits of
        `engine.noise.normals` in "reference" and "cpu" and are within 4e-6 of them elsewhere.
    Raises: ShapeError, DtypeError, ArgumentError, BackendError.
    Source: Salmon et al. 2011; Box and Muller 1958.
    """
    import torch

    from vivace.kernels.philox_normal.check import prepare

    size, seeds, pictures = prepare(shape, seeds, pictures, draw)
    place = torch.device(device)
    choice = choose(SPEC, place.type, "float32", backend)
    result: Tensor = load(SPEC, choice.backend)(size, seeds, pictures, draw, device=place)
    return result


def _bytes_moved(shape: Sequence[int], seeds: Any, pictures: Any, draw: int = 0, **_: Any) -> int:
    """Bytes written: 4 a normal."""
    return 4 * len(seeds) * math.prod(shape)


def _flops(shape: Sequence[int], seeds: Any, pictures: Any, draw: int = 0, **_: Any) -> int:
    """Float operations of the definition, 35 a pair: logarithm 21, quarter turn 14 (integer work not counted)."""
    return 35 * len(seeds) * math.prod(shape) // 2


def _case(name: str, shape: tuple[int, ...], seeds: Sequence[int], pictures: Sequence[int], draw: int) -> Case:
    return Case(name, lambda dtype, device: Call((shape, list(seeds), list(pictures), draw), {"device": device}))


def _cases() -> tuple[Case, ...]:
    top = (1 << 64) - 1
    return (
        _case("size 1", (1,), (0,), (0,), 0),
        _case("size 123", (123,), (7, 7, top), (0, 1, 5), 3),
        _case("latent", (4, 17, 31), (42, 1 << 40), (2, 0), 1),
        _case("size 4097", (4097,), (1, 2), (0, 0), 70000),
        _case("empty batch", (5,), (), (), 0),
        _case("empty sample", (0, 3), (1, 2), (0, 1), 0),
    )


SPEC = register(
    OpSpec(
        name="philox_normal",
        reference="vivace.kernels.philox_normal.reference",
        impls={
            "cpu": "vivace.kernels.philox_normal.cpu_impl",
            "triton": "vivace.kernels.philox_normal.triton_impl",
        },
        cases=_cases,
        tolerance=NORMAL_TOLERANCE,
        bytes_moved=_bytes_moved,
        flops=_flops,
    )
)
