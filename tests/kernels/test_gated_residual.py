"""The gated residual: the same bits from every backend, in place and apart, and what is refused."""

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.gated_residual import SPEC, gated_residual

# Triton's interpreter cuts bfloat16 off where devices round.
DTYPES = ("float32",) if spec.interpreted() else ("float32", "bfloat16")
CASES = [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case in SPEC.cases() for dtype in DTYPES]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
SHAPE = (2, 3, 200)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def call(backend, dtype=torch.float32, shape=SHAPE):
    """hidden, update and gate."""
    sizes = (shape, shape, (shape[0], 1, shape[-1]))
    return [torch.randn(size).to(device_of(backend), dtype) for size in sizes]


@on_every_backend
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_every_backend_has_the_bits_of_the_definition(backend, case, dtype):
    here, there = case.make(dtype, device_of(backend)), case.make(dtype, "cpu")
    found = gated_residual(*here.args, backend=backend).cpu()
    expected = gated_residual(*there.args, backend="reference")
    assert torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5))
    assert torch.equal(found.isnan(), expected.isnan())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1])
def test_a_result_may_take_the_place_of_an_input(backend, dtype, place):
    tensors = call(backend, dtype)
    apart = gated_residual(*tensors, backend=backend)
    assert gated_residual(*tensors, out=tensors[place], backend=backend) is tensors[place]
    assert torch.equal(apart, tensors[place])


@on_every_backend
@pytest.mark.parametrize("shape", [(200,), (2, 200), (2, 3, 4, 200)])
def test_other_ranks_are_samples_tokens_and_elements(backend, shape):
    hidden, update = (torch.randn(shape, device=device_of(backend)) for _ in range(2))
    gate = torch.randn(200, device=device_of(backend))
    found = gated_residual(hidden, update, gate, backend=backend)
    assert torch.equal(found, hidden + gate * update)
    assert gated_residual(hidden, update, gate, out=hidden, backend=backend) is hidden
    assert torch.equal(hidden, found)


@pytest.mark.backend("cpu")
def test_bits_do_not_depend_on_the_threads():
    tensors = call("cpu", shape=(3, 700, 2050))  # enough work for several
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        together = gated_residual(*tensors, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, gated_residual(*tensors, backend="reference"))


REFUSED = {
    r"update has shape \(2, 3, 100\), needs \(2, 3, 200\)": {"update": torch.zeros(2, 3, 100)},
    r"update is bfloat16, needs float32": {"update": torch.zeros(SHAPE, dtype=torch.bfloat16)},
    r"update is on meta": {"update": torch.zeros(SHAPE, device="meta")},
    r"gate has shape \(2, 3\), needs": {"gate": torch.zeros(2, 3)},
    r"gate is float64, needs float32": {"gate": torch.zeros(2, 200, dtype=torch.float64)},
    r"out has shape \(3, 200\)": {"out": torch.zeros(3, 200)},
    r"hidden is int64": {"hidden": torch.zeros(SHAPE, dtype=torch.int64)},
    r"an input has shape \(2, 3, 200\), needs \(6, 200\)": {"hidden": torch.zeros(6, 200)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_illegal_calls_are_refused(message):
    arguments = {"hidden": torch.zeros(SHAPE), "update": torch.zeros(SHAPE)} | REFUSED[message]
    with pytest.raises((ShapeError, DtypeError, ArgumentError), match="^gated_residual: .*" + message):
        gated_residual(**arguments)
