"""The suite `e2e` on tiny networks: quality first, then rows, ratios and claims. No timing is asserted here."""

from dataclasses import replace

import pytest
import torch

from vivace import bench
from vivace.bench import e2e, e2e_cases
from vivace.bench.e2e_cases import Case, fewest, quality, settle
from vivace.bench.models import MODELS, BenchModel, sizes
from vivace.errors import ArgumentError, BackendError

TINY = BenchModel("tiny", sizes(2, 2, 16, size=8, classes=1000))
CASE = Case(TINY, (207, 980), 2.0)
BEST = {"vivace": {"solver": "unipc", "steps": 4}, "diffusers": {"solver": "unipc", "spacing": "linspace", "steps": 4}}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The same suite on a network of two layers, few steps, two runtimes."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(e2e, "SECONDS", {True: 0.0, False: 0.0})
    patch.setattr(e2e, "PEERS", ("eager",))
    patch.setattr(e2e, "DEFAULT_STEPS", 10)
    patch.setitem(MODELS, "tiny", TINY)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def reference():
    return CASE.converged()


@pytest.fixture(scope="module")
def table(reference):
    return e2e.table(CASE, True, reference=reference, best=BEST, timed=None)


def test_the_converged_solution_is_kept_and_starts_from_the_pipelines_noise(reference):
    assert reference.shape == (2, 4, 8, 8) and torch.equal(CASE.converged(), reference)
    assert torch.equal(CASE.noise[1], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert quality(reference, reference) == 200.0
    default = torch.cat([e2e_cases.Default(CASE)(i, 50) for i in range(2)])
    assert quality(default, reference) > 25  # same noise, same picture


def test_a_grid_goes_up_to_the_target_and_the_fewest_steps_win(reference):
    rows = list(e2e_cases.vivace_grid(CASE, reference, ("ddim", "unipc")))
    for solver in ("ddim", "unipc"):
        mine = [row for row in rows if row["solver"] == solver]
        assert [row["meets"] for row in mine][:-1] == [False] * (len(mine) - 1)
        assert [row["steps"] for row in mine] == list(e2e_cases.STEPS[: len(mine)])
    best = fewest(rows)
    assert best["meets"] and best["steps"] == min(row["steps"] for row in rows if row["meets"])
    assert fewest([{"meets": False}]) is None


def test_a_runtime_that_rounds_may_take_a_few_more_steps_and_no_more(reference):
    drawn = []

    def draw(steps):
        drawn.append(steps)
        return reference if steps == 8 else reference + 1

    assert settle(draw, 6, reference) == (8, 200.0) and drawn == [6, 7, 8]
    steps, decibels = settle(lambda steps: reference + 1, 6, reference)
    assert steps == 6 + e2e_cases.PATIENCE and decibels < e2e_cases.TARGET


def test_the_table_has_default_peers_every_factor_and_those_to_come(table):
    rows = [row.columns for row in table]
    factors = [row["factor"] for row in rows]
    assert factors == ["default", "peer", "peer", *(f.name for f in e2e.FACTORS), *e2e.LATER]
    timed = [row for row in rows if row.get("ms")]
    assert len(timed) == len(rows) - len(e2e.LATER)
    assert all(row["reason"] == "not in this release" for row in rows[-len(e2e.LATER) :])
    default = timed[0]
    assert default["over_default"] == 1.0 and (default["nfe"], default["dtype"]) == (10, "float32")
    for row in timed:
        assert row["over_default"] == pytest.approx(default["ms"]["median"] / row["ms"]["median"])
        assert row["percent_of_roofline"] > 0 and row["tokens"] == 16 and row["psnr"] > 15 and "compile_s" in row


def test_the_best_peer_is_the_fastest_that_reaches_the_target(table):
    timed = [row for row in table if row.times is not None]
    peers = [row for row in timed if row.columns["factor"] == "peer"]
    quick, slow = sorted(peers, key=lambda row: row.ms)
    judge = {True: {"meets": True}, False: {"meets": False}}
    for first, second, rival in ((True, True, quick), (False, True, slow), (False, False, None)):
        rows = [
            replace(quick, columns=quick.columns | judge[first]),
            replace(slow, columns=slow.columns | judge[second]),
        ]
        best = e2e.best_peer([*rows, *(row for row in timed if row not in peers)])
        assert best is None if rival is None else best.ms == rival.ms


def test_random_weights_are_compared_with_the_eager_run_and_scaled_from_few_steps():
    rows = e2e.table(CASE, True, reference=None, best=BEST, timed=2)
    exact = next(row for row in rows if row.columns["factor"] == "none")
    assert exact.columns["psnr"] == 200.0 and exact.scale == 5
    assert exact.columns["ms"]["median"] == pytest.approx(5 * exact.times.median)
    everything = next(row for row in rows if row.columns["factor"] == "all")
    assert 20 < everything.columns["psnr"] < 200 and everything.scale == 2


def test_a_backend_that_cannot_run_is_a_row_with_the_reason(monkeypatch, reference):
    def refuse(*args, **kwargs):
        raise BackendError("compile: no fast kernels here")

    monkeypatch.setattr(e2e_cases, "compile_vivace", refuse)
    row = e2e.vivace_row(CASE, e2e.ALL, BEST["vivace"], reference, None)
    assert row.call is None and row.columns["reason"] == "compile: no fast kernels here"


def test_changing_numbers_recompiles_nothing():
    data = bench.run("e2e", claim="e2e.recompiles_on_number_change", quick=True)
    (claim,), rows = data["claims"], data["rows"]
    assert claim["value"] == 0.0 and claim["holds"] and claim["n"] == len(rows) == 7
    assert rows[0]["compiles"] >= 1 and len({row["compiles"] for row in rows}) == 1


def test_the_default_claim_is_the_ratio_of_its_rows_at_the_target(monkeypatch, reference):
    monkeypatch.setattr(e2e, "emoji_case", lambda: CASE)
    data = bench.run("e2e", claim="e2e.vs_diffusers_default", quick=True)
    (claim,) = data["claims"]
    default, ours = (row for row in data["rows"] if row["op"] == "e2e")
    assert ours["meets"] and ours["dtype"] == "bfloat16" and default["factor"] == "default"
    assert claim["value"] == pytest.approx(default["ms"]["median"] / ours["ms"]["median"])
    assert any(row["op"] == "grid" and row["meets"] for row in data["rows"])


def test_without_peers_a_claim_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(e2e, "absent", lambda *names: "diffusers cannot be imported")
    (claim,) = bench.run("e2e", claim="e2e.vs_diffusers_default", quick=True)["claims"]
    assert claim["value"] is None and claim["how"] == "diffusers cannot be imported"


def test_wrong_names_are_refused():
    for wrong in ({"op": "gelu"}, {"claim": "e2e.best"}):
        with pytest.raises(ArgumentError):
            bench.run("e2e", **wrong)
