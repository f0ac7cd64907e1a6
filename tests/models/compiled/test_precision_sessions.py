"""Sessions of the native DiT whose rows name precisions: agreement, bits, what is measured, packed and reported."""

import math
from dataclasses import replace

import pytest
import torch

import vivace
from vivace.engine.passes import apply_precision
from vivace.kernels import store
from vivace.kernels.spec import error_of
from vivace.models.compiled import native, precisions
from vivace.models.pipe import Pipe
from vivace.models.quantized.weights import QuantizedWeights


def opened():
    """A model of its own with int8 weights rounded to the nearest; one linear stays high."""
    model = vivace.load("emoji").model
    layers = dict(precisions.nearest(model.module).layers)
    layers.pop("blocks.0.down")
    return Pipe(model, QuantizedWeights("int8", model.spec.fingerprint, layers, kept={"blocks.0.down": "as asked"}))


@pytest.fixture(scope="module")
def pipe():
    return opened()


def plan_of(pipe, steps=4, *said, **options):
    spec = pipe.spec
    plan = vivace.make_plan(spec.schedule, steps=steps, prediction=spec.prediction)
    plan = vivace.passes.apply_guidance(plan, 2.0, interval=(0.0, 0.7))
    return apply_precision(plan, *said, **options) if said else plan


def forced(monkeypatch, way):
    """Every row runs that way, whatever a measurement says."""
    monkeypatch.setattr(native, "_measure", lambda *_: {"way": way, "ms": {way: 1.0}})
    monkeypatch.setattr(native.store, "get", lambda key: store.Found(None, "forced"))
    monkeypatch.setattr(native.store, "put", lambda key, value: None)


def latents(pipe, plan, backend="cpu", dtype=None, **options):
    return pipe.compile(plan, backend=backend, dtype=dtype, threads=2)("red heart", seed=3, **options).latents


@pytest.mark.parametrize("way", list(native.WAYS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("said", [("int8", {"first": 1, "last": 1, "high": "bf16"}), ("int8", {}), ("bf16", {})])
def test_a_session_errs_no_more_than_twice_the_eager_one(pipe, monkeypatch, way, dtype, said):
    forced(monkeypatch, way)
    plan = plan_of(pipe, 4, said[0], **said[1])
    exact = latents(pipe, plan_of(pipe), "eager", "float64", n=2)
    eager, ours = (error_of(latents(pipe, plan, backend, dtype, n=2), exact) for backend in ("eager", "cpu"))
    assert ours <= 2 * eager + (2**-8 if dtype == "bfloat16" else 2**-24)


@pytest.mark.parametrize("way", list(native.WAYS))
def test_rows_of_several_precisions_run_in_one_session_with_the_bits_they_have_alone(pipe, monkeypatch, way):
    forced(monkeypatch, way)
    mixed, int8, own = plan_of(pipe, 3, "int8", last=1, high="bf16"), plan_of(pipe, 5, "int8"), plan_of(pipe, 4)
    alone = [latents(pipe, plan, index=1) for plan in (mixed, int8, own)]
    session = pipe.compile([mixed, int8, own], backend="cpu", threads=2)
    requests = [vivace.Request("red heart", plan, seed=3, index=1) for plan in (mixed, int8, own)]
    states = [session.begin(request) for request in requests]
    while running := [state for state in states if not state.done]:
        session.step(running)
    results = [session.finish(state) for state in states]
    assert all(torch.equal(result.latents, single) for result, single in zip(results, alone, strict=True))
    hows = {use.reason for use in results[0].receipt.kernels if use.op == "network"}
    assert hows == {f"{way}, float32", f"{way}, bf16", f"{way}, int8"}


def test_a_precision_that_is_the_models_own_shares_its_artefacts(pipe):
    session = pipe.compile(plan_of(pipe), backend="cpu")
    session("tree", plan=plan_of(pipe, 4, "fp32"))
    rows = session.executor.compiler._rows
    assert len(rows) == 1


def test_no_float_block_is_packed_for_a_plan_in_int8(monkeypatch):
    forced(monkeypatch, native.CPP)
    pipe = opened()
    session = pipe.compile(plan_of(pipe, 2, "int8"), backend="cpu")
    weights = session("tree").receipt.compiled["weights"]
    width, layers = pipe.model.config.width, pipe.model.config.layers
    assert set(weights) == {"C++ row, float32", "C++ row, bfloat16", "C++ row, int8"}
    assert 12 * layers * width**2 - 4 * width**2 <= weights["C++ row, int8"] < 13 * layers * width**2
    assert 2 * 4 * width**2 <= weights["C++ row, bfloat16"] < 3 * 4 * width**2
    assert weights["C++ row, float32"] < 4 * width**2  # smaller than any linear of a block


def test_the_way_is_measured_by_precision(pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, measure = [], native._measure
    monkeypatch.setattr(native, "_measure", lambda *given: measured.append(given[3]) or measure(*given))
    plan = plan_of(pipe, 3, "int8", first=1, high="bf16")
    told = pipe.compile(plan, backend="cpu")("tree").receipt.compiled["measured"]
    assert sorted(measured) == [("bf16", "bf16"), ("int8", "int8")] and len(told) == 2
    assert any(", int8: " in line for line in told) and any(", bf16: " in line for line in told)
    pipe.compile(plan, backend="cpu")
    assert len(measured) == 2


@pytest.mark.parametrize("way", list(native.WAYS))
@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32"])
def test_numbers_that_are_not_finite_are_named_when_debugging_and_else_reach_the_picture(monkeypatch, way, precision):
    forced(monkeypatch, way)
    pipe = opened()
    with torch.no_grad():
        pipe.model.module.layers()[2].out.bias[3] = math.inf
    pipe = Pipe(pipe.model, pipe.quantized)
    session = pipe.compile(plan_of(pipe, 3, precision), backend="cpu")
    assert not bool(session("tree").latents.isfinite().any())
    monkeypatch.setenv("VIVACE_DEBUG", "1")
    with pytest.raises(vivace.VivaceError, match=r"step 0: blocks\.2\.up: its activations hold NaN or infinity"):
        session("tree")


def test_a_precision_without_weights_or_kernels_is_refused_by_row(pipe):
    bare = Pipe(pipe.model)
    with pytest.raises(vivace.VivaceError, match="step 1: .*int8"):
        bare.compile(plan_of(pipe, 3, "int8", first=1, high="bf16"), backend="cpu")
    weights = {"blocks.0.qkv": replace(pipe.quantized.layers["blocks.0.qkv"], weight=eight_bit_floats(pipe))}
    fp8 = Pipe(pipe.model, QuantizedWeights("fp8", pipe.spec.fingerprint, weights))
    with pytest.raises(vivace.VivaceError, match="step 0: .*fp8 has kernels on CUDA only"):
        fp8.compile(plan_of(pipe, 3, "fp8"), backend="cpu")


def eight_bit_floats(pipe):
    return pipe.quantized.layers["blocks.0.qkv"].weight.float().to(torch.float8_e4m3fn)
