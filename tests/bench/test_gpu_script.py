"""bench/gpu.sh away from a GPU: its steps, and what becomes of one that fails, hangs or has no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vivace.bench import gpu_steps

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
STUB = """#!/bin/sh
case "$*" in
    *gpu_steps.py*) exec {python} "$@" ;;
    *"import xdist"*) exit 1 ;;
    *{fails}*) echo "this went wrong"; exit 3 ;;
    *{hangs}*) sleep 60 ;;
esac
echo "$PYTHONPATH"
"""


def run(tmp_path, fails="nothing-fails", hangs="nothing-hangs", **environment):
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, fails=fails, hangs=hangs))
    stub.chmod(0o755)
    kept = {
        name: value for name, value in os.environ.items() if name not in ("DRY", "TRAIN", "LIMIT", "ONLY", "WHEELS")
    }
    return subprocess.run(
        [SCRIPT, tmp_path / "out", stub],
        cwd=tmp_path,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def summary(tmp_path):
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    return data, {step["name"]: step for step in data["steps"]}


def test_dry_prints_every_step_and_runs_none(tmp_path):
    told = run(tmp_path, DRY="1")
    assert told.returncode == 0, told.stderr
    names = [line.split()[0] for line in told.stdout.splitlines()]
    assert names[:4] == ["wheels", "build", "doctor", "tests"]
    assert {"tune", "products", "kernels", "denoiser", "large", "e2e"} < set(names)
    assert "train" in names and "left out: TRAIN=1 was not given" in told.stdout
    assert "left out" not in run(tmp_path, DRY="1", TRAIN="1").stdout.splitlines()[-1]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_only_the_steps_that_are_asked_for_run(tmp_path):
    assert run(tmp_path, ONLY="build e2e").returncode == 0
    _, steps = summary(tmp_path)
    assert {name for name, step in steps.items() if step["status"] == "ok"} == {"build", "e2e"}
    assert steps["tune"]["reason"] == "ONLY names others"


def test_the_steps_fit_nine_minutes(tmp_path):
    assert gpu_steps.TOTAL < 540
    assert all(0 < step.limit < gpu_steps.TOTAL for step in gpu_steps.steps(tmp_path, "python3", tmp_path, True))


def test_all_steps_run_and_are_recorded(tmp_path):
    told = run(tmp_path)
    assert told.returncode == 0, told.stdout + told.stderr
    data, steps = summary(tmp_path)
    assert {step["status"] for name, step in steps.items() if name not in ("wheels", "train")} == {"ok"}
    assert steps["wheels"]["status"] == steps["train"]["status"] == "left out"
    assert data["seconds"] < data["limit"] and all(step["seconds"] >= 0.0 for step in steps.values())
    path = (tmp_path / "out" / "doctor.log").read_text().strip().split(os.pathsep)
    assert path[:2] == [str(tmp_path / "out" / "site"), str(ROOT / "python")]


def test_a_failing_step_is_recorded_and_the_rest_goes_on(tmp_path):
    told = run(tmp_path, fails="vivace.bench.tune")
    _, steps = summary(tmp_path)
    assert told.returncode == 1 and "this went wrong" in told.stdout
    assert steps["tune"]["status"] == "failed" and steps["tune"]["code"] == 3
    assert steps["tune"]["tail"] == ["this went wrong"]
    assert steps["kernels"]["status"] == "ok"


def test_nothing_that_needs_the_build_runs_without_it(tmp_path):
    assert run(tmp_path, fails="build_ext").returncode == 1
    _, steps = summary(tmp_path)
    assert steps["tests"]["status"] == "left out" and steps["tests"]["reason"] == "build did not pass"


def test_a_step_that_hangs_is_ended_and_the_limit_of_all_holds(tmp_path):
    assert run(tmp_path, hangs="doctor", LIMIT="7").returncode == 1
    data, steps = summary(tmp_path)
    assert steps["doctor"]["status"] == "timed out" and data["seconds"] < 20
    assert steps["tests"]["status"] == "left out" and "left of all" in steps["tests"]["reason"]


def test_wheels_of_a_folder_are_installed_beside_the_results(tmp_path):
    wheels = tmp_path / "carried"
    wheels.mkdir()
    (wheels / "peer-1.0-py3-none-any.whl").write_bytes(b"")
    assert run(tmp_path, WHEELS=str(wheels)).returncode == 0
    _, steps = summary(tmp_path)
    assert steps["wheels"]["status"] == "ok"
    command = steps["wheels"]["command"]
    assert {"--no-deps", "--no-index", str(wheels / "peer-1.0-py3-none-any.whl")} <= set(command)


def test_the_script_is_sound_shell_and_asks_for_its_folder():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0
    told = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert told.returncode != 0 and "usage: bench/gpu.sh OUTDIR" in told.stderr
