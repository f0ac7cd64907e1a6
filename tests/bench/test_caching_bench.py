"""The suite `caching` on tiny networks: shares, lines of time, levels of PSNR, claims. No timing is asserted here."""

import sys

import numpy as np
import pytest
import torch

from vivace import bench
from vivace.bench import caching, caching_cases, caching_large, caching_peers
from vivace.bench.caching import Line, Row, Table, best_within, interval_of
from vivace.bench.caching_cases import NONE, Base, Drawn, Method, decibels, each
from vivace.bench.caching_peers import Side, fastest
from vivace.bench.e2e_cases import Case
from vivace.bench.harness import Timing
from vivace.bench.models import MODELS, BenchModel, flops, sizes
from vivace.bench.peers import caches
from vivace.bench.peers.loop import draw, scheduler
from vivace.errors import ArgumentError

TINY = BenchModel("tiny", sizes(2, 2, 16, size=8, classes=1000))
CASE = Case(TINY, (207, 980), 2.0)
BASE = Base("unipc", 6)
FORA = each("Fora", interval=(2, 3))
TABLED = Method("OptimalCache", {"budget": 0.6})


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The suite on a network of two layers, few steps, a table of two pictures."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setitem(MODELS, "tiny", TINY)
    for module in (caching, caching_peers):
        patch.setattr(module, "SECONDS", {True: 0.0, False: 0.0})
        patch.setattr(module, "emoji_case", lambda: CASE)
    patch.setattr(caching_cases, "CALIBRATED", 2)
    patch.setattr(caching, "UNIPC", BASE)
    patch.setattr(caching, "LINE", (2, 4))
    patch.setattr(caching, "TRIED", tuple((BASE, method) for method in (*FORA, TABLED)))
    patch.setattr(caching, "RULES", (*FORA, *each("SmoothCache", alpha=(0.2,)), *each("MagCache", threshold=(0.2,))))
    patch.setattr(caching_peers, "PLACES", {True: (BASE,)})
    patch.setattr(caching_peers, "OURS", {True: FORA})
    patch.setattr(caching_peers, "FEWER", {True: (4,)})
    patch.setattr(caching_large, "STEPS", {True: 4})
    patch.setattr(caching_large, "ROUNDS", {True: 1})
    yield
    patch.undo()
    caching_cases.session.cache_clear()
    caching_cases.table.cache_clear()


@pytest.fixture(scope="module")
def table():
    return Table(CASE)


def test_costs_are_the_operations_of_a_forward():
    config = TINY.opened.config
    known = dict(caching_cases.costs(config))
    total = config.layers * (known["attn"] + known["mlp"]) + known["outside"]
    assert total == pytest.approx(flops(config, modulation=False))


def test_a_table_is_made_once_from_pictures_that_are_not_drawn(table):
    artefact = caching_cases.table_artefact(CASE, BASE)
    assert not set(artefact.key["labels"]) & set(CASE.labels) and len(artefact.key["labels"]) == 2
    assert caching_cases.table(CASE, BASE).metadata["prompts"] == artefact.key["labels"] and artefact.ready
    assert caching_cases.table_artefact(CASE, Base("unipc", 7)).path != artefact.path


def test_a_plan_that_never_reuses_is_the_plain_one(table):
    row = table.row(BASE, Method("Fora", {"interval": 1}))
    assert row.columns["share"] == 1.0 and row.columns["psnr_uncached"] == 200.0
    assert torch.equal(row.drawn.latents, table.plain(BASE).latents)


def test_a_row_says_what_it_computes_and_how_far_it_is(table):
    row = table.row(BASE, FORA[0])
    opened = TINY.opened
    attn, mlp, outside = (cost for _, cost in caching_cases.costs(opened.config))
    spared = 2 * opened.config.layers * (attn + mlp) / (6 * flops(opened.config, modulation=False))
    assert outside > 0 and row.columns["share"] == pytest.approx(1 - spared)  # two of six evaluations, the ends compute
    assert 0 < row.columns["psnr_uncached"] < 200 and row.columns["psnr"] > 0
    assert row.columns["method"] == "Fora" and row.columns["setting"] == "interval 2" and row.columns["shares"] is None


