"""Inputs that `int8_attention` is tested and timed on: widths and counts of every kind, layouts, awkward numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vivace.kernels.attention import cases as plain
from vivace.kernels.attention.cases import B, H, K, N, fused, nan_key, nan_query, nan_value, one_key_for_all, permuted
from vivace.kernels.spec import Case

DTYPES = ("bfloat16", "float16")


def far_off(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of a mean ten times their deviation, as trained models have them."""
    key += 10.0
    return query, key, value


def zeros(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A query of zeros; the keys of one head all alike."""
    query[0, 0] = 0.0
    key[:, :, 1] = 0.5
    return query, key, value


def cases() -> tuple[Case, ...]:
    """All cases; the first is the one that a DiT block runs."""

    def case(name: str, **arguments: Any) -> Case:
        return Case(name, partial(plain.make, **arguments), DTYPES)

    return (
        case("heads of 72", shape=(1, 70, 2, 72), layout=fused),
        case("heads of 64", shape=(1, 80, 2, 64)),
        case("heads of 128", shape=(1, 67, 1, 128)),
        case("heads of 96", shape=(1, 33, 1, 96)),
        case("heads of 33", shape=(B, 9, H, 33)),
        case("heads of 7", shape=(B, N, H, 7), layout=fused),
        case("heads of 112", shape=(1, 9, 1, 112), keys=70),
        case("cross-attention", shape=(B, 50, 2, 64), keys=77),
        case("one key", keys=1),
        case("one query of many keys", shape=(B, 1, 2, 40), keys=130),
        case("keys in blocks", shape=(1, 30, 1, 64), keys=600),
        case("queries in blocks", shape=(1, 300, 1, 16), keys=40),
        case("heads outermost", shape=(B, 20, H, 32), layout=permuted),
        case("one key for all", shape=(B, 20, H, 24), layout=one_key_for_all),
        case("into heads with gaps", into_gaps=True),
        case("own scale", shape=(B, 20, H, 32), scale=0.5),
        case("sharp", shape=(B, 40, 2, 64), spread=30.0),
        case("mean far off", shape=(B, 40, 2, 64), layout=far_off),
        case("zeros", shape=(B, N, H, K), layout=zeros),
        case("NaN in a query", layout=nan_query),
        case("NaN in a key", layout=nan_key),
        case("NaN in a value", layout=nan_value),
        case("size 1", shape=(B, 1, 1, 1)),
        case("size 123", shape=(1, 123, 1, 123), keys=123),
        case("size 4097", shape=(1, 4097, 1, 8), keys=3),
        case("empty batch", shape=(0, N, H, K)),
        case("empty sample", shape=(B, 0, H, K)),
        case("no keys", keys=0),
    )
