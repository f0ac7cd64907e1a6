"""The suite `tokens` on tiny networks: shares, rivals, claims. No timing is asserted here."""

import pytest
import torch

from vivace import bench
from vivace.bench import caching, caching_cases, caching_large, tokens, tokens_cases, tokens_large
from vivace.bench.caching_cases import Base
from vivace.bench.e2e_cases import Case
from vivace.bench.models import MODELS, BenchModel, sizes
from vivace.bench.tokens import TokenTable
from vivace.bench.tokens_cases import ALL, RANDOM, Setting, active_share, settings
from vivace.errors import ArgumentError, BackendError

TINY = BenchModel("tiny", sizes(2, 2, 16, size=8, classes=1000))
CASE = Case(TINY, (207, 980), 2.0)
BASE = Base("unipc", 6)


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The suite on a network of two layers and sixteen tokens, few steps."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setitem(MODELS, "tiny", TINY)
    patch.setattr(tokens, "SECONDS", {True: 0.0, False: 0.0})
    patch.setattr(tokens, "emoji_case", lambda: CASE)
    patch.setattr(tokens, "UNIPC", BASE)
    patch.setattr(caching, "LINE", (2, 4))
    patch.setattr(tokens_cases, "FIRST", 1)
    for module in (tokens, tokens_large):
        patch.setattr(module, "KEEPS", (0.5, 0.25))
    for name in ("STEPS", "ROUNDS"):
        patch.setattr(tokens_large, name, {True: 4 if name == "STEPS" else 1})
    patch.setattr(tokens_large, "LATENTS", {16: (4, 8, 8), 32: (4, 8, 16)})
    patch.setattr(tokens_large, "LEAST", 4)
    yield
    patch.undo()
    caching_cases.session.cache_clear()


@pytest.fixture(scope="module")
def table():
    return TokenTable(CASE)


def test_all_tokens_is_the_plain_plan(table):
    row = table.setting(BASE, ALL)
    assert row.columns["share"] == 1.0 and row.columns["psnr_uncached"] == 200.0
    assert torch.equal(row.drawn.latents, table.plain(BASE).latents)


def test_a_row_says_what_is_active(table):
    row = table.setting(BASE, Setting(0.25, "deviation"))
    # six evaluations: the first and the last have all tokens, four have a quarter
    assert row.columns["share"] == pytest.approx((2 + 4 * 0.25) / 6)
    assert row.columns["method"] == "deviation" and row.columns["setting"] == "keep 0.25"
    assert 0 < row.columns["psnr_uncached"] < 200


def test_text_tokens_are_always_active():
    plan = tokens_cases.planned(CASE, BASE, Setting(0.25, "deviation")).bind(TINY.opened.spec)
    assert active_share(plan, text=8) == pytest.approx((2 + 4 * (4 + 8) / (16 + 8)) / 6)


def test_every_selector_stands_beside_random_at_every_share():
    found = settings((0.5, 0.25))
    assert {s.selector for s in found if s.keep == 0.5} == {s.selector for s in found if s.keep == 0.25}
    assert RANDOM in {s.selector for s in found} and len(found) == len(set(map(str, found)))


def test_rows_are_timed_together_and_stand_beside_fewer_steps(table):
    rows = [table.setting(BASE, setting) for setting in (ALL, Setting(0.5, "norm"))]
    lines = table.time(rows, (BASE,), 0.0)
    for row in rows:
        gains = table.beside(row, lines[BASE])
        assert row.columns["fewer_best_psnr"] >= row.columns["fewer_psnr"]
        assert gains.mean() == pytest.approx(row.columns["psnr"] - row.columns["fewer_best_psnr"])


def test_the_claim_on_selectors_is_the_least_gain_over_random():
    data = bench.run("tokens", claim="tokens.selector_vs_random_db", quick=True)
    (claim,), rows = data["claims"], data["rows"]
    gains = []
    for keep in (0.5, 0.25):
        mine = {(row["method"], row["setting"]): row["psnr_uncached"] for row in rows if row["keep"] == keep}
        random = next(db for (method, told), db in mine.items() if method == RANDOM and "starvation 0" in told)
        gains.append(max(db for (method, _), db in mine.items() if method != RANDOM) - random)
    assert claim["value"] == pytest.approx(min(gains)) and claim["n"] == 2


def test_time_and_active_share_of_a_large_network_are_of_the_same_plans(monkeypatch):
    rows = [row for tokens_ in (16, 32) for row in tokens_large.dit_rows(True, tokens_, "tiny")]
    assert [row["keep"] for row in rows] == [1.0, 0.5, 0.25] * 2
    assert [row["active"] for row in rows] == [16, 8, 4, 32, 16, 8]
    for row in rows:
        assert row["share"] == pytest.approx((1 + 3 * row["keep"]) / 4)
        assert (row["drift"] > 0) == (row["keep"] < 1) and row["gap"] == pytest.approx(row["time_ratio"] - row["share"])
    monkeypatch.setattr(tokens_large, "_measured", lambda quick: tuple(rows))
    monkeypatch.setattr(tokens_large, "LEAST", 8)
    (claim,) = bench.run("tokens", claim="tokens.time_vs_ideal_gap", quick=True)["claims"]
    assert claim["value"] == max(row["gap"] for row in rows if row["keep"] < 1 and row["active"] >= 8)


def test_the_large_text_model_runs(monkeypatch):
    pytest.importorskip("diffusers", reason="the network is a class of diffusers")
    monkeypatch.setattr(tokens_large, "TEXT", 7)
    tiny_sizes = {
        "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
        "in_channels": 4, "out_channels": 4,
    }  # fmt: skip
    rows = tokens_large.sd3_rows(True, tiny_sizes)
    assert [row["share"] for row in rows] == pytest.approx(
        [1.0, *((1 + 3 * (16 * k + 7) / 23) / 4 for k in (0.5, 0.25))]
    )
    assert rows[0]["drift"] == 0.0 and all(row["drift"] > 0 for row in rows[1:])


def test_an_edit_is_timed_where_the_rest_of_the_picture_kept_its_bits():
    rows, claim = tokens_large.edit_claim(True, "tiny", steps=4)
    assert [row["share"] for row in rows] == pytest.approx([1.0, (1 + 3 * 0.25) / 4])
    assert claim.value == pytest.approx(rows[0]["ms"]["median"] / rows[1]["ms"]["median"])


def test_an_edit_that_changes_the_rest_is_refused(monkeypatch):
    class Changed(caching_large.Loop):
        def __call__(self):
            super().__call__()
            self.latents = self.latents + 1e-3

    monkeypatch.setattr(tokens_large, "Loop", Changed)
    with pytest.raises(BackendError, match="outside of the mask"):
        tokens_large.edit_claim(True, "tiny", steps=3)


def test_wrong_names_are_refused():
    for wrong in ({"op": "gelu"}, {"claim": "tokens.best"}):
        with pytest.raises(ArgumentError):
            bench.run("tokens", **wrong)
