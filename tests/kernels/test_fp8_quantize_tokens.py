"""Rows as 8-bit floats and a scale: every number of e4m3, ties, rows without a scale, one set of bits, refusals."""

import math

import pytest
import torch

from vivace.errors import ArgumentError, BackendError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.fp8_quantize_tokens import SPEC, fp8_quantize_tokens
from vivace.kernels.fp8_quantize_tokens.cases import cases

on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)
on_fast_backends = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.impls]
)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def run(call, backend):
    place = device_of(backend)
    options = {name: value.to(place) for name, value in call.kwargs.items()}
    return tuple(t.cpu() for t in fp8_quantize_tokens(call.args[0].to(place), **options, backend=backend))


def rows(*lists, **options):
    return spec.Call((torch.tensor(lists),), options)


@on_fast_backends
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_numbers_and_scales_have_the_bits_of_the_definition(backend, case):
    for dtype in case.dtypes:
        ours, want = (run(case.make(dtype, "cpu"), name) for name in (backend, "reference"))
        assert ours[0].dtype == torch.float8_e4m3fn and torch.equal(
            ours[0].view(torch.uint8), want[0].view(torch.uint8)
        )
        assert torch.equal(ours[1].nan_to_num(), want[1].nan_to_num())
        assert torch.equal(ours[1].isnan(), want[1].isnan())


@on_every_backend
def test_every_number_of_the_format_stays_and_what_lies_between_goes_to_the_nearest(backend):
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    for x in (grid, -grid):
        q, scale = run(spec.Call((x[None],)), backend)
        assert scale.item() == 1.0 and torch.equal(q.float()[0].abs(), grid)
    middle = (grid[1:] + grid[:-1]) / 2
    for shift, want in ((1.001, grid[1:]), (0.999, grid[:-1])):
        q, _ = run(spec.Call((torch.cat([middle * shift, grid[-1:]])[None],)), backend)
        assert torch.equal(q.float()[0, :-1], want)
    ties, _ = run(spec.Call((torch.cat([middle, grid[-1:]])[None],)), backend)
    assert not (ties[0, :-1].view(torch.uint8) & 1).any()  # even


@on_every_backend
def test_what_has_no_scale(backend):
    least = 2.0**-149
    q, scale = run(rows([0.0, -0.0], [least, -least], [math.nan, 5.0], [math.inf, 1.0], [1.0, -math.inf]), backend)
    assert not q.float().any()
    assert scale[:2].tolist() == [1.0, 1.0] and scale[2:].isnan().all()


@on_every_backend
def test_numbers_beyond_a_given_scale_are_cut_off(backend):
    q, scale = run(rows([1000.0, -1000.0, 3.0, 0.3], scale=torch.tensor(2.0)), backend)
    assert scale.tolist() == [2.0] and q.float().tolist() == [[448.0, -448.0, 1.5, 0.15625]]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_come_back_within_half_a_step(backend, dtype):
    x = (3.0 * torch.randn(4, 50, 200, generator=torch.Generator().manual_seed(3))).to(dtype)
    q, scale = run(spec.Call((x,)), backend)
    back, near = q.float() * scale[..., None], x.float()
    assert (back - near).abs().le(near.abs() / 15.99 + 2.0**-10 * scale[..., None]).all()
    assert q.float().abs().amax(-1).eq(448.0).all()  # every row uses the whole range


REFUSED = [
    ({"x": torch.zeros(2, 3, dtype=torch.int8)}, DtypeError, "x is int8"),
    ({"x": torch.zeros(())}, ShapeError, r"x has shape \(\)"),
    ({"x": torch.zeros(2, 0)}, ShapeError, r"x has shape \(2, 0\)"),
    ({"x": torch.zeros(6, 2).T}, ShapeError, "x has stride 2"),
    ({"x": torch.zeros(2, 3), "smooth": torch.ones(2)}, ShapeError, "smooth has shape"),
    ({"x": torch.zeros(2, 3), "scale": torch.ones(3)}, ShapeError, "scale has shape"),
    ({"x": torch.zeros(2, 3), "scale": torch.ones(2).half()}, DtypeError, "scale is float16"),
    ({"x": torch.zeros(2, 3), "backend": "cpu"}, BackendError, "fp8 runs on CUDA"),
    ({"x": torch.zeros(2, 3), "backend": "gpu"}, ArgumentError, "is no backend"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=f"fp8_quantize_tokens: .*{words}"):
        fp8_quantize_tokens(**arguments)


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_older_gpus_are_named(monkeypatch, capability, runs):
    pytest.importorskip("triton", reason="triton is not installed (pip install triton; Linux on x86-64 only)")
    from vivace.kernels.fp8_quantize_tokens import triton_impl

    monkeypatch.setattr(triton_impl.product, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(triton_impl, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reason = triton_impl.why_not("cuda", "bfloat16")
    assert reason is None if runs else "needs a GPU of capability 8.9 or more, this has (8, 0)" in reason
