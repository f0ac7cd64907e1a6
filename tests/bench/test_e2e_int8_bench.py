"""INT8 pictures in the suite `e2e`: plans, rows and the claim, on few pictures. No timing is asserted here."""

import pytest
import torch

import vivace
from vivace import bench
from vivace.bench import e2e_int8
from vivace.bench.artefacts import Artefact
from vivace.engine.forecast import noise_gain
from vivace.models.quantized.plain import round_layers


@pytest.fixture(autouse=True)
def few(monkeypatch, tmp_path):
    """Weights rounded to nearest, three pictures of four steps, and as many as features can be judged by."""
    weights = Artefact("plain", {"for": "tests"}, lambda place: round_layers(vivace.load("emoji")).save(place / "w"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(e2e_int8, "WEIGHTS", "w.safetensors")
    monkeypatch.setattr(e2e_int8, "int8_weights", lambda model: weights)
    monkeypatch.setattr(e2e_int8, "STEPS", 4)
    monkeypatch.setattr(e2e_int8, "PICTURES", {True: 3, False: 3})
    e2e_int8.measured.cache_clear()


def test_shares_cover_every_evaluation_once():
    plan = e2e_int8.plan_of(vivace.load("emoji"))
    shares = [e2e_int8.share_of(plan, k) for k in range(e2e_int8.SHARES)]
    for i in range(plan.nfe):
        assert sum(bool(share.steps[i].variant.rules) for share in shares) == 1


def test_the_claim_is_the_row_of_int8_everywhere():
    data = bench.run("e2e", claim="e2e.emoji_int8_psnr_db", quick=True)
    (claim,), pictures = data["claims"], [row for row in data["rows"] if row["op"] == "int8 pictures"]
    assert claim["value"] == next(row["psnr"] for row in pictures if row["way"] == "int8")
    assert len(pictures) == 3 + e2e_int8.SHARES and claim["holds"] == (claim["value"] >= e2e_int8.TARGET)
    noise = [row for row in data["rows"] if row["op"] == "int8 noise"]
    assert [row["independent"] for row in noise] == [noise_gain(1, k) for k in e2e_int8.AHEAD]
    assert all(row["gain"] > 0 and -1 <= row["correlation"] <= 1 for row in noise)


def test_the_frechet_claim_is_of_the_same_pictures():
    (claim,) = bench.run("e2e", claim="e2e.emoji_int8_frechet_change", quick=True)["claims"]
    assert claim["value"] >= 0 and claim["n"] == 3 and claim["holds"] == (claim["value"] <= e2e_int8.CLOSE)


def test_pictures_do_not_depend_on_how_many_are_in_flight(monkeypatch):
    pipe = vivace.load("emoji")
    plan = e2e_int8.plan_of(pipe)
    session = pipe.compile(plan, backend="cpu")
    whole = e2e_int8.draw(session, plan, 3)
    monkeypatch.setattr(e2e_int8, "TOGETHER", 1)
    assert torch.equal(torch.as_tensor(whole), torch.as_tensor(e2e_int8.draw(session, plan, 3)))
