"""Every instruction set gives the bits of the definition, whatever the threads, the alignment, the way of storing."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

_C = pytest.importorskip("vivace._C", reason="vivace._C is not built (make build)")
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")


def run_python(*command: str, isa: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with VIVACE_CPU_ISA set: the choice is made once a process."""
    env = {**os.environ, "VIVACE_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=300)


@cache
def digests(isa: str) -> dict[str, list[str]]:
    if isa not in _C.available_isas():
        pytest.skip(f"this processor lacks {isa}; run on one that has it")
    done = run_python(str(Path(__file__).with_name("isa_worker.py")), isa=isa)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["isa"] == isa
    return dict(report["digests"])


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_have_the_bits_of_the_definition(isa: str) -> None:
    wrong = [name for name, found in digests(isa).items() if len(set(found)) != 1]
    assert not wrong


@pytest.mark.parametrize("isa", ISAS[1:])
def test_instruction_sets_agree_bit_for_bit(isa: str) -> None:
    assert digests(isa) == digests("scalar")


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx1024"])
def test_an_unknown_instruction_set_is_a_clear_error(isa: str) -> None:
    done = run_python("-c", "import vivace._C as c\ntry: c.isa()\nexcept ValueError as e: print(e)", isa=isa)
    assert done.returncode == 0, done.stderr
    assert f"VIVACE_CPU_ISA={isa}: no such instruction set; use one of scalar" in done.stdout


def test_an_empty_variable_means_the_widest() -> None:
    done = run_python("-c", "import vivace._C as c; print(c.isa())", isa="")
    assert done.stdout.strip() == _C.available_isas()[-1]
