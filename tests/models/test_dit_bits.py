"""A sample's prediction has the same bits alone and in any batch, at any place, with any number of threads."""

import pytest
import torch

from vivace.models.dit import DiT
from vivace.models.rowwise import gelu, linear, silu

N = 8


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
def case(request, emoji_folder):
    """The bundled model, eight samples, and their predictions together, both branches, with one thread."""
    model = DiT.load(emoji_folder, request.param)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, 32, 32, generator=g).to(request.param)
    t = 999 * torch.rand(N, generator=g)
    labels = torch.stack([torch.randint(0, 1000, (N,), generator=g), torch.full((N,), 1000)])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = model(x, t, labels)
    torch.set_num_threads(before)
    return model, x, t, labels, whole


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("branches", [1, 2])
def test_alone_and_in_a_batch_of_eight(case, threads, count, branches):
    model, x, t, labels, whole = case
    threads(count)
    for part in (slice(0, 1), slice(6, 7), slice(2, 5)):
        outs = model(x[part], t[part], labels[:branches, part])
        assert all(torch.equal(a, b[part]) for a, b in zip(outs, whole, strict=False)), part
    assert len(outs) == branches


def test_any_branch_alone_has_the_same_bits(case):
    model, x, t, labels, whole = case
    for branch in (0, 1):
        assert torch.equal(model(x[:3], t[:3], labels[branch : branch + 1, :3])[0], whole[branch][:3])


def test_neighbours_and_place_leave_no_trace(case, threads):
    model, x, t, labels, whole = case
    threads(2)
    other = torch.full_like(x, float("nan"))
    other[4] = x[1]
    outs = model(other, t.roll(3), labels.roll(3, 1))
    assert all(torch.equal(a[4], b[1]) for a, b in zip(outs, whole, strict=True))


def test_modulation_made_before_the_loop_has_the_same_bits(case):
    model, _, t, labels, _ = case
    grid = torch.cat([t, t / 2, t / 3, t / 4, t / 5])  # many rows of a plan at once
    made = model.condition(grid, labels.repeat(1, 5)).select(torch.tensor([6, 1]))
    fresh = model.condition(t[[6, 1]], labels[:, [6, 1]])
    assert torch.equal(made.blocks, fresh.blocks)
    assert torch.equal(made.final, fresh.final)


@pytest.mark.parametrize("width", [32, 48, 64, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_do_not_depend_on_their_number(threads, width, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, 3 * width, dtype=dtype).requires_grad_(False)
    x = torch.randn(400, width, dtype=dtype)
    threads(1)
    whole = [linear(x, layer), silu(x), gelu(x.repeat(1, 4), "tanh")]
    for count in (1, 2, 3, 5, 7):
        threads(count)
        for rows in (1, 2, 3, 5, 17, 33, 100, 399, 400):
            part = [linear(x[:rows], layer), silu(x[:rows]), gelu(x[:rows].repeat(1, 4), "tanh")]
            assert all(torch.equal(a, b[:rows]) for a, b in zip(part, whole, strict=True)), (count, rows)


def test_row_layers_compute_what_torch_computes():
    x = torch.randn(5, 7, 48, dtype=torch.float64)
    layer = torch.nn.Linear(48, 10, bias=False, dtype=torch.float64).requires_grad_(False)
    assert torch.allclose(linear(x, layer), layer(x), rtol=1e-14, atol=1e-14)
    assert torch.allclose(silu(x), torch.nn.functional.silu(x), rtol=1e-14, atol=0)
    for kind in ("tanh", "none"):
        expected = torch.nn.functional.gelu(x, approximate=kind)
        assert torch.allclose(gelu(x.clone(), kind), expected, rtol=1e-13, atol=1e-15)
