"""Tokens put back: the same bits from every backend, other places left alone, and what is refused."""

import pytest
import torch

from vivace.errors import ArgumentError, DtypeError, ShapeError
from vivace.kernels import spec
from vivace.kernels.gated_residual import gated_residual
from vivace.kernels.gather_tokens import gather_tokens
from vivace.kernels.scatter_tokens import SPEC, scatter_tokens

# Triton's interpreter cuts bfloat16 off where devices round.
DTYPES = ("float32",) if spec.interpreted() else ("float32", "bfloat16")
CASES = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for case in SPEC.cases() for dtype in DTYPES
    if not (spec.interpreted() and "kept as bfloat16" in case.name)
]  # fmt: skip
IDS = [[0, 2, 6], [1, 3, 4]]
on_every_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in SPEC.backends]
)


def device_of(backend):
    return "cuda" if backend == "triton" and not spec.interpreted() else "cpu"


def inputs(backend, width=200):
    """full [6, 7, W], ids of two pictures, fresh [4, 3, W], lanes."""
    generator, device = torch.Generator().manual_seed(4), device_of(backend)
    full, fresh = (torch.randn(size, generator=generator).to(device) for size in ((6, 7, width), (4, 3, width)))
    return full, torch.tensor(IDS, dtype=torch.int32, device=device), fresh, torch.tensor([5, 0, 3, 1], device=device)


@on_every_backend
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_every_backend_has_the_bits_of_the_definition(backend, case, dtype):
    here, there = case.make(dtype, device_of(backend)), case.make(dtype, "cpu")
    found = scatter_tokens(*here.args, **here.kwargs, backend=backend).cpu()
    expected = scatter_tokens(*there.args, **there.kwargs, backend="reference")
    assert torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5))
    assert torch.equal(found.isnan(), expected.isnan())


@on_every_backend
def test_what_is_put_back_is_found_again_and_the_rest_stays(backend):
    full, ids, fresh, lanes = inputs(backend)
    before = full.clone()
    assert scatter_tokens(full, ids, fresh, lanes=lanes, backend=backend) is full
    for r, lane in enumerate(lanes.tolist()):
        others = [t for t in range(7) if t not in IDS[r % 2]]
        assert torch.equal(full[lane, IDS[r % 2]], fresh[r])
        assert torch.equal(full[lane, others], before[lane, others])
    assert torch.equal(full[[2, 4]], before[[2, 4]])
    assert torch.equal(gather_tokens(full[lanes], ids, backend=backend), fresh)


@on_every_backend
def test_keys_and_values_go_in_one_pass(backend):
    full, ids, fresh, lanes = inputs(backend)
    apart = scatter_tokens(full.clone(), ids, fresh[..., :120], second=fresh[..., 120:], lanes=lanes, backend=backend)
    assert torch.equal(apart, scatter_tokens(full, ids, fresh, lanes=lanes, backend=backend))


@on_every_backend
def test_a_sum_has_the_bits_of_the_residual(backend):
    full, ids, fresh, lanes = inputs(backend)
    hidden, gate = torch.randn_like(fresh), torch.randn(4, 1, 200, device=full.device)
    scatter_tokens(full, ids, fresh, lanes=lanes, hidden=hidden, gate=gate, backend=backend)
    found = gather_tokens(full[lanes], ids, backend=backend)
    assert torch.equal(found, gated_residual(hidden, fresh, gate, backend=backend))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fresh": torch.zeros(4, 2, 8)}, ShapeError, "fresh has shape"),
        ({"fresh": torch.zeros(4, 3, 7)}, ShapeError, "fresh has shape"),
        ({"fresh": torch.zeros(3, 3, 8)}, ShapeError, "needs a multiple"),
        ({"fresh": torch.zeros(4, 3, 8).double()}, DtypeError, "float64 stays alone"),
        ({"second": torch.zeros(4, 3, 8)}, ShapeError, "second has shape"),
        ({"ids": torch.tensor([[0, 7, 2]], dtype=torch.int32)}, ArgumentError, "from 0 to 7"),
        ({"lanes": torch.tensor([0, 1, 2, 6])}, ArgumentError, "leave the 6"),
        ({"lanes": torch.tensor([0, 1, 2, 2])}, ArgumentError, "hold one twice"),
        ({"lanes": None}, ShapeError, "4 rows for 6 parts"),
        ({"gate": torch.zeros(8)}, ArgumentError, "hidden, which is not given"),
        ({"hidden": torch.zeros(4, 3, 8).bfloat16()}, DtypeError, "hidden is bfloat16"),
        ({"hidden": torch.zeros(4, 3, 8), "second": torch.zeros(4, 3, 0)}, ArgumentError, "both given"),
    ],
)
def test_what_makes_no_sense_is_refused(change, error, words):
    arguments = {
        "full": torch.zeros(6, 7, 8), "ids": torch.zeros(2, 3, dtype=torch.int32), "fresh": torch.zeros(4, 3, 8),
        "lanes": torch.tensor([0, 1, 2, 3]),
    }  # fmt: skip
    with pytest.raises(error, match=words):
        scatter_tokens(**(arguments | change))
