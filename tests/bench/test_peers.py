"""Runtimes to compare with: each either runs the network right or says why it cannot. Nothing is timed here."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from vivace.bench import peers
from vivace.bench.models import BenchModel, sizes
from vivace.bench.peers import LIMITS, RUNTIMES, graphs, inductor, prepared, runtime
from vivace.bench.peers.loop import SOLVERS, SPACINGS, draw, scheduler
from vivace.errors import ArgumentError, BackendError

TINY = BenchModel("tiny", sizes(2, 2, 16, size=8, classes=1000))  # what DiTPipeline takes for granted
# Inductor generates code for half a minute even for a tiny network; see below for what is tested of it.
EACH = [(name, dtype) for name in RUNTIMES if name != "inductor" for dtype in runtime(name).DTYPES]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for the module: graphs are exported once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_a_runtime_predicts_what_eager_mode_does_or_says_why_not(name, dtype):
    peer = prepared(name, TINY, dtype, 2, 2)
    missing = runtime(name).why_not(dtype)
    if missing is not None:
        assert (peer.ready, peer.error, peer.reason) == (None, None, missing)
        return
    assert peer.reason is None and peer.error <= LIMITS[dtype.split()[0]]
    assert peer.ready.compile_s >= 0 and all(peer.ready.versions.values()) and peer.ready.settings
    peer.ready.begin(3)
    x, t, labels = TINY.inputs(2)
    prediction = peer.ready.call(x, t, labels).clone()
    assert prediction.shape == x.shape and prediction.dtype == torch.float32
    peer.ready.begin(3)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3), t[:1].expand(2), labels  # other strides, the same numbers
    assert (peer.ready.call(*strided) - prediction).abs().max() <= 1e-5 * prediction.abs().max()


@pytest.mark.parametrize("name", RUNTIMES)
def test_an_absent_library_is_a_reason_that_names_the_way_out(name, monkeypatch):
    def broken(module, *args):
        raise ImportError(f"no module {module}")

    monkeypatch.setattr(peers, "import_module", lambda module: broken(module))
    monkeypatch.setattr(peers, "runtime", lambda given: importlib.import_module(f"vivace.bench.peers.{given}"))
    peer = prepared(name, TINY, "float32", 2, 2)
    assert peer.ready is None and "cannot be imported" in peer.reason and "make bench-setup" in peer.reason
    assert peer.row()["reason"] == peer.reason and peer.row()["compile_s"] is None


def test_a_wrong_prediction_is_not_handed_out(monkeypatch):
    eager = runtime("eager")
    honest = eager.make
    wrong = SimpleNamespace(
        NAME="wrong", DTYPES=("float32",), why_not=lambda dtype: None,
        make=lambda *a: peers.Ready(lambda *inputs: 2 * honest(*a).call(*inputs), 0.0, {}, ""),
    )  # fmt: skip
    monkeypatch.setattr(peers, "runtime", lambda name: wrong)
    peer = prepared("wrong", TINY, "float32", 2, 2)
    assert peer.ready is None and peer.error == pytest.approx(1.0) and "errs by 1" in peer.reason


def test_a_compiler_that_fails_or_takes_too_long_is_a_reason(monkeypatch):
    for error in (RuntimeError("no C++ compiler\nmore"), TimeoutError("no code after 1 s"), BackendError("no")):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(inductor, "_compile", fail)
        peer = prepared("inductor", TINY, "bfloat16", 2, 2)
        assert peer.ready is None and str(error).splitlines()[0] in peer.reason


def test_inductors_code_is_kept_by_dtype_batch_and_threads():
    places = {inductor.package(TINY, *key).path for key in (("float32", 1, 2), ("float32", 2, 2), ("bfloat16", 1, 2))}
    assert len(places | {inductor.package(TINY, "float32", 1, 1).path}) == 4


def test_unknown_names_are_refused():
    with pytest.raises(ArgumentError, match="tensorrt"):
        runtime("tensorrt")
    with pytest.raises(ArgumentError, match="int8"):
        prepared("eager", TINY, "int8", 2, 2)


def test_int8_is_calibrated_on_rows_of_a_trajectory():
    rows = list(graphs.calibration(TINY))
    assert len(rows) == 2 * graphs.CALIBRATION_STEPS
    assert len({float(row["t"][0]) for row in rows}) == graphs.CALIBRATION_STEPS
    assert all(row["x"].shape == (2, 4, 8, 8) and row["labels"].tolist() in ([200, 1000], [500, 1000]) for row in rows)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_loop_draws_what_the_pipeline_of_diffusers_draws(solver):
    import diffusers

    from vivace.bench.e2e_cases import Pixels
    from vivace.bench.peers.eager import network

    module, noise = TINY.transformer(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for spacing in SPACINGS:
        vae = Pixels()
        pipe = diffusers.DiTPipeline(module, vae, scheduler(TINY.scheduler, solver, spacing))
        pipe.set_progress_bar_config(disable=True)
        pipe(
            [5], guidance_scale=3.0, num_inference_steps=4, generator=torch.Generator().manual_seed(3), output_type="np"
        )
        loop = scheduler(TINY.scheduler, solver, spacing)
        latents = draw(network(module), loop, 4, noise, torch.tensor([5]), 1000, 3.0)
        assert (latents - vae.latents).abs().max() < 1e-5 * vae.latents.abs().max()
