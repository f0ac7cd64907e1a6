"""The bench of INT8 linears: checked before it is timed, and its claims say what was compared."""

import pytest
import torch

from vivace.bench import int8_linears
from vivace.errors import BackendError
from vivace.kernels import spec

pytestmark = pytest.mark.skipif(spec.missing("cpu") is not None, reason="vivace._C is not built (make build)")


@pytest.fixture
def small(monkeypatch):
    """Two tiny linears, a few rounds."""
    int8_linears.measured.cache_clear()
    monkeypatch.setattr(int8_linears, "ROWS", (48,))
    monkeypatch.setattr(int8_linears, "LINEARS", {"up": (64, 128, "gelu_tanh", False), "down": (128, 64, "none", True)})
    monkeypatch.setattr(int8_linears, "SECONDS", {True: 0.01, False: 0.01})
    monkeypatch.setattr(int8_linears, "STEPS", 1)
    yield
    int8_linears.measured.cache_clear()


def test_claims_come_with_the_rows_behind_them(small):
    for name, measure in int8_linears.CLAIMS.items():
        rows, claim = measure(True)
        assert claim.name == name and claim.op == ">=" and claim.value > 0.0 and claim.n >= 7
        assert claim.interval[0] <= claim.value <= claim.interval[1]
        assert {row["backend"] for row in rows} >= {"vivace", "torch._int_mm", "torch float32"}
        assert all(row["floor_ms"] > 0.0 and row["gflop_per_s"] > 0.0 for row in rows)
        assert [row["error"] < 0.01 for row in rows if row["backend"] == "vivace"] == [True, True]


def test_threads_are_given_back(small):
    before = torch.get_num_threads()
    with int8_linears.with_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_wrong_result_is_not_timed(small):
    one = int8_linears.problem(48, "down")
    packed = int8_linears.pack_weight(one.weight.clone().fill_(1))
    with pytest.raises(BackendError, match="nothing was timed"):
        int8_linears.check(one, packed)
