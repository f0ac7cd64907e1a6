"""The claim of searched plans is computed from its rows; nothing that judges was searched on."""

import math

import pytest

from vivace.bench import solvers, solvers_search
from vivace.bench.harness import Claim

BASE = {"solver": "dpmpp_2m", "nfe": 20, "error": 0.05, "psnr": 32.0}
GRID = {"solver": "dpmpp_2m logsnr", "nfe": 20, "error": 0.02, "psnr": 40.0}


def usf(nfe, error, psnr):
    return {"solver": "usf", "nfe": nfe, "error": error, "psnr": psnr}


def test_names_and_noise_of_the_search_and_of_the_judgement_are_apart():
    names = solvers_search.names()
    assert {len(part) for part in names.values()} == {solvers_search.NAMES}
    assert not set(names["tune"]) & set(names["judge"])
    assert len(set(solvers_search.SEEDS.values())) == 2
    one, two = (solvers_search.problem(role, 4.0).noise([0]) for role in ("tune", "judge"))
    assert not (one == two).any()


@pytest.mark.parametrize(
    ("found", "count"),
    [
        ([usf(7, 0.06, 33.0), usf(8, 0.05, 32.0), usf(10, 0.03, 35.0)], 8),
        ([usf(7, 0.04, 31.9), usf(8, 0.06, 32.5), usf(10, 0.03, 35.0)], 10),
        ([usf(8, 0.06, 33.0)], 20),
    ],
)
def test_the_claim_is_the_shortest_plan_that_is_as_good_in_error_and_in_decibels(monkeypatch, found, count):
    monkeypatch.setattr(solvers_search, "rows", lambda guidance, quick: [BASE, GRID, *found])
    rows, claim = solvers_search.nfe_claim(True)
    assert rows == [BASE, GRID, *found] and claim.value == count and claim.holds is (count <= 12)
    assert "dpmpp_2m 20: 0.0500, 32.00 dB" in claim.how
    _, full = solvers_search.nfe_claim(False)
    assert full.value == count and f"guidance 7.5: {count}" in full.how


def test_without_the_library_and_without_plans_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(solvers_search, "find_spec", lambda name: None)
    monkeypatch.setattr(solvers_search, "KEPT", tmp_path)
    rows, claim = solvers_search.nfe_claim(True)
    assert rows == [] and claim.value is None and claim.holds is None and "vivace[search]" in claim.how


def test_the_suite_has_the_claim():
    measure = solvers.CLAIMS[solvers_search.NAME]
    assert measure is solvers_search.nfe_claim
    assert isinstance(Claim(solvers_search.NAME, "<=", solvers_search.BOUND, ""), Claim)
    assert math.isfinite(solvers_search.BOUND)


def test_every_plan_that_is_kept_is_of_a_search_that_is_asked_for():
    asked = [(guidance, count, "usf") for guidance, counts in solvers_search.SEARCHED.items() for count in counts]
    asked.append((solvers_search.MAIN, solvers_search.TIMED, "dpmpp_2m"))
    files = {solvers_search.kept(solvers_search.searched(*each)): each for each in asked}
    there = set(solvers_search.KEPT.glob("*.json"))
    assert there <= set(files)
    for file in there:
        plan, (guidance, count, solver) = solvers_search.plan_of(*files[file]), files[file]
        assert plan.nfe == count and plan.recipe.arguments.to_dict()["solver"] == solver
        assert plan.branch_evals == (count if guidance == 1.0 else 2 * count)


def test_every_artefact_is_named_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(solvers_search, "KEPT", tmp_path)
    paths = [artefact.path for artefact in solvers_search.artefacts()]
    assert len(set(paths)) == len(paths)
