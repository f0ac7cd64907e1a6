"""The suite `denoiser` on tiny networks: what its rows and claims say. No timing is asserted here."""

import json
from functools import partial

import pytest
import torch

from vivace import bench
from vivace.bench import denoiser, denoiser_dit, denoiser_int8, int8_linears
from vivace.errors import ArgumentError, BackendError
from vivace.kernels.spec import UNIT_ROUNDOFF

TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
CASE = "DiT-S/2 x2"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The same suite on a network of two layers, in a fraction of a second."""
    monkeypatch.setitem(denoiser.CASES, CASE, partial(denoiser.dit, sizes=TINY))
    monkeypatch.setattr(denoiser, "SECONDS", {True: 0.0, False: 0.0})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_says_time_quality_floor_and_what_was_replaced(dtype):
    rows, times = denoiser.case_rows(CASE, dtype, quick=True)
    eager, fused, compiled = rows
    assert [row["backend"] for row in rows] == ["eager", "fused", "torch.compile"]
    assert fused["error"] <= 2 * eager["error"] + UNIT_ROUNDOFF[dtype]
    assert fused["over_eager"] == times["eager"].median / times["fused"].median and eager["over_eager"] == 1.0
    assert {op: entry["places"] for op, entry in fused["replaced"].items()} == {
        "adaln_modulate": 2, "gated_residual": 2, "gelu": 2, "norm_modulate": 3,
    }  # fmt: skip
    assert compiled["ms"] is None and compiled["reason"] == "not compiled in a quick run"
    assert all(row["floor_ms"] > 0 and row["threads"] == torch.get_num_threads() for row in rows)


def test_the_floor_counts_every_byte_the_elementwise_ops_move():
    network = denoiser.CASES[CASE](torch.float32)
    state = 2 * 16 * 32 * 4  # bytes of the hidden states
    assert network.hidden == state
    # a block: norm 2, residual and norm 4, GELU 8, residual 3; the last norm 2; vectors are small beside them
    assert 0 <= denoiser.elementwise_bytes(network) - (2 * 17 + 2) * state < 2 * state


ELSEWHERE = {*denoiser_dit.CLAIMS, *denoiser_int8.CLAIMS, *int8_linears.CLAIMS}


@pytest.mark.parametrize("name", [name for name in denoiser.CLAIMS if name not in ELSEWHERE])
def test_claims_are_computed_from_their_own_rows(name, tmp_path):
    data = bench.run("denoiser", claim=name, quick=True, out=tmp_path / "results")
    (claim,) = data["claims"]
    assert claim["name"] == name and claim["interval"][0] <= claim["value"] <= claim["interval"][1]
    medians = {row["backend"]: row["ms"] and row["ms"]["median"] for row in data["rows"]}
    above, below = ("driven", "plain") if "overhead" in name else ("eager", "fused")
    assert claim["value"] == pytest.approx(medians[above] / medians[below])
    assert json.loads((tmp_path / "results" / "denoiser.json").read_text())["claims"] == data["claims"]
    assert name in (tmp_path / "results" / "denoiser.txt").read_text()


def test_a_wrong_result_is_not_timed(monkeypatch):
    errors = iter([1e-7, 1.0])
    monkeypatch.setattr(denoiser, "error_of", lambda actual, exact: next(errors))
    with pytest.raises(BackendError, match="nothing was timed"):
        denoiser.case_rows(CASE, "float32", quick=True)


def test_without_a_compiler_the_row_says_so(monkeypatch):
    def broken(*args, **kwargs):
        def call(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    compiled, seconds, reason = denoiser.compile_network(denoiser.CASES[CASE](torch.float32))
    assert (compiled, seconds, reason) == (None, None, "torch.compile: no C++ compiler")


def test_without_diffusers_a_claim_is_null_with_the_reason(monkeypatch):
    for module in (denoiser, denoiser_dit, denoiser_int8):
        monkeypatch.setattr(module, "_cannot", lambda: "diffusers is not installed")
    monkeypatch.setattr(int8_linears, "missing", lambda _: "diffusers is not installed")
    for claim in bench.run("denoiser")["claims"]:
        assert claim["value"] is None and claim["how"] == "diffusers is not installed"


def test_wrong_names_are_refused():
    for wrong in ({"op": "gelu"}, {"claim": "denoiser.best"}):
        with pytest.raises(ArgumentError):
            bench.run("denoiser", **wrong)
