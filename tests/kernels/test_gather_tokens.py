"""Tokens taken out of all: the bits of x, those of `norm_modulate` beside, and what is refused."""

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.gather_tokens import SPEC, gather_tokens
from vivace.kernels.norm_modulate import norm_modulate

# Triton's interpreter cuts bfloat16 off where devices round.
DTYPES = (torch.float32,) if spec.interpreted() else (torch.float32, torch.bfloat16)
IDS = [[0, 2, 6], [1, 3, 4]]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def inputs(backend, dtype=torch.float32, rows=4, width=200):
    """x [R, 7, W] and ids of two pictures."""
    x = torch.randn(rows, 7, width, generator=torch.Generator().manual_seed(4)).to(device_of(backend), dtype)
    return x, torch.tensor(IDS, dtype=torch.int32, device=x.device)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_both_results_have_the_bits_of_their_parts(backend, dtype, kind):
    x, ids = inputs(backend, dtype)
    scale, shift = (torch.randn(4, 1, 200, device=x.device).to(dtype) for _ in range(2))
    weight = torch.randn(200, device=x.device).to(dtype)
    y, normed = gather_tokens(x, ids, scale=scale, shift=shift, weight=weight, kind=kind, backend=backend)
    assert torch.equal(y, torch.stack([x[r, IDS[r % 2]] for r in range(4)]))
    assert torch.equal(y, gather_tokens(x, ids, backend=backend))
    assert torch.equal(normed, norm_modulate(y, scale, shift, weight=weight, kind=kind, backend=backend))


@on_every_backend
def test_all_tokens_in_order_are_x(backend):
    x, _ = inputs(backend)
    ids = torch.arange(7, dtype=torch.int32, device=x.device)[None]
    assert torch.equal(gather_tokens(x, ids, backend=backend), x)


@on_every_backend
def test_one_table_serves_all_rows_and_results_go_where_asked(backend):
    x, ids = inputs(backend, rows=1)
    out, normed = torch.zeros(4, 3, 200, device=x.device), torch.zeros(4, 3, 200, device=x.device)
    found = gather_tokens(x, ids, out=out, normed=normed, backend=backend)
    assert found[0] is out and found[1] is normed
    assert torch.equal(out, torch.stack([x[0, IDS[r % 2]] for r in range(4)]))
    assert torch.equal(normed, norm_modulate(out, backend=backend))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(4, 7)}, ShapeError, r"needs \[R, N, W\]"),
        ({"x": torch.zeros(4, 7, 8).int()}, DtypeError, "x is int32"),
        ({"x": torch.zeros(4, 7, 16)[..., ::2]}, ShapeError, "stride 2"),
        ({"x": torch.zeros(3, 7, 8)}, ShapeError, "needs a multiple"),
        ({"ids": torch.zeros(2, 3).long()}, DtypeError, "ids are int64"),
        ({"ids": torch.zeros(3, dtype=torch.int32)}, ShapeError, r"need \[n, M\]"),
        ({"ids": torch.tensor([[0, 7]], dtype=torch.int32)}, ArgumentError, "from 0 to 7, need 0 .. 6"),
        ({"ids": torch.tensor([[-1, 3]], dtype=torch.int32)}, ArgumentError, "from -1 to 3"),
        ({"out": torch.zeros(4, 2, 8)}, ShapeError, "out has shape"),
        ({"normed": torch.zeros(4, 3, 8).bfloat16()}, DtypeError, "normed is bfloat16"),
        ({"scale": torch.zeros(3, 8)}, ShapeError, "scale has shape"),
        ({"kind": "batch"}, ArgumentError, "kind is 'batch'"),
    ],
)
def test_what_makes_no_sense_is_refused(change, error, words):
    arguments = {"x": torch.zeros(4, 7, 8), "ids": torch.zeros(2, 3, dtype=torch.int32)}
    with pytest.raises(error, match=words):
        gather_tokens(**(arguments | change))
