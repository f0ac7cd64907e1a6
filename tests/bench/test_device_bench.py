"""Timing on a GPU, with a stand-in for the device: candidates in turn, graphs where there can be some, rows, suites."""

import json
import time
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from vivace.bench import device, gpu_cached, gpu_products, on_gpu, steady, tune
from vivace.bench.harness import report
from vivace.bench.kernels import (
    OPS,
    fp8_linear,
    fp8_quantize_tokens,
    gelu,
    int8_attention,
    int8_linear,
    int8_norm_modulate,
    linear,
    philox_normal,
    qk_norm_rope,
    quantize_tokens,
    rows,
    sample_adjust,
    solver_step,
)
from vivace.bench.models import BenchModel, sizes
from vivace.errors import BackendError
from vivace.kernels import spec


class Event:
    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return (later.at - self.at) * 1e3


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


@contextmanager
def recorded(graph):
    yield


@pytest.fixture
def stand_in(monkeypatch):
    """A device that is the processor: events read the clock, graphs replay nothing."""
    assert spec.missing("triton")  # asked, and remembered, before there seems to be a GPU

    @contextmanager
    def on_stream(stream):
        yield

    fakes = {
        "Event": Event, "CUDAGraph": Graph, "graph": recorded, "stream": on_stream, "Stream": Stream,
        "current_stream": Stream, "synchronize": lambda: None, "is_available": lambda: True,
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 10),
        "get_device_name": lambda index: "stand-in", "set_sync_debug_mode": lambda mode: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device, "PLACE", "cpu")
    monkeypatch.setattr(device, "driver", lambda: "1.0")
    for name, value in {"SPAN": 1.0, "SPANS": 2, "WARM_UP": 1}.items():
        monkeypatch.setattr(device, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_candidates_take_turns_and_all_are_timed(stand_in):
    order = []
    candidates = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times, captured = device.interleave(candidates, seconds=0.0, least=6)
    assert {name: len(timing.ms) for name, timing in times.items()} == dict.fromkeys("abc", 10)
    assert captured == set("abc") and all(order.count(name) == device.WARM_UP + 1 for name in "abc")


def test_what_cannot_be_captured_is_called_between_events(stand_in, monkeypatch):
    done = []

    @contextmanager
    def refused(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    times, captured = device.interleave({"a": lambda: done.append(1)}, seconds=0.0, least=5)
    assert not captured and len(done) == device.WARM_UP + 1 + len(times["a"].ms)


def test_spans_prepare_untimed_and_give_the_time_of_one_call(stand_in):
    prepared, done = [], []
    times = device.spans({"a": (lambda: done.append(time.sleep(0.001)), prepared.append)}, seconds=0.0)
    assert sum(prepared) == len(done) and len(times["a"].ms) == 2 and times["a"].median >= 1.0


def test_every_bench_of_a_kernel_has_rows_on_a_device(stand_in, monkeypatch):
    monkeypatch.setattr(rows, "QUICK", {"small": (2, 8, 64)})
    monkeypatch.setattr(gelu, "QUICK", {"small": ((2, 8, 64), True, "none")})
    for module in (fp8_linear, int8_linear, linear):
        monkeypatch.setattr(module, "QUICK", {"small": (32, 64, 64, "gelu_tanh")})
    for module in (fp8_quantize_tokens, int8_norm_modulate, quantize_tokens):
        monkeypatch.setattr(module, "QUICK", {"small": (2, 8, 64)})
    monkeypatch.setattr(int8_attention, "QUICK", {"small": (2, 3, 40, 24)})
    monkeypatch.setattr(qk_norm_rope, "QUICK", {"small": ((1, 8, 2, 32), False)})
    for module in (philox_normal, sample_adjust, solver_step):
        monkeypatch.setattr(module, "SHAPES", {"SDXL": (4, 8, 8)})
    for name in OPS:
        module = import_module(f"vivace.bench.kernels.{name}")
        if name == "attention":  # torch's own on a GPU
            continue
        found = module.rows(True)
        assert {"reference", "eager"} == {row["backend"] for row in found}, name
        for row in found:
            assert row["device"] == "stand-in" and row["by"] == "graph" and row["op"] == name
            assert row["over_eager"] is not None and row["percent_of_roofline"] > 0.0


def test_a_report_keeps_the_device_of_a_row():
    told = report("kernels", [{"op": "a", "device": "stand-in"}, {"op": "b"}], [])
    assert told["rows"][0]["device"] == "stand-in" and told["rows"][1]["device"] == told["machine"]["cpu"]


SMALL = BenchModel("tiny", sizes(2, 2, 16, size=8, classes=10))


def test_a_denoiser_table_compares_ours_with_every_peer(stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(steady, "BACKEND", "eager")
    monkeypatch.setattr(on_gpu, "SECONDS", 0.0)
    monkeypatch.setattr(on_gpu, "compiled", lambda module: module)
    found = {row["backend"]: row for row in on_gpu.denoiser_rows(SMALL, "bfloat16")}
    ours = {"vivace", "vivace, nothing hoisted", "vivace int8", "vivace fp8"}
    assert set(found) == ours | {"eager", "torch.compile", "torchao int8", "torchao fp8"}
    assert found["vivace"]["host_waits"] == 0 and found["vivace"]["over_eager"] > 0.0
    assert all(row["error"] < 0.05 for row in found.values() if "ms" in row)
    assert "torchao cannot be imported" in found["torchao int8"]["reason"]


def test_cached_loops_stand_beside_their_share_of_work(stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_cached, "BACKEND", "eager")
    monkeypatch.setattr(gpu_cached, "SECONDS", 0.0)
    found = {row["backend"]: row for row in gpu_cached.cached_rows(SMALL, "bfloat16")}
    assert set(found) == set(gpu_cached.PLANS)
    assert found["none"]["share"] == 1.0 == found["none"]["time_ratio"] and found["fora"]["share"] < 0.7
    assert all(row["error"] == 0.0 and row["host_waits"] == 0 for row in found.values())


def test_the_native_network_stands_in_for_that_of_diffusers(stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inputs = SMALL.inputs(2)
    predictions = []
    for reason in (None, "diffusers cannot be imported"):
        monkeypatch.setattr(on_gpu, "absent", lambda *modules, reason=reason: reason)
        name, module, called = on_gpu.network(SMALL, "float32")
        predictions.append(called(module)(*inputs))
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-4)


def test_pictures_reach_the_target_and_are_timed_beside_the_defaults(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "SECONDS", 0.0)
    theirs = (
        ("diffusers", "float32", "ddim", 3, ("diffusers",)),
        ("cache-dit", "bfloat16", "unipc", None, ("absent",)),
    )
    monkeypatch.setattr(on_gpu, "THEIRS", theirs)
    monkeypatch.setattr(on_gpu, "OURS", (("vivace, solver", "eager", "float32", "unipc", None),))
    monkeypatch.setattr(device, "MOST", 1)
    monkeypatch.setattr(on_gpu, "cases_prompts", lambda: ("red heart",))
    monkeypatch.setattr(on_gpu.cases.Case, "converged", lambda case: torch.zeros(1, *case.model.opened.shape))
    monkeypatch.setattr(on_gpu.cases, "quality", lambda latents, reference: 31.0)
    found = {row["backend"]: row for row in chain(*on_gpu.e2e())}
    ours, default = found["vivace, solver"], found["diffusers"]
    assert ours["meets"] and ours["steps"] == on_gpu.cases.STEPS[0] and default["steps"] == 3
    assert ours["over_default"] > 0.0 and "absent cannot be imported" in found["cache-dit"]["reason"]


def test_every_table_is_written_when_it_is_there(stand_in, monkeypatch, tmp_path, capsys):
    def suite():
        yield [{"case": "a", "backend": "vivace", "dtype": "float32", "ms": {"median": 1.0}}]
        yield [{"case": "a", "backend": "peer", "dtype": "float32", "reason": "not here"}]
        raise BackendError("out of time")

    monkeypatch.setattr(on_gpu, "SUITES", {"denoiser": suite})
    assert on_gpu.main("denoiser", tmp_path / "out.json") == 1
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["backend"] for row in rows] == ["vivace", "peer"] and rows[0]["device"] == "stand-in"
    told = capsys.readouterr()
    assert "1.000 ms" in told.out and "not here" in told.out and "out of time" in told.err


def test_without_a_device_the_suites_say_so(capsys):
    assert on_gpu.main("denoiser", None) == 1 and tune.main(None) == 1
    assert capsys.readouterr().err.count("torch sees no CUDA device") == 2


def test_products_are_compared_with_the_library_and_told_in_shares_of_the_peak(stand_in, monkeypatch):
    rates = {"stand": {"int8": 1.0, "bfloat16": 1.0}}
    for name, value in {"TOKENS": 32, "CHECKED": 8, "SECONDS": 0.0, "PEAKS": rates}.items():
        monkeypatch.setattr(gpu_products, name, value)
    parts = {"up": (64, 32, "gelu_tanh", False), "down": (32, 64, "none", True)}
    monkeypatch.setattr(gpu_products, "PARTS", parts)
    monkeypatch.setattr(gpu_products, "OPS", {name: gpu_products.OPS[name] for name in ("int8", "bfloat16")})
    monkeypatch.setattr(gpu_products, "compiled_peer", lambda function, inputs: (None, "no compiler"))
    rows = list(chain(*gpu_products.products()))
    by = {(row["case"], row["dtype"], row["backend"]): row for row in rows}
    assert {dtype for _, dtype, _ in by} == {"int8", "bfloat16"}
    ours = by["DiT-XL/2 4096 down", "int8", "vivace"]
    assert ours["over_bare"] > 0.0 and ours["percent_of_peak"] > 0.0 and ours["over_compile"] is None
    assert by["DiT-XL/2 4096 up", "int8", "torch.compile"]["reason"] == "no compiler"
    assert "torchao cannot be imported" in by["DiT-XL/2 4096 up", "int8", "torchao int8"]["reason"]
    (claim,) = gpu_products.claims(rows)
    assert claim.value > 0.0 and claim.n == 2
    assert gpu_products.claims(rows[:1])[0].value is None and gpu_products.peak_of("another", "int8") is None


def test_int8_is_told_against_torch_compile():
    rows = [
        {"backend": "vivace int8", "case": "DiT-XL/2 x2", "over_compile": 1.7, "ms": {"rounds": 9}},
        {"backend": "vivace int8", "case": "DiT-XL/2, 1024 x2", "reason": "out of memory"},
        {"backend": "vivace", "case": "DiT-XL/2 x2", "over_compile": 1.1},
    ]
    first, second = on_gpu.int8_claims(rows)
    assert first.holds and first.n == 9 and second.holds is None and second.how == "out of memory"
