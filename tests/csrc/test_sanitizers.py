"""The tests in csrc/tests, built without Python or torch under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build" / "sanitize"
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")


def lacking(reason):
    """No compiler, CMake or sanitizer runtime: an error where the extension is required (CI), else a skip."""
    if os.environ.get("VIVACE_REQUIRE_EXT") == "1":
        pytest.fail(f"{reason}; install what is missing or unset VIVACE_REQUIRE_EXT")
    pytest.skip(f"{reason}; install what is missing")  # never in CI, which sets the variable


def tool(name):
    """A build tool beside this Python or on the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def run(*command):
    env = {**os.environ, "CCACHE_DISABLE": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)


@cache
def build():
    """Path of the test binary, or the reason why there is none."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        return None, "cmake is not installed"
    options = ["-DVIVACE_PYTHON=OFF", "-DVIVACE_SANITIZE=address,undefined", "-DCMAKE_CXX_COMPILER_LAUNCHER="]
    if ninja is not None:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    done = run(cmake, "-S", str(ROOT), "-B", str(TREE), *options)
    if done.returncode:
        return None, f"csrc_tests cannot be configured: {done.stderr.strip()}"
    done = run(cmake, "--build", str(TREE), "--target", "csrc_tests", "--parallel", str(os.cpu_count() or 1))
    assert done.returncode == 0, done.stdout + done.stderr
    return TREE / "csrc_tests", ""


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_hold_under_the_sanitizers(isa):
    binary, reason = build()
    if binary is None:
        lacking(reason)
    env = {**os.environ, "VIVACE_CPU_ISA": isa, "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(binary)], env=env, capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(f"this processor lacks {isa}; run on one that has it")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"instruction set: {isa}" in done.stdout and " 0 failures" in done.stdout
