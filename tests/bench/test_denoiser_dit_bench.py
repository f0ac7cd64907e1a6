"""The native DiT in the suite `denoiser`, on a tiny model: what rows and claims say. No timing is asserted here."""

import pytest
import torch

from vivace import bench
from vivace.bench import denoiser_dit, peers
from vivace.bench.denoiser_dit import HOISTED, WHOLE, SteadyRow
from vivace.bench.models import MODELS, BenchModel, sizes
from vivace.errors import BackendError

TINY = BenchModel("tiny", sizes(2, 2, 16, size=8, classes=1000))
FEW = 2.0**-6  # of bfloat16's own error here


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The same section on a network of two layers."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(denoiser_dit, "SECONDS", {True: 0.0, False: 0.0})
    for name in (denoiser_dit.BASE, denoiser_dit.LARGE):
        patch.setitem(MODELS, name, TINY)
    yield
    patch.undo()


def test_a_steady_row_steps_and_begins_again_when_the_plan_ends():
    row = SteadyRow(TINY, "float32", 2)
    first = row.state
    row.prepare(denoiser_dit.ROWS - 1)
    assert row.state is first
    for _ in range(denoiser_dit.ROWS - 1):
        row()
    assert first.done
    row.prepare(1)
    assert row.state is not first and row.state.row == 0


@pytest.mark.parametrize(
    ("dtype", "batch", "bound"), [("float32", 1, 1e-5), ("float32", 2, 1e-5), ("bfloat16", 2, 0.05)]
)
def test_a_row_of_ours_is_the_network_of_the_peers_hoisted_or_not(dtype, batch, bound):
    assert SteadyRow(TINY, dtype, batch).error() < bound
    assert SteadyRow(TINY, dtype, batch, hoist=False).error() < bound


def test_rows_stand_side_by_side_with_their_errors_and_ratios():
    given = {"eager": ("float32",), "open_vino": ("float32",)}
    rows, times = denoiser_dit.case_rows(denoiser_dit.BASE, "float32", 2, True, given, (HOISTED, WHOLE))
    assert [row["backend"] for row in rows] == ["vivace", "vivace, nothing hoisted", "diffusers", "openvino"]
    own, whole, eager, vino = rows
    assert own["over_eager"] == times["diffusers float32"].median / times["vivace float32"].median
    assert eager["over_eager"] == 1.0 and eager["error"] == 0.0 and own["percent_of_roofline"] > 0
    assert (vino["ms"] is None) == (vino["reason"] is not None)
    assert all(row["tokens"] == 16 and row["case"].endswith(" x2") for row in rows)


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(SteadyRow, "error", lambda self: 1.0)
    with pytest.raises(BackendError, match="nothing was timed"):
        denoiser_dit.case_rows(denoiser_dit.BASE, "float32", 1, True, {}, (HOISTED,))


def test_the_hoisting_claim_is_computed_from_its_own_rows():
    data = bench.run("denoiser", claim="denoiser.hoisting_gain_dit_b", quick=True)
    (claim,), (own, whole) = data["claims"], data["rows"]
    assert claim["value"] == pytest.approx(whole["ms"]["median"] / own["ms"]["median"])
    assert claim["interval"][0] <= claim["value"] <= claim["interval"][1] and claim["op"] == ">="


def test_the_share_of_stages_counts_no_attention():
    data = bench.run("denoiser", claim="denoiser.non_gemm_share_xl", quick=True)
    (claim,), (row,) = data["claims"], data["rows"]
    assert set(row["stages_ms"]) == {"linear", "attention", "norm", "rest", "quantize"}
    assert 0 < claim["value"] < 1 and claim["n"] == denoiser_dit.CLOCKED
    stages = denoiser_dit.Stages({"linear": 80, "attention": 900, "norm": 15, "rest": 5}, lambda: None)
    assert stages.share == 0.2


@pytest.mark.parametrize("peer", ["inductor", "openvino_bf16"])
def test_a_claim_against_an_absent_peer_is_null_with_the_reason(peer, monkeypatch):
    monkeypatch.setattr(denoiser_dit, "absent", lambda *names: "diffusers is not installed")
    (claim,) = bench.run("denoiser", claim=f"denoiser.dit_b_bf16_vs_{peer}", quick=True)["claims"]
    assert claim["value"] is None and claim["holds"] is None and claim["how"] == "diffusers is not installed"


def test_a_claim_against_a_peer_that_cannot_compile_is_null_with_the_reason(monkeypatch):
    def without(name, model, dtype, batch, threads):
        return peers.Peer("torch.compile", dtype, reason="no C++ compiler")

    monkeypatch.setattr(denoiser_dit, "prepared", without)
    data = bench.run("denoiser", claim="denoiser.dit_b_bf16_vs_inductor", quick=True)
    assert data["claims"][0]["value"] is None and data["claims"][0]["how"] == "no C++ compiler"
    assert data["rows"][-1]["ms"] is None and data["rows"][-1]["reason"] == "no C++ compiler"


def test_a_claim_against_a_peer_is_the_ratio_of_its_rows(monkeypatch):
    def eager(name, model, dtype, batch, threads):
        module = peers.runtime("eager")
        return peers.Peer("torch.compile", dtype, module.make(model, dtype, batch, threads), 0.01)

    monkeypatch.setattr(denoiser_dit, "prepared", eager)
    data = bench.run("denoiser", claim="denoiser.dit_b_bf16_vs_inductor", quick=True)
    (claim,), rows = data["claims"], data["rows"]
    assert claim["value"] == pytest.approx(rows[-1]["ms"]["median"] / rows[0]["ms"]["median"])
    assert "without hoisting" in claim["how"] and torch.get_num_threads() == rows[0]["threads"]
