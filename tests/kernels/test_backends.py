"""Which backend runs, why, and that one asked for by name runs or raises."""

import subprocess
import sys

import pytest
import torch

from vivace.errors import ArgumentError, BackendError
from vivace.kernels import backends, choose, ops, spec
from vivace.kernels.philox_normal import philox_normal

STEP = next(op for op in ops() if op.name == "solver_step")
HAVE = dict.fromkeys(spec.BACKENDS)  # nothing is missing


@pytest.fixture
def machine(monkeypatch):
    """Pretends that backends lack what the mapping says (None: nothing) and that every module takes every call."""
    monkeypatch.delenv("VIVACE_BACKEND", raising=False)

    def pretend(lacks):
        monkeypatch.setattr(spec, "missing", lacks.get)
        monkeypatch.setattr(spec, "import_module", lambda name: Module(name))
        spec._decide.cache_clear()

    yield pretend
    spec._decide.cache_clear()


class Module:
    """Stands for an implementation: its device and float32 only."""

    def __init__(self, name):
        self.device = "cuda" if "triton" in name else "cpu"

    def why_not(self, device, dtype):
        return None if (device, dtype) == (self.device, "float32") else f"not on {device}, {dtype}"


@pytest.mark.parametrize(
    ("device", "dtype", "lacks", "backend", "words"),
    [
        ("cpu", "float32", HAVE, "cpu", "cpu tensors, float32"),
        ("cpu", "float32", HAVE | {"cpu": "no extension"}, "reference", "not cpu: no extension"),
        ("cpu", "float64", HAVE, "reference", "not cpu: not on cpu, float64"),
        ("cuda", "float32", HAVE, "triton", "cuda tensors, float32"),
        ("cuda", "float32", HAVE | {"triton": "no triton"}, "reference", "not triton: no triton"),
        ("mps", "float32", HAVE, "reference", "mps tensors, float32"),
    ],
)
def test_auto_takes_the_first_backend_that_can_run_and_says_why(machine, device, dtype, lacks, backend, words):
    machine(lacks)
    for name in (None, "auto"):
        choice = choose(STEP, device, dtype, name)
        assert choice.backend == backend and words in choice.reason


def test_the_environment_names_a_backend_and_the_argument_overrides_it(machine, monkeypatch):
    machine(HAVE)
    monkeypatch.setenv("VIVACE_BACKEND", "reference")
    assert choose(STEP, "cpu", "float32").backend == "reference"
    assert "VIVACE_BACKEND=reference" in choose(STEP, "cpu", "float32").reason
    assert choose(STEP, "cpu", "float32", "cpu").backend == "cpu"
    assert choose(STEP, "cpu", "float32", "auto").backend == "cpu"


def test_a_named_backend_that_cannot_run_raises_with_the_reason(machine, monkeypatch):
    machine(HAVE | {"cpu": "vivace._C is not built"})
    with pytest.raises(BackendError, match=r"solver_step: backend=cpu cannot run .* vivace._C is not built"):
        choose(STEP, "cpu", "float32", "cpu")
    with pytest.raises(BackendError, match="not on cpu, float32"):
        choose(STEP, "cpu", "float32", "triton")
    monkeypatch.setenv("VIVACE_BACKEND", "triton")
    with pytest.raises(BackendError, match="VIVACE_BACKEND=triton"):
        choose(STEP, "cuda", "float64")


def test_an_unknown_name_is_refused(machine, monkeypatch):
    machine(HAVE)
    with pytest.raises(ArgumentError, match="backend=gpu is no backend; use one of auto, reference, cpu, triton"):
        choose(STEP, "cpu", "float32", "gpu")
    monkeypatch.setenv("VIVACE_BACKEND", "gpu")
    with pytest.raises(ArgumentError, match="VIVACE_BACKEND=gpu"):
        philox_normal((4,), [0], [0])


def test_triton_without_a_gpu_is_refused_on_real_calls(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(spec, "missing", spec.missing.__wrapped__)
    spec._decide.cache_clear()
    with pytest.raises(BackendError, match="no CUDA device"):
        philox_normal((4,), [0], [0], backend="triton")


def test_backends_lists_every_implementation_with_a_reason_and_prints():
    table = backends()
    assert {(row.op, row.backend) for row in table} == {(op.name, name) for op in ops() for name in op.backends}
    assert all(row.reason for row in table)
    assert all(row.available for row in table if row.backend == "reference")
    lines = str(table).splitlines()
    assert lines[0].split() == ["op", "backend", "runs", "reason"] and len(lines) == 1 + len(table)


def test_importing_kernels_and_building_rows_loads_neither_torch_nor_triton():
    code = (
        "import sys, vivace.kernels; from vivace.kernels.solver_step import Output, build_table\n"
        "build_table([[Output(0, [(0, -1, 1.0)])]])\n"
        "print([name for name in ('torch', 'triton', 'vivace._C') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_op_name_registers_once():
    with pytest.raises(ArgumentError, match="exists already"):
        spec.register(STEP)
