"""Linears: torch's own, gates of every shape, packed weights, layouts and ranks, bits of a row, and what is refused."""

import pytest
import torch
from torch.nn import functional

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.gelu.cases import gaps
from vivace.kernels.linear import SPEC, PackedWeight, linear, pack_weight

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_the_cpu = pytest.mark.backend("cpu")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def normals(*shape, dtype=torch.float32, device="cpu", seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("none", lambda y: y),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda y: functional.gelu(y, approximate="tanh")),
        ("silu", functional.silu),
    ],
)
def test_the_definition_is_that_of_torch(activation, function):
    x, weight, bias = normals(2, 3, 20).double(), normals(12, 20, seed=4).double(), normals(12, seed=5).double()
    gate, residual = normals(2, 12, seed=6).double(), normals(2, 3, 12, seed=7).double()
    want = residual + gate[:, None] * function(functional.linear(x, weight, bias))
    torch.testing.assert_close(linear(x, weight, bias, activation=activation, gate=gate, residual=residual), want)


@on_every_backend
@pytest.mark.parametrize("shape", [(2, 3, 40), (6, 40), (2, 3, 2, 40), (40,)])
def test_gates_of_every_shape_multiply_as_broadcasting_would(backend, shape):
    x, weight = normals(*shape, device=device_of(backend)), normals(24, 40, seed=4, device=device_of(backend))
    batch, between = shape[0] if len(shape) > 1 else 1, shape[1:-1]
    tokens = x.numel() // 40 // batch
    plain = linear(x, weight, backend=backend)
    for lead in ((), (1,), (batch,), (batch, 1), (1, tokens), (batch, tokens), (batch, *between), (1,) * (x.dim() - 1)):
        gate = normals(*lead, 24, seed=5, device=x.device)
        full = gate
        if len(lead) not in (0, x.dim() - 1):
            full = (gate[:, None] if len(lead) == 1 else gate).expand(batch, tokens, 24).reshape(*shape[:-1], 24)
        assert torch.equal(linear(x, weight, gate=gate, backend=backend), plain * full), lead


@on_the_cpu
@every_dtype
@pytest.mark.parametrize("depth", [1, 300, 3000])
def test_the_error_is_not_larger_than_that_of_torch(dtype, depth):
    x, weight = normals(50, depth, dtype=dtype), normals(70, depth, dtype=dtype, seed=4)
    exact = x.double() @ weight.double().T
    holds, error, bound = spec.within_tolerance(linear(x, weight), functional.linear(x, weight), exact)
    assert holds, f"error {error:.3g} exceeds {bound:.3g}"


# --- bits ----------------------------------------------------------------------------------------------------------


@on_the_cpu
@every_dtype
def test_a_row_has_the_same_bits_among_any_number_of_rows(dtype):
    x, weight = normals(101, 77, dtype=dtype), pack_weight(normals(90, 77, dtype=dtype, seed=4))
    want = linear(x, weight, activation="gelu")
    for first, last in ((0, 1), (5, 11), (17, 64), (3, 101), (100, 101)):
        assert torch.equal(linear(x[first:last], weight, activation="gelu"), want[first:last])


@on_the_cpu
@every_dtype
def test_bits_do_not_depend_on_the_threads(dtype):
    x, weight = normals(2, 300, 512, dtype=dtype), pack_weight(normals(520, 512, dtype=dtype, seed=4))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(linear(x, weight, gate=normals(2, 520)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@on_every_backend
def test_bits_do_not_depend_on_rank_or_layout(backend):
    x, weight = normals(2, 3, 4, 40, device=device_of(backend)), normals(24, 40, seed=4, device=device_of(backend))
    want = linear(x, weight, backend=backend)
    if backend != "reference":  # that of torch changes with the number of rows
        for shape in ((24, 40), (6, 4, 40), (1, 2, 3, 4, 40)):
            assert torch.equal(linear(x.reshape(shape), weight, backend=backend).reshape(want.shape), want)
    swapped = x.transpose(0, 2).contiguous().transpose(0, 2)
    out = gaps(torch.zeros_like(want)).transpose(0, 1).contiguous().transpose(0, 1)
    for source in (swapped, gaps(x)):
        assert torch.equal(linear(source, gaps(weight[None])[0], backend=backend), want)
        assert linear(source, weight, out=out, backend=backend) is out and torch.equal(out, want)


@on_every_backend
@every_dtype
def test_a_result_may_take_the_place_of_its_residual(backend, dtype):
    x, weight = normals(2, 3, 40, dtype=dtype), normals(24, 40, dtype=dtype, seed=4)
    x, weight, residual = (t.to(device_of(backend)) for t in (x, weight, normals(2, 3, 24, dtype=dtype, seed=5)))
    apart = linear(x, weight, residual=residual, backend=backend)
    assert linear(x, weight, residual=residual, out=residual, backend=backend) is residual
    assert torch.equal(residual, apart)


@on_every_backend
def test_a_result_may_have_another_dtype(backend):
    x, weight = normals(3, 40, device=device_of(backend)), normals(24, 40, seed=4, device=device_of(backend))
    wide = linear(x, weight, backend=backend)
    # Interpreted, triton truncates to bfloat16.
    for dtype in (torch.float16,) if backend == "triton" else (torch.bfloat16, torch.float16):
        assert torch.equal(linear(x, weight, out_dtype=dtype, backend=backend), wide.to(dtype))
        out = torch.zeros_like(wide, dtype=dtype)
        residual = torch.ones_like(out)
        assert linear(x, weight, residual=residual, out=out, backend=backend) is out
        assert torch.equal(out, (1.0 + wide).to(dtype))


# --- packed weights ------------------------------------------------------------------------------------------------


@on_the_cpu
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (64, 32), (65, 33), (130, 7)])
def test_a_packed_weight_is_the_weight(dtype, shape):
    weight, x = normals(*shape, dtype=dtype), normals(5, shape[1], dtype=dtype, seed=4)
    packed = pack_weight(gaps(weight[None])[0])
    assert torch.equal(packed.unpack(), weight)
    assert packed.shape == shape and packed.dtype == dtype and packed.data_ptr() % 64 == 0
    assert packed.nbytes >= weight.nbytes
    assert torch.equal(linear(x, packed), linear(x, weight, backend="cpu"))
    assert torch.equal(linear(x, packed, backend="reference"), linear(x, weight, backend="reference"))


