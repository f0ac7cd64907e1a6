"""Rows as integers and a scale: ties, ends of the range, rows without a scale, one set of bits, what is refused."""

import math

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.quantize_tokens import SPEC, quantize_tokens
from vivace.kernels.quantize_tokens.cases import cases

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_fast_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.impls]
)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def run(x, backend, **options):
    device = device_of(backend)
    options = {name: tensor.to(device) for name, tensor in options.items()}
    q, scale = quantize_tokens(x.to(device), **options, backend=backend)
    return q.cpu(), scale.cpu()


@on_fast_backends
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_integers_and_scales_have_the_bits_of_the_definition(backend, case):
    for dtype in case.dtypes:
        call = case.make(dtype, "cpu")
        found, wanted = (run(*call.args, name, **call.kwargs) for name in (backend, "reference"))
        for ours, want in zip(found, wanted, strict=True):
            assert ours.dtype == want.dtype and torch.equal(ours.nan_to_num(), want.nan_to_num())
            assert torch.equal(ours.isnan(), want.isnan())


@on_every_backend
def test_ties_go_to_even_and_the_largest_number_to_127(backend):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, -127.0, 0.0]])
    q, scale = run(x, backend)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126, -127, 0]]
    q, scale = run(-3.0 * x, backend)
    assert scale.tolist() == [3.0] and q.tolist() == [[-127, 0, -2, -2, 0, 2, 2, -126, 126, 127, 0]]


@on_every_backend
def test_what_has_no_scale(backend):
    least = 2.0**-149
    rows = [[0.0, -0.0], [least, -least], [math.nan, 5.0], [math.inf, 1.0], [1.0, -math.inf]]
    q, scale = run(torch.tensor(rows), backend)
    assert q.tolist() == [[0, 0]] * 5
    assert scale[:2].tolist() == [1.0, 1.0] and scale[2:].isnan().all()


@on_every_backend
def test_a_scale_given_cuts_off_what_lies_beyond_it(backend):
    x = torch.tensor([[63.4, 63.5, 64.0, 1e30, -1e30, -63.5, -0.25, 0.25, 0.75]])
    q, scale = run(x, backend, scale=torch.tensor(0.5))
    assert scale.tolist() == [0.5] and q.tolist() == [[127, 127, 127, 127, -127, -127, 0, 0, 2]]
    for broken in (math.nan, math.inf):
        q, scale = run(torch.tensor([[1.0, broken]]), backend, scale=torch.tensor(0.5))
        assert q.tolist() == [[0, 0]] and scale.isnan().all()


@on_every_backend
def test_a_sample_whose_scale_is_not_above_zero_keeps_that_of_its_rows(backend):
    x = torch.tensor([[127.0, 3.0], [254.0, 3.0], [0.0, 0.0], [381.0, 3.0]])
    q, scale = run(x, backend, scale=torch.tensor([2.0, 0.0, -1.0, math.nan]))
    assert scale.tolist() == [2.0, 2.0, 1.0, 3.0] and q.tolist() == [[64, 2], [127, 2], [0, 0], [127, 1]]


@on_every_backend
@pytest.mark.parametrize("shape", [(70,), (4, 70), (4, 2, 70), (4, 2, 3, 70)])
def test_a_scale_belongs_to_a_sample_whatever_the_rank(backend, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    batch = shape[0] if len(shape) > 1 else 1
    scale = torch.linspace(0.01, 0.03, batch)
    for given in (scale, scale.reshape(batch, *[1] * (len(shape) - 1)), scale[0], scale[:1]):
        many = given.reshape(-1).expand(batch)
        q, found = run(x, backend, scale=given)
        assert torch.equal(found.reshape(batch, -1), many[:, None].expand(batch, found.numel() // batch))
        flat = (x.reshape(batch, -1, 70) / many[:, None, None]).round().clamp(-127, 127)
        assert torch.equal(q.reshape(flat.shape).float(), flat)


@on_every_backend
def test_smoothing_is_a_product_made_first(backend):
    x = torch.randn(3, 4, 70, generator=torch.Generator().manual_seed(6))
    smooth = torch.logspace(-2, 2, 70)
    assert all(map(torch.equal, run(x, backend, smooth=smooth), run(x * smooth, "reference")))
    q, scale = run(torch.tensor([[1e38, 1.0]]), backend, smooth=torch.tensor([10.0, 1.0]))
    assert q.tolist() == [[0, 0]] and scale.isnan().all()  # beyond the range


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_threads(dtype):
    x = torch.randn(3, 700, 2050, generator=torch.Generator().manual_seed(7)).to(dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(run(x, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_come_back_within_half_a_step(backend, dtype):
    x = (3.0 * torch.randn(4, 50, 200, generator=torch.Generator().manual_seed(3))).to(dtype)
    q, scale = run(x, backend)
    assert (q * scale[..., None] - x.float()).abs().le(0.5001 * scale[..., None]).all()
    assert q.abs().amax(-1).eq(127).all()  # every row uses the whole range


@pytest.mark.backend("triton")
def test_half_precision_runs_on_triton(backend="triton"):
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(4)).half()
    for ours, want in zip(run(x, backend), run(x, "reference"), strict=True):
        assert torch.equal(ours, want)


X = torch.zeros(2, 3)
REFUSED = [
    (torch.zeros(2, 3, dtype=torch.int8), {}, DtypeError, "x is int8"),
    (torch.zeros(()), {}, ShapeError, r"x has shape \(\)"),
    (torch.zeros(2, 0), {}, ShapeError, r"x has shape \(2, 0\)"),
    (torch.zeros(6, 2).T, {}, ShapeError, "x has stride 2"),
    (X, {"smooth": torch.ones(2)}, ShapeError, r"smooth has shape \(2,\), needs \[3\]"),
    (X, {"smooth": torch.ones(1, 3)}, ShapeError, r"smooth has shape \(1, 3\)"),
    (X, {"smooth": torch.ones(3).half()}, DtypeError, "smooth is float16, needs float32"),
    (X, {"smooth": torch.ones(6)[::2]}, ShapeError, "smooth has stride 2"),
    (X, {"smooth": torch.ones(3, device="meta")}, ArgumentError, "smooth is on meta"),
    (X, {"scale": torch.ones(3)}, ShapeError, r"scale has shape \(3,\), needs \[\], \[2\] or \[2, 1, \.\.\.\]"),
    (X, {"scale": torch.ones(2, 3)}, ShapeError, r"scale has shape \(2, 3\)"),
    (X, {"scale": torch.ones(2).double()}, DtypeError, "scale is float64, needs float32"),
    (X, {"scale": torch.ones((), device="meta")}, ArgumentError, "scale is on meta"),
]


@pytest.mark.parametrize(("x", "options", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(x, options, error, words):
    with pytest.raises(error, match=f"quantize_tokens: .*{words}"):
        quantize_tokens(x, **options)
    with pytest.raises(ArgumentError, match="is no backend"):
        quantize_tokens(torch.zeros(1, 1), backend="gpu")