def test_guards_report_a_range_of_shares(table):
    row = table.row(BASE, Method("FirstBlockCache", {"threshold": 0.3}))
    shares = row.drawn.shares
    assert len(shares) == 2 and all(0 < share <= 1 for share in shares)
    assert row.columns["shares"] == (None if shares[0] == shares[1] else sorted(shares))


def test_the_plain_plan_beside_a_row_takes_at_least_as_long():
    line = Line.through({5: 60.0, 10: 110.0, 20: 210.0})
    assert (line.start, line.step) == pytest.approx((10.0, 10.0))
    assert [line.steps(ms) for ms in (12.0, 60.0, 61.0)] == [1, 5, 6]
    assert Line(10.0, -1.0).steps(5.0) == sys.maxsize


def test_rows_are_timed_together_and_stand_beside_fewer_steps(table):
    rows = [table.row(BASE, method) for method in (NONE, *FORA)]
    lines = table.time(rows, (BASE,), 0.0)
    for row in rows:
        gains = table.beside(row, lines[BASE])
        told = row.columns
        assert told["fewer_steps"] == min(lines[BASE].steps(row.ms), 12) and told["ms"]["median"] == row.ms
        assert told["fewer_best_psnr"] >= told["fewer_psnr"]
        assert gains.mean() == pytest.approx(told["psnr"] - told["fewer_best_psnr"])


def test_the_rival_is_the_best_rule_within_the_budget():
    def row(share, decibels):
        return Row(BASE, {"psnr_uncached": decibels}, None, Drawn(torch.zeros(1), (share,)))

    rows = [row(0.5, 30.0), row(0.4, 31.0), row(0.7, 40.0), row(1.0, 200.0)]
    assert [best_within(rows, budget) for budget in (0.5, 0.8, 1.0, 0.2)] == [rows[1], rows[2], rows[2], None]


def test_intervals_hold_the_mean():
    gains = np.array([1.0, 2.0, 3.0, 2.5])
    low, high = interval_of(gains)
    assert 1.0 <= low < gains.mean() < high <= 3.0


def test_a_side_is_as_fast_as_its_fastest_row_of_a_level():
    sides = [Side({"psnr": p}, int, Timing((ms,))) for p, ms in ((31.0, 5.0), (33.0, 9.0), (29.0, 1.0))]
    assert [fastest(sides, level) for level in (30.0, 32.0, 34.0)] == [sides[0], sides[1], None]


HERE = [setting for setting in caches.SETTINGS if caches.why_not(setting) is None]


def test_a_library_that_is_not_here_is_named():
    reasons = [caches.why_not(setting) for setting in caches.SETTINGS if setting not in HERE]
    assert all(reasons)
    assert {setting.backend for setting in caches.SETTINGS if setting not in HERE} <= {caches.CACHE_DIT}


@pytest.mark.parametrize("setting", HERE, ids=lambda setting: f"{setting.method} {setting.told}")
def test_every_cache_of_another_library_runs_and_forgets_between_pictures(setting):

    def picture(call, steps=8):
        loop = scheduler(TINY.scheduler, "unipc", "linspace")
        return draw(call, loop, steps, CASE.noise[:1], torch.tensor([207]), CASE.null, 2.0)

    ready = caches.make(TINY, "float32", setting, 8, picture)
    pictures = []
    for _ in range(2):
        ready.begin(8)
        pictures.append(picture(ready.call))
    assert torch.equal(*pictures) and pictures[0].isfinite().all()


