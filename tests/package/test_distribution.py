"""The source archive builds, the wheel built from it holds real files, and both work in a clean environment."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import sys, vivace
from vivace import _C
assert "torch" not in sys.modules
plan = vivace.make_plan(vivace.NoiseSchedule.flow(), steps=4, prediction="flow")
assert vivace.Plan.load(plan.save("plan.json") or "plan.json") == plan
from vivace.models.load import open_model
assert len(open_model("emoji").fingerprint) == 64
print(vivace.__file__)
"""


def shell(*command, cwd=None, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(sdist, wheel), the wheel built from the unpacked sdist, in a copy of the tracked files."""
    tree = tmp_path_factory.mktemp("tree")
    files = shell("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, files):
        source, target = ROOT / name, tree / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(source)) if source.is_symlink() else target.write_bytes(source.read_bytes())
    shell(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", cwd=tree, VIVACE_REQUIRE_EXT="1")
    (sdist,), (wheel,) = (tree / "dist").glob("*.tar.gz"), (tree / "dist").glob("*.whl")
    return sdist, wheel


def test_archives_hold_sources_weights_and_the_extension(archives):
    sdist, wheel = archives
    with tarfile.open(sdist) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
        links = [member.name for member in tar.getmembers() if member.issym()]
    assert {"CMakeLists.txt", "csrc/ops/solver_step.inl", "pyproject.toml", "LICENSE"} <= names
    assert not links
    packed = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "vivace/engine/plan.py",
        "vivace/kernels/solver_step/triton_impl.py",
        "vivace/bench/harness.py",
        "vivace/py.typed",
        "vivace/__init__.pyi",
        "vivace/models/weights/emoji/transformer/diffusion_pytorch_model.safetensors",
        "vivace/models/weights/emoji/README.md",
    ):
        assert name in packed, name
    assert any(name.startswith("vivace/_C.") and name.endswith(".so") for name in packed)


def test_the_wheel_works_in_a_clean_environment_without_torch(archives, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    shell(python, "-m", "pip", "install", "-q", archives[1])
    assert str(tmp_path / "env") in shell(python, "-c", CHECK, cwd=tmp_path)
    shell(tmp_path / "env" / "bin" / "vivace", "plan", "show", "plan.json", cwd=tmp_path)
    assert "not installed" in shell(tmp_path / "env" / "bin" / "vivace", "doctor", cwd=tmp_path)
    # packs run there with ONNX Runtime beside what the package needs
    shell(sys.executable, "-m", "vivace", "export", "onnx", "emoji", "--steps", "4", "--out", tmp_path / "pack")
    shell(python, "-m", "pip", "install", "-q", f"{archives[1]}[runtime]")
    vivace = tmp_path / "env" / "bin" / "vivace"
    assert json.loads(shell(vivace, "verify", "pack", "--json", cwd=tmp_path))["holds"]
    shell(vivace, "run", "pack", "pizza", "--out", "pizza.png", cwd=tmp_path)
    assert (tmp_path / "pizza.png").read_bytes()[:4] == b"\x89PNG"
    absent = shell(python, "-m", "pip", "list")
    assert not any(name in absent.split() for name in ("torch", "onnx", "diffusers"))
