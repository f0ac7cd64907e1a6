"""The suite `solvers`: its claims are computed from its own rows, its table and plots are written."""

import json

import pytest

from vivace import bench
from vivace.bench import oracle, solvers
from vivace.errors import ArgumentError


def test_the_ratio_claim_is_computed_from_its_rows_and_holds(tmp_path):
    name = "solvers.gauss.unipc3_vs_ddim_error_ratio_at_20"
    data = bench.run("solvers", claim=name, quick=True, out=tmp_path / "results")
    (claim,) = data["claims"]
    ddim, unipc = data["rows"]
    assert claim["value"] == ddim["error"] / unipc["error"] and claim["holds"]
    assert ddim["nfe"] == unipc["nfe"] == 20
    assert json.loads((tmp_path / "results" / "solvers.json").read_text())["claims"] == data["claims"]
    assert name in (tmp_path / "results" / "solvers.txt").read_text()


def test_methods_are_given_no_more_than_their_evaluations():
    rows = solvers.oracle_rows(True, ("heun", "dpmpp_2s", "unipc 3 bh2"))
    assert all(row["nfe"] <= row["evaluations"] < row["nfe"] + 2 for row in rows)
    assert all(0.0 < row["error"] < 2.0 for row in rows)
    errors = {(r["on"], r["guidance"], r["solver"], r["evaluations"]): r["error"] for r in rows}
    for (on, guidance, name, count), error in errors.items():
        if count == 20:
            assert error < errors[on, guidance, name, 10]


def test_the_converged_states_do_not_depend_on_how_many_rows_made_them(monkeypatch):
    problem = solvers.oracles()[1]
    want = problem.solution(4.0)
    monkeypatch.setattr(solvers, "CONVERGED", 600)
    assert (problem.solution(4.0) - want).pow(2).mean().sqrt() < 1e-5  # the best method is at 3e-3 with 20 evaluations


def test_plots_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "ORDERS", oracle.ORDERS[:1])
    data = {"rows": solvers.oracle_rows(True, ("ddim", "unipc 3 bh2"))}
    monkeypatch.setattr(solvers, "METHODS", {name: solvers.METHODS[name] for name in ("ddim", "unipc 3 bh2")})
    for path in solvers.plot(data, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_wrong_names_are_refused(tmp_path):
    for wrong in ({"op": "solver_step"}, {"claim": "solvers.best"}, {"out": tmp_path / "file"}):
        (tmp_path / "file").touch()
        with pytest.raises(ArgumentError):
            bench.run("solvers", **wrong)
