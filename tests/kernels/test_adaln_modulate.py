"""Residual and norm in one: the bits of its two halves, where results may go, and what is refused."""

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.adaln_modulate import SPEC, adaln_modulate
from vivace.kernels.gated_residual import gated_residual
from vivace.kernels.norm_modulate import norm_modulate

CASES = [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case in SPEC.cases() for dtype in case.dtypes]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
SHAPE = (2, 3, 200)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def call(backend, dtype=torch.float32, shape=SHAPE):
    """hidden, update, gate, scale and shift."""
    sizes = (shape, shape, *[(shape[0], shape[-1])] * 3)
    return [torch.randn(size).to(device_of(backend), dtype) for size in sizes]


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


@on_every_backend
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_results_have_the_bits_of_the_two_ops_one_after_the_other(backend, case, dtype):
    made = case.make(dtype, device_of(backend))
    hidden, update, *vectors = made.args
    gate, scale, shift = (*vectors, None, None, None)[:3]
    h, m = adaln_modulate(*made.args, **made.kwargs, backend=backend)
    stored = gated_residual(hidden, update, gate, backend=backend)
    assert same(h, stored)
    assert same(m, norm_modulate(stored, scale, shift, **made.kwargs, backend=backend))


PLACES = [("hidden", None), ("update", None), (None, "hidden"), (None, "update"), ("hidden", "update")]


@on_every_backend
@pytest.mark.parametrize(("hidden_out", "out"), [*PLACES, ("update", "hidden")])
def test_results_may_take_the_place_of_inputs(backend, hidden_out, out):
    tensors = call(backend, torch.bfloat16)
    h, m = adaln_modulate(*tensors, backend=backend)
    named = {"hidden": tensors[0], "update": tensors[1], None: None}
    into = adaln_modulate(*tensors, hidden_out=named[hidden_out], out=named[out], backend=backend)
    assert torch.equal(into[0], h) and torch.equal(into[1], m)
    assert hidden_out is None or into[0] is named[hidden_out]
    assert out is None or into[1] is named[out]


@on_every_backend
@pytest.mark.parametrize("shape", [(200,), (2, 200), (2, 3, 4, 200)])
def test_other_ranks_are_samples_tokens_and_elements(backend, shape):
    hidden, update = (torch.randn(shape, device=device_of(backend)) for _ in range(2))
    vectors = torch.randn(3, 200, device=device_of(backend))
    h, m = adaln_modulate(hidden, update, *vectors, backend=backend)
    assert torch.equal(h, gated_residual(hidden, update, vectors[0], backend=backend))
    assert torch.equal(m, norm_modulate(h, vectors[1], vectors[2], backend=backend))
    places = {"hidden_out": hidden, "out": torch.zeros_like(m)}
    assert all(
        a is b
        for a, b in zip(
            adaln_modulate(hidden, update, *vectors, **places, backend=backend), places.values(), strict=True
        )
    )
    assert torch.equal(places["out"], m) and torch.equal(hidden, h)


@pytest.mark.backend("cpu")
def test_bits_do_not_depend_on_the_threads():
    tensors = call("cpu", shape=(3, 700, 2050))  # enough work for several
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = adaln_modulate(*tensors, backend="cpu")
        torch.set_num_threads(4)
        together = adaln_modulate(*tensors, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize(("shape", "width"), [((0, 3, 200), 200), ((2, 0, 200), 200), ((2, 3, 0), 0)])
def test_an_empty_call_gives_two_empty_results(shape, width):
    hidden, given = torch.zeros(shape), torch.zeros(shape)
    h, m = adaln_modulate(hidden, hidden, torch.zeros(width), hidden_out=given)
    assert h is given and m.shape == hidden.shape and m is not h


REFUSED = {
    r"update has shape \(2, 3, 100\)": {"update": torch.zeros(2, 3, 100)},
    r"gate has shape \(3, 200\)": {"gate": torch.zeros(3, 200)},
    r"scale has shape \(3, 200\)": {"scale": torch.zeros(3, 200)},
    r"shift is float64": {"shift": torch.zeros(2, 200, dtype=torch.float64)},
    r"weight has shape \(2, 200\)": {"weight": torch.zeros(2, 200)},
    r"hidden_out has shape \(2, 200\)": {"hidden_out": torch.zeros(2, 200)},
    r"kind is 'none'": {"kind": "none"},
    r"hidden is complex64": {"hidden": torch.zeros(SHAPE, dtype=torch.complex64)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_illegal_calls_are_refused(message):
    arguments = {"hidden": torch.zeros(SHAPE), "update": torch.zeros(SHAPE)} | REFUSED[message]
    with pytest.raises((ShapeError, DtypeError, ArgumentError), match="^adaln_modulate: .*" + message):
        adaln_modulate(**arguments)


def test_both_results_in_one_place_are_refused():
    place = torch.zeros(SHAPE)
    with pytest.raises(ArgumentError, match="same memory"):
        adaln_modulate(torch.zeros(SHAPE), torch.zeros(SHAPE), out=place, hidden_out=place)
