"""The Triton kernels on a machine without a GPU: run by the interpreter, and compiled for Hopper ahead of time.

Each needs its own process: triton reads TRITON_INTERPRET when it is imported. Two share the interpreter's tests, since
this process waits. All start at once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vivace.kernels import ops

COPIES, BULK = "cp.async.cg.shared.global", "cp.async.bulk.tensor"  # into shared memory: 16 bytes a thread, or blocks
PARTS = ("0/2", "1/2")  # of the interpreter's tests
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def start(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "VIVACE_BACKEND")}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, env=kept | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def on_gpu():
    """Ops with a Triton kernel."""
    return [op for op in ops() if "triton" in op.impls]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Output and exit code of all processes by name."""
    files = [
        HERE / "test_contract.py",
        HERE / "test_linear_tiles.py",
        *(HERE / f"test_{op.name}.py" for op in on_gpu()),
    ]
    pytest_options = ("-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider")
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    running = {
        **{part: start(*pytest_options, *files, **interpreted, VIVACE_TEST_PART=part) for part in PARTS},
        "compiler": start(HERE / "aot_compile.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))),
    }
    return {name: (*process.communicate(timeout=1800), process.returncode) for name, process in running.items()}


@pytest.fixture(scope="module")
def usage(processes):
    out, error, code = processes["compiler"]
    assert code == 0, error
    return json.loads(out)


def test_interpreted_kernels_keep_the_contract(processes):
    passed = 0
    for out, error, code in (processes[part] for part in PARTS):
        assert code == 0, out + error
        assert not re.search(r"failed|skipped|deselected \d+ tests of triton", out)
        passed += int(re.search(r"(\d+) passed", out)[1])
    assert passed > 3 * sum(len(case.dtypes) for op in on_gpu() for case in op.cases())


def test_compiled_kernels_do_not_spill(usage):
    assert set(usage) >= {"solver_step guided", "solver_step 12 x 4", "solver_step mixed plans", "philox_normal"}
    assert set(usage) >= {"solver_step adjusted", "sample_adjust guided", "sample_adjust mixed plans"}
    assert {op.name for op in on_gpu()} <= {name.split()[0] for name in usage}
    for name, used in usage.items():
        assert used["target"] == "sm_90a", name
        assert used["stack"] == 0 and used["local"] == 0, f"{name} spills: {used}"
        assert used["registers"] <= 255 and used["shared"] <= 227 << 10, name


def test_plain_rows_leave_room_for_many_warps(usage):
    limits = {"solver_step guided": 64, "solver_step stochastic": 80, "solver_step 12 x 4": 128, "philox_normal": 40}
    limits |= {"solver_step adjusted": 64, "sample_adjust guided": 80}
    limits |= {"norm_modulate DiT": 48, "gated_residual DiT": 40, "adaln_modulate DiT": 48}
    limits |= {"cache_update DiT": 40, "cache_update float32": 64, "cache_apply DiT": 40, "cache_apply float32": 48}
    limits |= {"gather_tokens DiT": 48, "scatter_tokens kept": 32, "scatter_tokens gated": 48}
    limits |= {"gelu erf": 48, "gelu tanh": 40, "gelu gated": 56, "qk_norm_rope FLUX": 64, "qk_norm_rope Wan": 64}
    assert {name: usage[name]["registers"] for name in limits if usage[name]["registers"] > limits[name]} == {}


def test_compiled_kernels_move_16_bytes_at_a_time_and_round_as_the_definition_does(usage):
    for name, used in usage.items():
        if name == "linear of ones" or name.startswith("select_tokens"):
            continue  # nothing to align; tokens are compared, not moved
        apart = name.startswith("solver_step by class")  # neighbours may belong to other tokens
        stores = not name.startswith(("sample_adjust", "int8_attention sum")) and not apart
        assert "st.global.v4.b32" in used["ptx"] or not stores, name
        whole = {"ld.global.v4.b32", "cp.async.cg.shared.global", "cp.async.bulk.tensor"} & set(used["ptx"])
        assert name == "philox_normal" or whole or apart, name
        if used["fused"] is None:
            continue  # its sums are fused on purpose
        exact = {"sqrt.rn.f32", "div.rn.f32"} & set(used["ptx"])  # correctly rounded by means of such instructions
        assert used["fused"] == 0 or exact, f"{name} fuses multiply and add"
    assert "cvt.rn.bf16x2.f32" in usage["solver_step guided"]["ptx"]
    assert "cvt.rn.f16x2.f32" in usage["solver_step scaled"]["ptx"]
    assert any(i.startswith("sqrt.rn") for i in usage["philox_normal"]["ptx"])


def test_linears_use_the_matrix_unit_and_leave_room_for_a_second_program(usage):
    kinds = {
        "linear bfloat16": ("bf16.bf16", COPIES), "linear float16": ("f16.f16", COPIES),
        "int8_linear by": ("s8.s8", COPIES), "fp8_linear by": ("e4m3.e4m3", COPIES),
        "int8_linear int8": ("s8.s8", BULK), "fp8_linear float8": ("e4m3.e4m3", BULK),
        "int8_attention 64": ("s8.s8", COPIES), "int8_attention 72": ("bf16.bf16", COPIES),
        "attention 64": ("bf16.bf16", COPIES), "attention 72": ("bf16.bf16", COPIES),
        "attention 256": ("bf16.bf16", COPIES), "attention float16": ("f16.f16", COPIES),
        "int8_attention 128": ("s8.s8", COPIES), "int8_attention float16": ("f16.f16", COPIES),
    }  # fmt: skip
    for prefix, (kind, loads) in kinds.items():
        named = {name: used for name, used in usage.items() if name.startswith(prefix)}
        assert named, prefix
        for name, used in named.items():
            assert any(i.startswith("wgmma.mma_async") and i.endswith(kind) for i in used["ptx"]), name
            assert loads in used["ptx"], name
    for name, used in usage.items():
        two = re.search(r"\d 128 x 128", name) and name.startswith(("linear", "int8_linear"))
        if two:  # 64 Ki registers and 227 KiB of shared memory of a multiprocessor, 256 threads
            assert used["registers"] <= 128 and 2 * used["shared"] <= 227 << 10, f"{name}: {used}"
    assert not any(i.startswith("wgmma") for i in usage["linear float32 64 x 64"]["ptx"])
