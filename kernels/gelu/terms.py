"""Coefficients of the fast `gelu`, by dtype; csrc/ops/gelu.inl has the same and says what they approximate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def _floats(*words: str) -> tuple[float, ...]:
    return tuple(map(float.fromhex, words))


@dataclass(frozen=True, slots=True)
class Terms:
    """Phi(x) = 1/2 + x p(x^2) / q(x^2) for |x| <= limit, 2^r = exp2(r) for |r| <= 1/2; lowest coefficient first."""

    limit: float
    p: tuple[float, ...]
    q: tuple[float, ...]
    exp2: tuple[float, ...]


TERMS: Mapping[str, Terms] = {
    "float32": Terms(
        float.fromhex("0x1.5ffca4p+2"),
        _floats(
            "0x1.988450p-2", "0x1.162de6p-5", "0x1.32fa10p-8", "0x1.64554ep-13", "0x1.aaec08p-18", "0x1.85bdb0p-26"
        ),
        _floats("1", "0x1.01d3cep-2", "0x1.d6554ap-6", "0x1.efa284p-10", "0x1.366474p-14", "0x1.41224ep-20"),
        _floats("1", "0x1.62e42ap-1", "0x1.ebf9c2p-3", "0x1.c6b6d8p-5", "0x1.3ce8acp-7", "0x1.5bda40p-10"),
    ),
    "bfloat16": Terms(
        float.fromhex("0x1.36efaap+2"),
        _floats("0x1.988200p-2", "0x1.c95246p-6", "0x1.ee5baap-9", "0x1.08f1dcp-15"),
        _floats("1", "0x1.e483a8p-3", "0x1.87c790p-6", "0x1.2787ecp-10"),
        _floats("1", "0x1.62f5fap-1", "0x1.f00c4cp-3", "0x1.c2a250p-5"),
    ),
}
# -2 sqrt(2 / pi) log2(e) (1, 0.044715): the exponent of "tanh" is x times this polynomial in x^2.
TANH = _floats("-0x1.26aec2p+1", "-0x1.a5a7d0p-4")
