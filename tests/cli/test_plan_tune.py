"""`vivace plan tune`: the plan is written, a stopped run goes on, options are checked first."""

import pytest
from tests.cli.test_cli import call, json_of

from vivace.engine import search
from vivace.engine.plan import Plan

pytest.importorskip("optuna")
BUDGET = ["--samples", 2, "--trials", 3, "--rounds", 1, "--steps", 3]


@pytest.fixture(autouse=True)
def short_references(monkeypatch):
    """Latents of a dozen evaluations stand for converged ones."""
    monkeypatch.setattr(search, "converged", lambda problem, some: problem.run(problem.plan("unipc", 12), some))


def test_a_plan_is_searched_written_and_gone_on_with(capsys, tmp_path):
    out = tmp_path / "plan.json"
    command = ["plan", "tune", "--out", out, *BUDGET, "--guidance", 4]
    data = json_of(capsys, *command)
    plan = Plan.load(out)
    assert data["plan"]["hash"] == plan.hash and plan.nfe == 3 and plan.branch_evals == 6
    assert plan.recipe.arguments.to_dict()["solver"] == "usf" and not data["resumed"]
    assert 0.0 < data["judged"] <= data["history"][0][1] and data["even"] > 0.0
    code, text, _ = call(capsys, *command)
    assert code == 0 and "went on" in text and "order 2 on the even grid" in text and Plan.load(out).hash == plan.hash
    code, _, err = call(capsys, *command, "--seed", 3)
    assert code == 2 and "holds work of another calibration" in err


def test_timesteps_of_another_solver(capsys, tmp_path):
    out = tmp_path / "plan.json"
    data = json_of(
        capsys,
        "plan",
        "tune",
        "--solver",
        "dpmpp_2m",
        "--option",
        "variant=heun",
        "--guidance",
        1,
        "--out",
        out,
        *BUDGET,
    )
    known = Plan.load(out).recipe.arguments.to_dict()
    assert known["solver"] == "dpmpp_2m" and known["variant"] == "heun" and len(known["timesteps"]) == 3
    assert data["guidance"] == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--option", "orders=2"], "option of usf: unknown 'orders'"),
        (["--solver", "unpic"], "did you mean 'unipc'"),
        (["--solver", "ddpm"], "search deterministic solvers"),
        (["--prompts", "none.txt"], "cannot be read"),
        (["--steps", "0"], "steps"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, wrong, message, monkeypatch):
    monkeypatch.setattr(search, "converged", lambda problem, some: problem.noise(some))
    code, _, err = call(capsys, "plan", "tune", "--out", tmp_path / "plan.json", *wrong)
    assert code == 2 and message in err and not (tmp_path / "plan.json").exists()
