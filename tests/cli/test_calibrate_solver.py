"""`vivace calibrate --solver`: options are checked first, a stopped run goes on, the table is used by name."""

import numpy as np
import pytest
from tests.cli.test_cli import call, json_of

from vivace.engine.calibrate import methods, resume
from vivace.engine.calibrate.resume import Partial
from vivace.engine.calibrate.table import CalibrationTable
from vivace.errors import ArgumentError


class Toy:
    """A calibrator that may be stopped: the mean of the noise of each sample."""

    def __init__(self):
        self.made, self.stop, self.method = [], None, "toy"

    def calibrate_toy(self, problem, *, steps=4, samples=3, seed=0, wrong=False, progress=None, resume=None):
        about = {"method": "toy", "fingerprint": problem.fingerprint, "samples": samples, "guidance": problem.guidance}
        with Partial(resume, about) as partial:
            for j in range(samples):
                partial.once(f"mean.{j}", lambda j=j: self.mean(problem, j))
        means = np.stack([partial[f"mean.{j}"] for j in range(samples)])
        told = {"method": self.method, "steps": steps, "seed": seed, "prompts": list(problem.prompts)}
        return CalibrationTable("solver", "other" if wrong else problem.fingerprint, {"mean": means}, told)

    def mean(self, problem, j):
        if self.stop == j:
            raise KeyboardInterrupt
        self.made.append(j)
        return problem.noise([j]).mean().numpy()


@pytest.fixture
def toy(monkeypatch):
    made = Toy()
    monkeypatch.setattr(resume, "calibrate_toy", made.calibrate_toy, raising=False)
    monkeypatch.setitem(methods.METHODS, "toy", methods.Method("resume:calibrate_toy", "means"))
    monkeypatch.setitem(methods.METHODS, "toy_pass", methods.Method("resume:calibrate_toy", "means", "apply_toy"))
    return made


