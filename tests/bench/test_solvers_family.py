"""The family of solvers in one table: cases, their two sets of samples, tables kept, published orders beside."""

import math
from dataclasses import replace

import pytest
import torch
from tests.cli.test_cli import call

from vivace import bench
from vivace.bench import family_cases, published, solvers_family
from vivace.bench.family_cases import CASES, GMM, GUIDANCE, Setup
from vivace.bench.solvers_search import SEEDS
from vivace.errors import ArgumentError

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(family_cases, "CONVERGED", 120)
    family_cases._converged.cache_clear()
    yield Setup("gmm", GMM.places, (8, 24, 12), (6, 3))
    family_cases._converged.cache_clear()


def test_every_case_is_in_this_release_and_has_a_name_of_its_own():
    assert [case.name for case in CASES if not case.ready] == []
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("case", [c for c in CASES if c.tuned is None and c.searched is None], ids=lambda c: c.name)
def test_a_case_uses_most_of_its_evaluations_and_no_more(case):
    for guidance, count in ((1.0, 6), (4.0, 12)):
        nfe = case.within(GMM, guidance, count).nfe
        assert count - 3 < nfe <= count, nfe
    assert case.within(GMM, 1.0, 12).branch_evals == case.within(GMM, 1.0, 12).nfe


def test_the_two_sets_share_neither_names_nor_noise():
    tune, judge = (family_cases.EMOJI.problem(role, 4.0) for role in ("tune", "judge"))
    assert not set(tune.prompts) & set(judge.prompts) and len(set(judge.prompts)) >= family_cases.EMOJI.counts[1]
    for setup in (family_cases.EMOJI, GMM):
        one, two = (setup.problem(role, 4.0).noise(range(4)) for role in ("tune", "judge"))
        assert not torch.isclose(one, two).any()
        assert setup.problem("tune", 4.0).seed != setup.problem("judge", 4.0).seed


def test_plans_that_were_not_searched_are_told():
    with pytest.raises(ArgumentError, match="there are plans for .* at guidance 4"):
        family_cases.EMOJI.searched(BY_NAME["usf"], 4.0, 20)


def test_rows_have_errors_that_fall_with_evaluations(small):
    for name in ("ddim", "dpmpp_2m", "unipc 2 + DualFast", "dpmpp_2m + AFS"):
        rows = [solvers_family.measure(small, BY_NAME[name], 1.0, count, False) for count in (5, 20)]
        few, many = (row["error"] for row in rows)
        assert 0.0 < many < few < 1.0 and rows[1]["psnr"] > rows[0]["psnr"] and rows[0]["frechet"] > 0.0
    noisy = solvers_family.measure(small, BY_NAME["dpmpp_2m + Restart"], 1.0, 10, False)
    assert noisy["error"] is None and noisy["nfe"] == 10 and noisy["frechet"] > 0.0


def test_a_table_is_made_once_of_the_tuning_set(small, monkeypatch):
    case = BY_NAME["dc_solver unipc 2"]
    seen = []
    made = family_cases.calibrate
    monkeypatch.setattr(family_cases, "calibrate", lambda *a, **k: seen.append(a[1].seed) or made(*a, **k))
    rows = [solvers_family.measure(small, case, 1.0, count, False) for count in (5, 10)]
    assert seen == [SEEDS["tune"]] and all(row["nfe"] == row["evaluations"] for row in rows)
    table = small.table(case, 1.0, 5)
    assert table.metadata["seed"] == SEEDS["tune"] and table.metadata["method"] == "dc_solver"
    other = replace(small, counts=(9, 24, 12))
    assert other.artefact(case, 1.0, 5).path != small.artefact(case, 1.0, 5).path


def test_what_fails_is_a_row_with_its_reason(small):
    case = replace(BY_NAME["dc_solver unipc 2"], options={"order": 9})
    row = solvers_family.measure(small, case, 1.0, 5, False)
    assert row["error"] is None and "order" in row["reason"]
    text = "\n".join(solvers_family.text_of([row], small, False))
    assert "dc_solver unipc 2: " in text


def test_the_converged_states_do_not_depend_on_how_many_rows_made_them(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    setup, found = Setup("gmm", GMM.places, (8, 64, 8)), []
    for count in (400, 600):
        monkeypatch.setattr(family_cases, "CONVERGED", count)
        family_cases._converged.cache_clear()
        found.append({guidance: setup.converged(guidance, range(64)) for guidance in GUIDANCE})
    family_cases._converged.cache_clear()
    for guidance in GUIDANCE:
        one, two = (states[guidance] for states in found)
        assert ((one - two).pow(2).mean() / two.pow(2).mean()).sqrt() < 1e-3  # the best row of the table is at 4e-3


def test_the_table_has_a_block_per_guidance_and_metric(small, monkeypatch):
    monkeypatch.setitem(family_cases.SETUPS, "gmm", small)
    report = solvers_family.run(None, "gmm", True, ("ddim", "dpmpp_2m"))
    text = "\n".join(report["table"])
    for guidance in GUIDANCE:
        for _, title in solvers_family.METRICS:
            assert f"gmm, guidance {guidance:g}: {title}" in text
    assert len(report["rows"]) == len(GUIDANCE) * (1 + 2 * 3) and report["claims"] == []
    assert "judged on 12 others" in text and "pairs the other way round" in text
    assert text in bench.render(report)


def test_inversions_leave_out_pairs_that_are_close():
    ours = {"a": 1.0, "b": 2.0, "c": 2.01, "d": 4.0}
    theirs = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 5.0, "e": 0.1}
    turned, ranked = published.inversions(ours, theirs)
    assert turned == [("b", "a"), ("c", "a")] and ranked == 5
    assert published.order_of(ours) == ["a", "b", "c", "d"]


def test_published_methods_are_cases():
    for table in published.TABLES:
        assert table.guidance in GUIDANCE and set(table.values) <= set(family_cases.EVALUATIONS)
        for values in table.values.values():
            assert values.keys() <= BY_NAME.keys() and all(math.isfinite(value) for value in values.values())


def test_wrong_names_are_refused(capsys):
    for options in ({"model": "sd3"}, {"oracle": "gauss"}, {"model": "emoji", "claim": "solvers.order_worst_gap"}):
        with pytest.raises(ArgumentError, match="bench"):
            bench.run("solvers", **options)
    with pytest.raises(ArgumentError, match="of the suite solvers"):
        bench.run("gate", model="emoji")
    code, _, err = call(capsys, "bench", "solvers", "--oracle", "gauss")
    assert code == 2 and "--oracle 'gauss' is not here; use gmm" in err