@on_the_cpu
def test_a_packed_weight_is_a_copy_that_tells_what_it_is():
    weight = normals(64, 32)
    packed = pack_weight(weight)
    weight.zero_()
    assert packed.unpack().abs().sum() > 0
    assert isinstance(packed, PackedWeight) and repr(packed) == "PackedWeight([64, 32], float32, 8192 bytes)"


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.zeros(4), ShapeError, "needs .N, K."),
        (torch.zeros(0, 4), ShapeError, "needs .N, K., both 1 or more"),
        (torch.zeros(4, 4).half(), DtypeError, "weight is float16"),
        (torch.zeros(4, 4).double(), DtypeError, "weight is float64"),
        (torch.zeros(4, 4, device="meta"), ArgumentError, "weight is on meta"),
        (torch.zeros(4, 6).T, ShapeError, "stride 6 along axis 1"),
    ],
)
def test_what_cannot_be_packed_is_named(weight, error, words):
    with pytest.raises(error, match=f"pack_weight: .*{words}"):
        pack_weight(weight)


# --- arguments -----------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 5, 6), torch.zeros(4, 6)
Y = torch.zeros(2, 5, 4)
REFUSED = [
    ((torch.zeros(()), W), {}, ShapeError, "x has no axis"),
    ((X.long(), W), {}, DtypeError, "x is int64"),
    ((X, torch.zeros(4, 5)), {}, ShapeError, "weight has shape .4, 5., needs .N, 6."),
    ((X, torch.zeros(6)), {}, ShapeError, "weight has shape .6,."),
    ((torch.zeros(2, 0), torch.zeros(4, 0)), {}, ShapeError, "K > 0"),
    ((X, W.bfloat16()), {}, DtypeError, "weight is bfloat16, needs float32"),
    ((X, W.to("meta")), {}, ArgumentError, "weight is on meta"),
    ((torch.zeros(2, 6, 5).transpose(1, 2), W), {}, ShapeError, "x has stride 5"),
    ((X, torch.zeros(6, 4).T), {}, ShapeError, "weight has stride 4"),
    ((X, W, torch.zeros(5)), {}, ShapeError, "bias has shape .5,., needs .4."),
    ((X, W, torch.zeros(4).half()), {}, DtypeError, "bias is float16"),
    ((X, W), {"activation": "relu"}, ArgumentError, "activation is 'relu'"),
    ((X, W), {"gate": torch.zeros(3, 4)}, ShapeError, "gate has shape .3, 4."),
    ((X, W), {"gate": torch.zeros(4).double()}, DtypeError, "gate is float64"),
    ((X, W), {"residual": torch.zeros(2, 5, 6)}, ShapeError, "residual has shape .2, 5, 6."),
    ((X, W), {"residual": Y.bfloat16()}, DtypeError, "residual is bfloat16, needs float32"),
    ((X, W), {"out": torch.zeros(2, 4)}, ShapeError, "out has shape .2, 4."),
    ((X, W), {"out": Y, "out_dtype": torch.bfloat16}, DtypeError, "out is float32, needs bfloat16"),
    ((X, W), {"out": torch.zeros(2, 4, 5).transpose(1, 2)}, ShapeError, "out has stride 5"),
    ((X, W), {"out_dtype": torch.int8}, DtypeError, "the result is to be int8"),
    ((X, W), {"out_dtype": torch.float64}, DtypeError, "the result is to be float64"),
    ((X.double(), W.double()), {"out_dtype": torch.float32}, DtypeError, "needs float64"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(args, kwargs, error, words):
    with pytest.raises(error, match=f"linear: .*{words}"):
        linear(*args, **kwargs)


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_in_the_reference_and_are_refused_by_name_elsewhere(dtype):
    x, weight = normals(4, 8).to(dtype), normals(3, 8).to(dtype)
    assert torch.equal(linear(x, weight), linear(x, weight, backend="reference"))
    with pytest.raises(BackendError, match=f"{str(dtype)[6:]} runs on the reference"):
        linear(x, weight, backend="cpu")


@on_the_cpu
def test_an_empty_result_touches_nothing():
    assert linear(torch.zeros(0, 6), W).shape == (0, 4)
    out = torch.zeros(2, 0, 4)
    assert linear(torch.zeros(2, 0, 6), W, out=out) is out
