"""GELU: every bfloat16 number, both tails, infinities, layouts and ranks, one set of bits, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.gelu import SPEC, gelu
from vivace.kernels.gelu.cases import gaps

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_fast_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.impls]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
both_forms = pytest.mark.parametrize("approximate", ["none", "tanh"])


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def exact(x, approximate):
    """In float64, without cancellation in the negative tail."""
    x = x.double()
    if approximate == "none":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2.0))
    return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


def normals(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)


# --- numbers -------------------------------------------------------------------------------------------------------


@both_forms
def test_the_definition_is_that_of_torch(approximate):
    x, pair = normals(100).double(), normals(5, 8).double()
    torch.testing.assert_close(gelu(x, approximate=approximate), exact(x, approximate), rtol=1e-12, atol=1e-15)
    gated = pair[:, :4] * functional.gelu(pair[:, 4:], approximate=approximate)
    assert torch.equal(gelu(pair, gated=True, approximate=approximate), gated)


@pytest.mark.backend("cpu")
@both_forms
def test_float32_is_as_exact_as_torch_over_the_whole_range(approximate):
    x = torch.cat((torch.linspace(-14.0, 14.0, 400_001), 1e-3 * normals(10_000)))
    for part in (x, x[x.abs() < 1.0], x[x < 0.0], x[x.abs() < 1e-3]):
        ours, theirs = gelu(part, approximate=approximate), functional.gelu(part, approximate=approximate)
        e = spec.error_of(theirs, exact(part, approximate))
        assert spec.error_of(ours, exact(part, approximate)) <= 2.0 * e + 2.0**-24


@pytest.mark.backend("cpu")
@both_forms
def test_every_bfloat16_number_is_right_to_one_unit(approximate):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    got, want = gelu(x, approximate=approximate).double(), exact(x, approximate)
    off = (got - want).abs()
    near = x > -3.0  # beyond, what is left of x Phi(x) is small beside its error
    unit = torch.exp2(want.frexp().exponent - 8.0).clamp_min(2.0**-133)
    assert (off <= unit)[near].all()
    assert off[~near].max() <= 2e-5


@on_every_backend
@every_dtype
@both_forms
def test_tails_zeros_infinities_and_nan(backend, dtype, approximate):
    values = [math.nan, -math.inf, math.inf, -1e30, 1e30, -3e38, 3e38, -100.0, 100.0, 0.0, -0.0]
    for repeat in (1, 12):  # what is left of a block, and whole blocks
        x = torch.tensor(values * repeat).to(device_of(backend), dtype)
        if backend == "reference":  # some versions of torch give NaN at infinity in float32
            x = x.double()
        y = gelu(x, approximate=approximate, backend=backend).cpu()[-len(values) :]
        assert y[:2].isnan().all() and y[2] == math.inf
        large = torch.tensor([1e30, 3e38, 100.0]).to(dtype).to(y.dtype)
        assert torch.equal(y[4::2][:3], large)
        assert (y[3:8:2] == 0.0).all() and y[3:8:2].signbit().all()
        assert y[9:].tolist() == [0.0, 0.0] and y[9:].signbit().tolist() == [False, True]


@pytest.mark.backend("triton")
@both_forms
@pytest.mark.parametrize("gated", [False, True])
def test_triton_has_the_bits_of_the_cpu_in_float32(approximate, gated):  # its interpreter truncates to bfloat16
    x = torch.cat((normals(1, 700), 9.0 * normals(1, 700)), dim=1)
    options = {"gated": gated, "approximate": approximate}
    got = gelu(x.to(device_of("triton")), **options, backend="triton").cpu()
    assert torch.equal(got, gelu(x, **options, backend="cpu"))


# --- layouts -------------------------------------------------------------------------------------------------------


@on_every_backend
@every_dtype
def test_a_result_may_take_the_place_of_its_input(backend, dtype):
    device = device_of(backend)
    hidden, pair = normals(2, 3, 70, dtype=dtype, device=device), normals(2, 3, 140, dtype=dtype, device=device)
    apart, gated = gelu(hidden, backend=backend), gelu(pair, gated=True, backend=backend)
    assert gelu(hidden, out=hidden, backend=backend) is hidden and torch.equal(hidden, apart)
    first = pair[..., :70]
    assert gelu(pair, gated=True, out=first, backend=backend) is first and torch.equal(first, gated)


@on_fast_backends
@pytest.mark.parametrize("gated", [False, True])
def test_bits_do_not_depend_on_rank_or_layout(backend, gated):
    x = normals(2, 3, 4, 90, device=device_of(backend))
    want = gelu(x, gated=gated, backend=backend)
    for shape in ((24, 90), (6, 4, 90), (1, 2, 3, 4, 90)):
        assert torch.equal(gelu(x.reshape(shape), gated=gated, backend=backend).reshape(want.shape), want)
    swapped = x.transpose(0, 2).contiguous().transpose(0, 2)
    out = gaps(torch.zeros_like(want)).transpose(0, 1).contiguous().transpose(0, 1)
    for source in (swapped, gaps(x)):
        assert torch.equal(gelu(source, gated=gated, backend=backend), want)
        assert gelu(source, gated=gated, out=out, backend=backend) is out and torch.equal(out, want)
    assert torch.equal(gelu(x[0, 0, 0], gated=gated, backend=backend), want[0, 0, 0])


@pytest.mark.backend("cpu")
@every_dtype
def test_bits_do_not_depend_on_the_threads(dtype):
    x = normals(3, 300, 2050, dtype=dtype)  # enough work for several
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gelu(x, gated=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


# --- arguments -----------------------------------------------------------------------------------------------------

X = torch.zeros(2, 6)
REFUSED = [
    ((torch.zeros(()),), {}, ShapeError, "no axis"),
    ((X.half(),), {}, DtypeError, "hidden is float16"),
    ((X.long(),), {}, DtypeError, "hidden is int64"),
    ((torch.zeros(6, 2).T,), {}, ShapeError, "stride 2 along its last axis"),
    ((torch.zeros(2, 5),), {"gated": True}, ShapeError, r"\(2, 5\), a gated one needs an even last axis"),
    ((X,), {"approximate": "erf"}, ArgumentError, "approximate is 'erf'"),
    ((X,), {"out": torch.zeros(2, 3)}, ShapeError, r"out has shape \(2, 3\), needs \(2, 6\)"),
    ((X,), {"out": X, "gated": True}, ShapeError, r"needs \(2, 3\)"),
    ((X,), {"out": X.double()}, DtypeError, "out is float64, needs float32"),
    ((X,), {"out": torch.zeros(6, 2).T}, ShapeError, "out has stride 2"),
    ((X,), {"out": torch.zeros(2, 6, device="meta")}, ArgumentError, "out is on meta"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(args, kwargs, error, words):
    with pytest.raises(error, match=f"gelu: .*{words}"):
        gelu(*args, **kwargs)


@pytest.mark.backend("cpu")
def test_float64_runs_in_the_reference_and_is_refused_by_name_elsewhere():
    x = normals(4).double()
    assert torch.equal(gelu(x), gelu(x, backend="reference"))
    with pytest.raises(BackendError, match="float64 runs on the reference"):
        gelu(x, backend="cpu")
