"""The native DiT through the compiled executor: agreement, bits, hoisting, what is measured and kept, the receipt."""

import os
import subprocess
import sys

import pytest
import torch

import vivace
from vivace.engine.compiled import bucket_of
from vivace.kernels import store
from vivace.kernels.spec import error_of
from vivace.models.compiled import native


@pytest.fixture(scope="module")
def pipe():
    return vivace.load("emoji")


def plan_of(pipe, steps=3, guidance=2.0, interval=(0.0, 1.0), **options):
    spec = pipe.spec
    plan = vivace.make_plan(spec.schedule, steps=steps, prediction=spec.prediction, **options)
    return plan if guidance is None else vivace.passes.apply_guidance(plan, guidance, interval=interval)


def forced(monkeypatch, way):
    """Every row runs that way, whatever a measurement says."""
    monkeypatch.setattr(native, "_measure", lambda *_: {"way": way, "ms": {way: 1.0}})
    monkeypatch.setattr(native.store, "get", lambda key: store.Found(None, "forced"))
    monkeypatch.setattr(native.store, "put", lambda key, value: None)


@pytest.mark.parametrize("way", list(native.WAYS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hoist", [True, False])
def test_either_way_errs_no_more_than_twice_the_eager_executor(pipe, monkeypatch, way, dtype, hoist):
    forced(monkeypatch, way)
    plan = plan_of(pipe, 3, 3.0, (0.0, 0.7))

    def latents(backend, dtype):
        options = {"hoist": hoist} if backend == "cpu" else {}
        return pipe.compile(plan, backend=backend, dtype=dtype, **options)("red heart", n=2, seed=3).latents

    exact = latents("eager", "float64")
    eager, ours = (error_of(latents(backend, dtype), exact) for backend in ("eager", "cpu"))
    assert ours <= 2 * eager + {"float32": 2**-24, "bfloat16": 2**-8}[dtype]


@pytest.mark.parametrize("way", list(native.WAYS))
def test_a_picture_has_the_same_bits_hoisted_or_not_alone_or_in_a_batch(pipe, monkeypatch, way):
    forced(monkeypatch, way)
    plan, other = plan_of(pipe, 3), plan_of(pipe, 5, 4.0, solver="dpmpp_2m")
    session = pipe.compile(plan, backend="cpu")
    alone = session("pizza", index=1, seed=5).latents
    assert torch.equal(pipe.compile(plan, backend="cpu", hoist=False)("pizza", index=1, seed=5).latents, alone)
    assert torch.equal(session("pizza", n=3, seed=5).latents[1:2], alone)
    states = [session.begin(vivace.Request("rocket", other, n=2, seed=1))]
    session.step(states)
    states.append(session.begin(vivace.Request("pizza", index=1, seed=5)))
    while not states[1].done:
        session.step(states)
    assert torch.equal(session.finish(states[1]).latents, alone)


@pytest.mark.parametrize("way", list(native.WAYS))
def test_threads_do_not_change_a_bit(pipe, monkeypatch, way):
    forced(monkeypatch, way)
    plan = plan_of(pipe, 2)
    one, two = (pipe.compile(plan, backend="cpu", threads=threads)("tree", seed=1).latents for threads in (1, 2))
    assert torch.equal(one, two)


def test_a_session_without_threads_of_its_own_follows_torch_to_more_of_them(pipe, monkeypatch):
    forced(monkeypatch, native.CPP)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        session = pipe.compile(plan_of(pipe, 2), backend="cpu")
        one = session("tree", seed=1).latents
        torch.set_num_threads(max(before, 3))
        assert torch.equal(session("tree", seed=1).latents, one)
    finally:
        torch.set_num_threads(before)


def test_what_left_the_loop_is_on_the_receipt_with_its_bytes(pipe):
    plan, config = plan_of(pipe, 4), pipe.model.config
    receipt = pipe.compile(plan, backend="cpu")("tree").receipt
    assert receipt.hoisted == {"modulation": 4 * 2 * (6 * config.layers + 2) * config.width * 4}
    assert pipe.compile(plan, backend="cpu", hoist=False)("tree").receipt.hoisted == {}


def test_the_receipt_says_what_runs_a_row_and_what_was_measured(pipe):
    receipt = pipe.compile(plan_of(pipe), backend="cpu")("tree").receipt
    (network,) = [use for use in receipt.kernels if use.op == "network"]
    assert network.backend == "cpu" and any(way in network.reason for way in native.WAYS)
    (measured,) = receipt.compiled["measured"]
    assert all(way in measured for way in native.WAYS) and "ms" in measured
    assert receipt.compiles >= 1 and receipt.executor == "cpu" and "artefact" in str(receipt)
    assert receipt.predicted_ms is not None


def test_prompt_seed_scale_coefficients_and_step_count_compile_nothing(pipe):
    session = pipe.compile(plan_of(pipe, 2), backend="cpu")
    before = session("tree", seed=1).receipt.compiles
    session("pizza", seed=2, guidance_scale=5.0)
    session("tree", plan=plan_of(pipe, 3, solver="dpmpp_2m"))
    assert session("tree", plan=plan_of(pipe, 4, 7.0, solver="ddim", eta=0.5)).receipt.compiles == before


def test_other_resolutions_run_in_the_same_session(pipe):
    plan = plan_of(pipe, 2)
    session, eager = (pipe.compile(plan, backend=backend) for backend in ("cpu", "eager"))
    sizes = [(3, 16, 48), (3, 40, 24), (3, 32, 32), (3, 20, 44)]
    buckets = {bucket_of(pipe.spec.tokens(shape), 1) for shape in [*sizes, pipe.spec.latent_shape]}
    for shape in sizes:
        bound = plan.bind(pipe.spec, shape)
        ours, plain = (s("tree", plan=bound, seed=2) for s in (session, eager))
        assert ours.latents.shape == (1, *shape) and error_of(ours.latents, plain.latents) < 1e-4
    assert ours.receipt.compiles <= len(buckets)


def test_what_was_measured_is_kept_and_a_damaged_record_is_measured_again(pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, plan = [], plan_of(pipe, 2)
    measure = native._measure
    monkeypatch.setattr(native, "_measure", lambda *given: measured.append(1) or measure(*given))
    first = pipe.compile(plan, backend="cpu")("tree").receipt.compiled["measured"]
    assert len(measured) == 1
    assert pipe.compile(plan, backend="cpu")("tree").receipt.compiled["measured"] == first and len(measured) == 1
    for file in tmp_path.rglob("*.json"):
        file.write_text("{")
    pipe.compile(plan, backend="cpu")
    assert len(measured) == 2


def test_a_measurement_is_not_repeated_for_another_number_of_threads(pipe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan, measured = plan_of(pipe, 2), []
    measure = native._measure
    monkeypatch.setattr(native, "_measure", lambda *given: measured.append(1) or measure(*given))
    ways = {pipe.compile(plan, backend="cpu", threads=n)("tree").receipt.compiled["measured"][0] for n in (1, 2)}
    assert len(ways) == len(measured) == 1


def test_two_processes_may_compile_the_same_model_at_once(pipe, tmp_path):
    code = (
        "import vivace; pipe = vivace.load('emoji'); plan = pipe.choose_plan(None, 'ddim', 2, None); "
        "print(float(pipe.compile(plan, backend='cpu', threads=1)('tree', seed=1).latents.double().sum()))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running) and len(set(outputs)) == 1


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_a_dtype_that_is_not_compiled_runs_eager_and_says_why(pipe, dtype):
    plan = plan_of(pipe, 2)
    with pytest.raises(vivace.BackendError, match=f"cannot run here: the model is {dtype}"):
        pipe.compile(plan, backend="cpu", dtype=dtype)
    session = pipe.compile(plan, dtype=dtype)
    assert session.executor.name == "eager" and f"the model is {dtype}" in session.executor.reason


def test_sessions_of_one_model_share_packed_weights_and_nothing_else(pipe, monkeypatch):
    forced(monkeypatch, "C++ row")
    plan = plan_of(pipe, 2)
    one, two = (pipe.compile(plan, backend="cpu") for _ in range(2))
    rows = [session.executor.compiler.row("C++ row") for session in (one, two)]
    layers = [{name: layer.weight.data_ptr() for name, layer in row.weights.layers.items()} for row in rows]
    assert layers[0] == layers[1] and rows[0].memory.bytes.data_ptr() != rows[1].memory.bytes.data_ptr()
    states = [session.begin(vivace.Request("tree", seed=3)) for session in (one, two)]
    while not states[0].done:
        for session, state in zip((one, two), states, strict=True):
            session.step([state])
    results = [session.finish(state).latents for session, state in zip((one, two), states, strict=True)]
    assert torch.equal(*results)


def test_a_model_whose_weights_changed_is_packed_anew_when_it_is_compiled_again(monkeypatch):
    forced(monkeypatch, native.CPP)
    pipe = vivace.load("emoji")  # of its own: its weights change
    plan = plan_of(pipe, 2)
    for dtype in (None, "bfloat16"):
        before = pipe.compile(plan, backend="cpu", dtype=dtype)("tree", seed=1).latents
        with torch.no_grad():
            pipe.model.module.layers()[0].qkv.weight.mul_(0.5)
            pipe.model.module.layers()[1].condition.modulation.weight.mul_(1.5)
        ours, plain = (pipe.compile(plan, backend=b, dtype=dtype)("tree", seed=1).latents for b in ("cpu", "eager"))
        assert error_of(ours, plain) < (1e-5 if dtype is None else 0.1) < error_of(before, plain)


def test_a_row_in_cpp_is_one_call_and_runs_no_python_inside(pipe, monkeypatch):
    forced(monkeypatch, "C++ row")
    session = pipe.compile(plan_of(pipe, 3), backend="cpu")
    state = session.begin(vivace.Request("tree"))
    session.step([state])
    events = []
    sys.setprofile(lambda frame, event, arg: events.append((event, getattr(arg, "__name__", frame.f_code.co_name))))
    try:
        session.step([state])
    finally:
        sys.setprofile(None)
    into = [i for i, (event, name) in enumerate(events) if event == "c_call" and name == "run"]
    assert len(into) == 1 and events[into[0] + 1] == ("c_return", "run")