def test_a_stopped_calibration_goes_on(capsys, tmp_path, toy):
    out = tmp_path / "t.safetensors"
    command = ["calibrate", "emoji", "--solver", "toy", "--out", out, "--samples", 4, "--steps", 6, "--seed", 5]
    toy.stop = 2
    assert call(capsys, *command)[0] == 130
    assert not out.exists() and (tmp_path / "t.safetensors.partial").exists()
    toy.stop = None
    code, _, err = call(capsys, *command[:-4], "--seed", 5, "--samples", 5)
    assert code == 2 and "samples 4, now 5" in err and "remove it" in err
    data = json_of(capsys, *command)
    assert toy.made == [0, 1, 2, 3] and data["resumed"] and data["arrays"] == {"mean": [4]}
    assert data["options"] == {"steps": 6, "samples": 4, "seed": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    table = CalibrationTable.load(out)
    assert table.hash == data["hash"] and table.metadata["steps"] == 6 and len(table.metadata["prompts"]) > 1
    use = f"vivace plan new --model emoji --guidance 2 --solver toy --steps 6 --option table={out} --out plan.json"
    assert data["use"] == use


def test_the_table_says_how_it_is_used(capsys, tmp_path, toy):
    toy.method = "toy_pass"
    (tmp_path / "names.txt").write_text("pizza\nred heart\n")
    options = ["--prompts", tmp_path / "names.txt", "--guidance", 1]
    code, text, _ = call(capsys, "calibrate", "emoji", "--solver", "toy_pass", "--out", tmp_path / "t", *options)
    assert (
        code == 0 and f"--steps 4 --apply toy:table={tmp_path / 't'} --out plan.json" in text and "guidance 1" in text
    )


def test_mistakes_are_told_before_any_work(capsys, tmp_path, toy):
    out = tmp_path / "t"
    for options, message in (
        ([], "say what for: --solver METHOD"),
        (["--quantization", "--cache"], "say what for"),
        (["--solver", "toyy"], "did you mean 'toy'"),
        (["--solver", "toy", "--option", "colour=1"], "option: unknown 'colour'"),
        (["--solver", "toy", "--groups", 3], "--groups says nothing with --solver; drop it (--quantization reads it)"),
        (["--solver", "toy", "--recipe", "static"], "--recipe says nothing"),
        (["--quantization", "--option", "a=1"], "--option says nothing with --quantization; drop it (--solver reads"),
        (["--solver", "toy", "--prompts", tmp_path / "none.txt"], "cannot be read"),
    ):
        code, _, err = call(capsys, "calibrate", "emoji", "--out", out, *options)
        assert code == 2 and message in err, err
    code, _, err = call(capsys, "calibrate", "emoji", "--out", tmp_path / "no" / "t", "--solver", "toy")
    assert code == 2 and "cannot be written" in err
    assert toy.made == [] and sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_calibrator_that_returns_a_foreign_table_is_found_out(capsys, tmp_path, toy):
    toy.method = "another"
    code, _, err = call(capsys, "calibrate", "emoji", "--out", tmp_path / "t", "--solver", "toy")
    assert code == 2 and "measured for 'another'" in err and not (tmp_path / "t").exists()
    toy.method = "toy"
    code, _, err = call(
        capsys, "calibrate", "emoji", "--out", tmp_path / "t2", "--solver", "toy", "--option", "wrong=true"
    )
    assert code == 2 and "made for model other" in err


SMALL = {
    "dpm_solver_v3": ["--samples", 4, "--option", "nodes=3", "--option", "share=all"],
    "score_calibration": ["--samples", 2, "--steps", 3],
    "dc_solver": ["--samples", 2, "--steps", 4, "--option", "evaluations=8"],
    "iia": ["--samples", 2, "--steps", 4, "--option", "substeps=2"],
    "time_alignment": ["--samples", 2, "--steps", 4, "--option", "evaluations=8", "--option", "solver=dpmpp_2m"],
    "teleport": ["--samples", 6, "--option", "rank=2"],
    "linear_ag": ["--samples", 2, "--steps", 6],
}


def test_every_method_is_calibrated_in_small_here():
    assert SMALL.keys() == methods.METHODS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_what_the_command_says_makes_a_plan_of_the_table(name, capsys, tmp_path):
    out = tmp_path / "t.safetensors"
    data = json_of(capsys, "calibrate", "emoji", "--solver", name, "--out", out, "--seed", 3, *SMALL[name])
    assert not data["resumed"] and [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    words = data["use"].replace("plan.json", str(tmp_path / "plan.json")).split()[1:]
    made = json_of(capsys, *words)["plan"]
    assert made["nfe"] > 0 and (tmp_path / "plan.json").exists()
    assert json_of(capsys, "plan", "validate", tmp_path / "plan.json", "--model", "emoji")["valid"]


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_imports_and_has_options(name):
    options = methods.method_options(name)
    assert not set(methods.OWN) & options.keys()
    taken = methods.METHODS[name].taken
    if taken == "solver":
        from vivace.engine.solvers import solver_options

        assert "table" in solver_options(name)
    else:
        from vivace.engine import passes

        assert taken in passes.__all__
    with pytest.raises(ArgumentError, match="unknown 'colour'"):
        methods.check_options(name, {"colour": 1})


@pytest.mark.parametrize(
    ("method", "option", "value", "needed"),
    (
        ("dc_solver", "steps", 2.5, "a whole number or a list of whole numbers, got 2.5"),
        ("dc_solver", "guidances", 4, "a list of numbers or nothing, got 4"),
        ("time_alignment", "options", 3, "a mapping of names to values or nothing, got 3"),
        ("dc_solver", "points", "all", "a whole number, got 'all'"),
        ("dc_solver", "evaluations", True, "a whole number, got True"),
        ("iia", "timesteps", [1.0, "b"], "a list of numbers or nothing"),
        ("iia", "ridge", None, "a number, got None"),
    ),
)
def test_options_of_another_type_are_refused_before_any_work(method, option, value, needed):
    with pytest.raises(ArgumentError, match=f"calibrate {method}: {option} must be {needed}"):
        methods.check_options(method, {option: value})


def test_options_take_numbers_of_any_library():
    given = {"steps": np.int64(4), "timesteps": np.array([9.0, 4.0]), "bound": np.float32(0.5)}
    methods.check_options("dc_solver", given)


def test_passes_are_applied_by_name(capsys, tmp_path):
    plain = json_of(capsys, "plan", "new", "--steps", 4)["plan"]
    same = json_of(capsys, "plan", "new", "--steps", 4, "--guidance", 1, "--apply", "guidance:scale=2")["plan"]
    assert same["branch_evals"] == plain["branch_evals"] == 8
    for text, message in (
        ("guidanc:scale=2", "did you mean 'guidance'"),
        ("guidance:scal=2", "argument: unknown 'scal'"),
        ("guidance:2", "write key=value"),
    ):
        code, _, err = call(capsys, "plan", "new", "--steps", 4, "--guidance", 1, "--apply", text)
        assert code == 2 and message in err, err


def test_passes_are_told_what_they_need_and_lists_of_lists_are_read():
    from vivace.cli.caches import arguments_in

    told = arguments_in("--apply restart", "levels=[[3,1,0.5,2.0],[3,1,0.1,0.3]],s_noise=1.0", tables=())
    assert told == {"levels": [[3, 1, 0.5, 2.0], [3, 1, 0.1, 0.3]], "s_noise": 1.0}
