"""INT8 of the native DiT in the suite `denoiser`, on a tiny model: what rows and claims say. No timing is asserted."""

import pytest

from vivace import bench
from vivace.bench import denoiser_dit, denoiser_int8
from vivace.bench.denoiser_dit import HOISTED, SteadyRow
from vivace.bench.models import MODELS, BenchModel, sizes

TINY = BenchModel("tiny", sizes(2, 2, 16, size=8, classes=1000))


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The same section on a network of two layers."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(denoiser_dit, "SECONDS", {True: 0.0, False: 0.0})
    for name in (denoiser_int8.BASE, denoiser_int8.LARGE):
        patch.setitem(MODELS, name, TINY)
    yield
    patch.undo()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_steady_row_runs_in_int8(batch):
    row = SteadyRow(TINY, "int8", batch)
    variant = row.session.plans[0].steps[0].variant
    assert {rule.precision for rule in variant.rules} == {"int8"}
    assert 0.0 < row.error() < denoiser_int8.MOST_ERROR


def test_rows_of_ours_say_int8():
    rows, times = denoiser_dit.case_rows(denoiser_int8.BASE, "int8", 1, True, {}, (HOISTED,))
    assert [(row["backend"], row["dtype"]) for row in rows] == [("vivace", "int8")]
    assert rows[0]["ms"]["median"] == times["vivace int8"].median and rows[0]["over_openvino"] is None


def test_the_error_claim_is_the_largest_of_our_rows(monkeypatch):
    monkeypatch.setattr(denoiser_int8, "PEERS", ())
    data = bench.run("denoiser", claim="denoiser.int8_rel_error", quick=True)
    (claim,) = data["claims"]
    assert claim["value"] == max(row["relative_error"] for row in data["rows"])
    assert claim["holds"] == (claim["value"] <= claim["bound"]) and len(data["rows"]) == 2


def test_without_a_peer_the_ratio_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(denoiser_int8.runtime("open_vino"), "why_not", lambda dtype: "openvino is not installed")
    (claim,) = bench.run("denoiser", claim="denoiser.int8_dit_b_vs_openvino_int8", quick=True)["claims"]
    assert claim["value"] is None and claim["how"] == "openvino is not installed"