def test_hooks_change_the_picture_where_they_should():
    plain = caches.make(TINY, "float32", caches.SETTINGS[0], 8, lambda call: None)
    taylor = next(setting for setting in caches.SETTINGS if setting.method == "TaylorSeer")

    def latents(ready):
        ready.begin(8)
        loop = scheduler(TINY.scheduler, "unipc", "linspace")
        return draw(ready.call, loop, 8, CASE.noise[:1], torch.tensor([207]), CASE.null, 2.0)

    changed = latents(caches.make(TINY, "float32", taylor, 8, lambda call: None))
    assert 10 < decibels(changed, latents(plain)).mean() < 200


def test_the_claim_on_fewer_steps_is_the_best_gain_of_its_rows():
    data = bench.run("caching", claim="caching.psnr_gain_over_fewer_steps_db", quick=True)
    (claim,), rows = data["claims"], data["rows"]
    assert len(rows) == 3 and claim["value"] == max(row["gain_db"] for row in rows)
    assert claim["interval"][0] <= claim["value"] <= claim["interval"][1] and claim["n"] == 2


def test_the_claim_on_the_optimal_schedule_compares_at_equal_work():
    data = bench.run("caching", claim="caching.dp_psnr_gain_over_best_fixed_rule_db", quick=True)
    (claim,), ours = data["claims"], [row for row in data["rows"] if row["method"] == "OptimalCache"]
    assert claim["value"] == min(row["gain_db"] for row in ours)
    assert all(row["share"] <= row["rival_share"] + 1e-9 for row in ours)


def test_the_claim_beside_peers_is_the_least_ratio_of_its_levels(monkeypatch):
    monkeypatch.setattr(caching_peers, "LEVELS", {True: (5.0, 6.0)})
    monkeypatch.setattr(caches, "QUICK", (0, 1, 5))
    data = bench.run("caching", claim="caching.speedup_vs_best_peer_at_equal_psnr", quick=True)
    (claim,), rows = data["claims"], data["rows"]
    if (reason := caches.why_not(caches.SETTINGS[-1])) is not None:  # one of them is not here: nothing is measured
        assert claim["value"] is None and reason in claim["how"]
        return
    theirs = min(row["ms"]["median"] for row in rows if row["backend"] != "vivace")
    ours = min(row["ms"]["median"] for row in rows if row["backend"] == "vivace" and row["method"] != "none")
    assert claim["value"] == pytest.approx(theirs / ours) and len(rows) == 3 + 3 + 1


def test_time_and_work_of_a_large_network_are_of_the_same_plans(monkeypatch):
    rows = caching_large.dit_rows(True, "tiny")
    assert [row["method"] for row in rows] == ["none", "Fora", "TaylorSeer", "StepMask"]
    assert rows[0]["share"] == 1.0 and rows[0]["gap"] == 0.0 and rows[0]["drift"] == 0.0
    for row in rows[1:]:
        assert 0.4 < row["share"] < 0.8 and row["drift"] > 0
        assert row["gap"] == pytest.approx(row["time_ratio"] - row["share"])
    monkeypatch.setattr(caching_large, "_measured", lambda quick: tuple(rows))
    (claim,) = bench.run("caching", claim="caching.time_vs_compute_gap", quick=True)["claims"]
    assert claim["value"] == max(row["gap"] for row in rows[1:]) and claim["bound"] == 0.05


def test_the_work_of_a_unet_is_counted_where_it_is_done(monkeypatch):
    pytest.importorskip("diffusers", reason="the UNet is a class of diffusers")
    monkeypatch.setattr(caching_large, "SIZE", 16)
    sizes_ = {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "attention_head_dim": 2}
    rows = caching_large.unet_rows(True, sizes_ | {"layers_per_block": 1})
    assert [row["method"] for row in rows] == ["none", "DeepCache", "DeepCache", "FasterDiffusion"]
    assert rows[0]["share"] == 1.0 and all(0 < row["share"] < 1 and row["drift"] > 0 for row in rows[1:])


def test_wrong_names_are_refused():
    for wrong in ({"op": "gelu"}, {"claim": "caching.best"}):
        with pytest.raises(ArgumentError):
            bench.run("caching", **wrong)
