"""`import vivace`, plans and files work where torch is absent (here: blocked in a fresh interpreter)."""

import subprocess
import sys

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "diffusers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def run(code, *args):
    return subprocess.run([sys.executable, "-c", BLOCK + code, *args], capture_output=True, text=True)


def test_import_needs_no_torch():
    result = run("import vivace; assert 'torch' not in sys.modules; print(vivace.__version__)")
    assert result.returncode == 0, result.stderr


def test_plans_are_made_guided_saved_and_printed_without_torch(tmp_path):
    code = """
import vivace
schedule = vivace.NoiseSchedule.flow(shift=3.0)
plan = vivace.passes.apply_guidance(vivace.make_plan(schedule, solver="unipc", steps=5, prediction="flow"), scale=3.0)
plan.save(sys.argv[1])
assert vivace.Plan.load(sys.argv[1]).hash == plan.hash
print(plan)
"""
    result = run(code, str(tmp_path / "plan.json"))
    assert result.returncode == 0, result.stderr
    assert "cond+unc" in result.stdout


def test_generate_says_that_torch_is_missing(tmp_path):
    out = tmp_path / "x.png"
    code = "from vivace.cli import run; sys.exit(run(['generate', 'cat', '--out', sys.argv[1]]))"
    result = run(code, str(out))
    assert result.returncode == 2
    assert "torch" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_doctor_reports_what_is_absent():
    result = run("from vivace.cli import run; sys.exit(run(['doctor']))")
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout and "not installed" in result.stdout
